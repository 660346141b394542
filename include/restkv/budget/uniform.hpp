// SPDX-License-Identifier: Apache-2.0
/// @file
/// `uniform`: the same number of tokens for every head of every layer.
#pragma once

#include <restkv/budget/budget.hpp>

namespace restkv {

/// Every head keeps `tokens_per_head` tokens, or `budget_size::keep_ratio(r)` of its sequence.
struct uniform {
  budget_size budget{};  ///< of every head

  ///@{
  /// See `budget_allocator`.
  [[nodiscard]] index_t tokens_per_head(const budget_problem& problem) const noexcept {
    return budget.of(problem);
  }
  [[nodiscard]] index_t most_per_head(const budget_problem& problem) const noexcept { return budget.of(problem); }
  [[nodiscard]] constexpr index_t deciding_keys(const budget_problem&) const noexcept { return 0; }

  template <std::unsigned_integral Key>
  void allocate(const budget_problem& problem, tensor_view<const Key, 2>, std::span<index_t> counts,
                std::span<double>) const noexcept {
    fill_counts(problem, chosen_per_head(*this, problem), counts);
  }
  ///@}
  /// Fails on a bad budget.
  [[nodiscard]] status check() const noexcept { return budget.check("uniform"); }
};

}  // namespace restkv
