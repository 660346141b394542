// SPDX-License-Identifier: Apache-2.0
/// @file
/// The backends that `restkv verify` knows, in one table: what each does with a file's configuration, and with problems
/// that are generated.
///
/// A backend that is not always compiled in has a source of its own, behind a macro that the build defines where it is:
/// RESTKV_CLI_THRUST, RESTKV_CLI_HOST_KERNELS, RESTKV_CLI_CUDA.
#pragma once

#include "selection.hpp"
#include "set_error.hpp"
#include "verify_outcome.hpp"

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace restkv::cli {

/// What a selection is run with.
struct backend_request {
  const configuration& c;
  const layer_view<float>& layer;
  int threads = 1;
  score_memory& memory;      ///< of the reference: what it computed before
  const std::string& where;  ///< how messages begin
  inspection what = inspection::scores;
};

/// One backend. A function that is null is something that the backend does not do.
struct verified_backend {
  std::string_view name;
  selection (*select)(const backend_request&) = nullptr;
  /// The output errors of a given set, on every query of the window.
  window_errors (*errors)(const selection& given, const backend_request&) = nullptr;
  std::vector<random_outcome> (*random)(const parity::options&, int threads) = nullptr;
  bool prunes = false;  ///< whether a kept set without scores may be computed in another way
};

/// Those that were compiled in, in the order in which they are shown.
[[nodiscard]] std::span<const verified_backend> verified_backends();

/// The backends of a name: one, all of them for "all", and eigen and reference for "". Throws input_error, with the
/// names that there are.
[[nodiscard]] std::vector<const verified_backend*> find_backends(const std::string& name);

///@{
/// A configuration on one backend, and the errors of a set; the scores are instantiated in sources beside it
/// (run_thrust_*.cpp).
[[nodiscard]] selection select_on_thrust_cpp(const backend_request& request);
[[nodiscard]] selection select_on_thrust_omp(const backend_request& request);
[[nodiscard]] window_errors errors_on_thrust_cpp(const selection& given, const backend_request& request);
[[nodiscard]] window_errors errors_on_thrust_omp(const selection& given, const backend_request& request);
///@}

}  // namespace restkv::cli
