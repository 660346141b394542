// SPDX-License-Identifier: Apache-2.0
// expect: a budget allocator needs [\s\S]*satisf.*has_most_per_head[\s\S]*allocator.most_per_head\(problem\)
// A budget allocator must say how much one head can get: a plan reserves that.
#include <restkv/policy.hpp>

struct half_of_everything {
  restkv::index_t tokens_per_head(const restkv::budget_problem& problem) const { return problem.length / 2; }
#ifdef RESTKV_CONTROL
  restkv::index_t most_per_head(const restkv::budget_problem& problem) const { return problem.length / 2; }
#endif
  template <std::unsigned_integral Key>
  void allocate(const restkv::budget_problem& problem, restkv::tensor_view<const Key, 2>,
                std::span<restkv::index_t> counts, std::span<double>) const {
    for (auto& count : counts) count = restkv::chosen_per_head(restkv::uniform{problem.length / 2}, problem);
  }
};

auto policy = restkv::eviction_policy{.budget = half_of_everything{}};
