// SPDX-License-Identifier: Apache-2.0
#include "cuda.cuh"

RESTKV_PYTHON_SCORES(, restkv::cuda_backend, positions, float)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, positions, restkv::half)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, positions, restkv::bfloat16)
