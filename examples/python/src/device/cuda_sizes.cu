// SPDX-License-Identifier: Apache-2.0
#include "cuda.cuh"

RESTKV_PYTHON_SCORES(, restkv::cuda_backend, sizes, float)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, sizes, restkv::half)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, sizes, restkv::bfloat16)
