// SPDX-License-Identifier: Apache-2.0
#include "cuda.cuh"

RESTKV_PYTHON_SCORES(, restkv::cuda_backend, deletion, float)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, deletion, restkv::half)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, deletion, restkv::bfloat16)
