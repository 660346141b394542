// SPDX-License-Identifier: Apache-2.0
#include "errors_on.hpp"
#include "run_thrust.hpp"
#include "verify_backends.hpp"

RESTKV_CLI_ATTENTION_SCORES(extern, restkv::cli::thrust_cpp_backend)
RESTKV_CLI_RESCORED_SCORES(extern, restkv::cli::thrust_cpp_backend)
RESTKV_CLI_VALUE_SCORES(extern, restkv::cli::thrust_cpp_backend)
RESTKV_CLI_CACHE_SCORES(extern, restkv::cli::thrust_cpp_backend)

namespace restkv::cli {

selection select_on_thrust_cpp(const backend_request& r) {
  thrust_cpp_backend backend;
  return policy_runner<thrust_cpp_backend>(backend, r.c, r.layer, r.where, r.what).run();
}

window_errors errors_on_thrust_cpp(const selection& given, const backend_request& r) {
  thrust_cpp_backend backend;
  const index_t queries = std::min({r.c.window, r.layer.query.extent(2), r.layer.key.extent(2)});
  if (queries == 0) throw input_error(r.where + ": there are no queries to measure the error with");
  return errors_on(backend, given, r.layer, queries, r.where);
}

}  // namespace restkv::cli
