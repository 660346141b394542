// SPDX-License-Identifier: Apache-2.0
#include "run_thrust.hpp"

RESTKV_CLI_RESCORED_SCORES(, restkv::cli::thrust_cpp_backend)
