// SPDX-License-Identifier: Apache-2.0
#include "run_thrust.hpp"

RESTKV_CLI_ATTENTION_SCORES(extern, restkv::cli::thrust_omp_backend)
RESTKV_CLI_RESCORED_SCORES(extern, restkv::cli::thrust_omp_backend)
RESTKV_CLI_VALUE_SCORES(extern, restkv::cli::thrust_omp_backend)
RESTKV_CLI_CACHE_SCORES(extern, restkv::cli::thrust_omp_backend)

namespace restkv::cli {

selection select_on_thrust_omp(const backend_request& r) { return select_on_thrust<thrust_omp_backend>(r); }

window_errors errors_on_thrust_omp(const selection& given, const backend_request& r) {
  return errors_on_thrust<thrust_omp_backend>(given, r);
}

}  // namespace restkv::cli
