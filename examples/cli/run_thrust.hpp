// SPDX-License-Identifier: Apache-2.0
/// @file
/// The sources of the Thrust backends: run_thrust_*.cpp, for the systems of the host. Compiled where the build finds
/// Thrust; it defines RESTKV_CLI_THRUST.
#pragma once

#include "errors_on.hpp"
#include "run_policy.hpp"
#include "verify_backends.hpp"

#include <restkv/backend/thrust/backend.cuh>

namespace restkv::cli {

using thrust_cpp_backend = thrust_backend<thrust_cpp>;
#if defined(_OPENMP)
using thrust_omp_backend = thrust_backend<thrust_omp>;
#endif

template <class Backend>
[[nodiscard]] selection select_on_thrust(const backend_request& r) {
  Backend backend;
  return policy_runner<Backend>(backend, r.c, r.layer, r.where, r.what).run();
}

template <class Backend>
[[nodiscard]] window_errors errors_on_thrust(const selection& given, const backend_request& r) {
  Backend backend;
  return errors_on_window(backend, given, r.layer, r.c, r.where);
}

}  // namespace restkv::cli
