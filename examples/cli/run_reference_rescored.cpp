// SPDX-License-Identifier: Apache-2.0
#include "run_reference.hpp"

RESTKV_CLI_RESCORED_SCORES(, restkv::cli::remembering_reference)
