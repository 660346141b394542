// SPDX-License-Identifier: Apache-2.0
#include "compare_run.hpp"

#include <restkv/backend/eigen/backend.hpp>

namespace restkv::cli {

std::vector<policy_facts> known_policies() {
  std::vector<policy_facts> facts;
  for (auto& policy : policy_table<eigen_backend>()) facts.push_back(std::move(policy.facts));
  return facts;
}

policy_comparison compare_with_eigen(const trace_file& trace, const comparison_request& request,
                                     const comparison_progress& progress) {
  eigen_backend backend(request.threads);
  return run_comparison(backend, trace, request, progress);
}

}  // namespace restkv::cli
