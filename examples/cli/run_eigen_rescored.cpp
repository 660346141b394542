// SPDX-License-Identifier: Apache-2.0
#include "run_eigen.hpp"

RESTKV_CLI_RESCORED_SCORES(, restkv::eigen_backend)
