// SPDX-License-Identifier: Apache-2.0
/// @file
/// The sources of the Thrust backends: run_thrust_*.cpp, for the systems of the host. Compiled where the build finds
/// Thrust; it defines RESTKV_CLI_THRUST.
#pragma once

#include "run_policy.hpp"

#include <restkv/backend/thrust/backend.cuh>

namespace restkv::cli {

using thrust_cpp_backend = thrust_backend<thrust_cpp>;
#if defined(_OPENMP)
using thrust_omp_backend = thrust_backend<thrust_omp>;
#endif

}  // namespace restkv::cli
