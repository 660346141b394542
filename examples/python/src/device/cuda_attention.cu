// SPDX-License-Identifier: Apache-2.0
#include "cuda.cuh"

RESTKV_PYTHON_SCORES(, restkv::cuda_backend, attention, float)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, attention, restkv::half)
RESTKV_PYTHON_SCORES(, restkv::cuda_backend, attention, restkv::bfloat16)
