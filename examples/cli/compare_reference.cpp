// SPDX-License-Identifier: Apache-2.0
#include "compare_run.hpp"

#include <restkv/reference/backend.hpp>

namespace restkv::cli {

policy_comparison compare_with_reference(const trace_file& trace, const comparison_request& request,
                                         const comparison_progress& progress) {
  reference_backend backend;
  return run_comparison(backend, trace, request, progress);
}

}  // namespace restkv::cli
