// SPDX-License-Identifier: Apache-2.0
#include "run_thrust.hpp"

RESTKV_CLI_ATTENTION_SCORES(, restkv::cli::thrust_omp_backend)
