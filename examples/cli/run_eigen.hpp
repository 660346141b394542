// SPDX-License-Identifier: Apache-2.0
/// @file
/// The sources of eigen_backend: run_eigen.cpp and run_eigen_*.cpp.
#pragma once

#include "run_policy.hpp"

#include <restkv/backend/eigen/backend.hpp>

RESTKV_CLI_ATTENTION_SCORES(extern, restkv::eigen_backend)
RESTKV_CLI_RESCORED_SCORES(extern, restkv::eigen_backend)
RESTKV_CLI_VALUE_SCORES(extern, restkv::eigen_backend)
RESTKV_CLI_CACHE_SCORES(extern, restkv::eigen_backend)
