// SPDX-License-Identifier: Apache-2.0
#include "host_kernels.hpp"

RESTKV_PYTHON_SCORES(, restkv::host_kernel_backend, sizes, float)
RESTKV_PYTHON_SCORES(, restkv::host_kernel_backend, sizes, restkv::half)
