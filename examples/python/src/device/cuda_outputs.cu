// SPDX-License-Identifier: Apache-2.0
#include "cuda.cuh"

RESTKV_PYTHON_SCORES(, restkv::cuda_backend, outputs, float)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, outputs, restkv::half)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, outputs, restkv::bfloat16)
