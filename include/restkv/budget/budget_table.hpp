// SPDX-License-Identifier: Apache-2.0
/// @file
/// `budget_table`: a budget for each layer, or for each layer and head, given by the user.
#pragma once

#include <restkv/budget/model_table.hpp>

namespace restkv {

/// Head h of layer l keeps budgets(l, h): a count of tokens or a part of the sequence, protected ones included.
/// Profiles of a model (LU-KV, arXiv 2602.08585, after its offline search), per-layer ratios, schedules of any kind. A
/// head whose budget is below the protected tokens keeps those; a budget beyond its tokens keeps all. Where one row
/// stands for several heads of the table it keeps their mean, rounded down.
///
/// The totals are the table's: nothing is moved between heads. Cost: heads.
struct budget_table {
  model_table<budget_size> budgets{};  ///< [layers, heads], or [layers, 1]; must outlive the policy

  ///@{
  /// See `budget_allocator`.
  [[nodiscard]] index_t tokens_per_head(const budget_problem& problem) const noexcept {
    if (!budgets.fits(problem)) return problem.protected_tokens();
    return problem.protected_tokens() + sum_chosen(problem) / std::max<index_t>(problem.heads, 1);
  }
  [[nodiscard]] index_t most_per_head(const budget_problem& problem) const noexcept {
    index_t most = 0;
    for (index_t h = 0; budgets.fits(problem) && h < problem.heads; ++h) most = std::max(most, wanted(problem, h));
    return problem.protected_tokens() + most;
  }
  [[nodiscard]] index_t chosen_in_layer(const budget_problem& problem) const noexcept {
    return budgets.fits(problem) ? sum_chosen(problem) : 0;
  }
  [[nodiscard]] constexpr index_t deciding_keys(const budget_problem&) const noexcept { return 0; }

  template <std::unsigned_integral Key>
  void allocate(const budget_problem& problem, tensor_view<const Key, 2>, std::span<index_t> counts,
                std::span<double>) const noexcept {
    const bool known = budgets.fits(problem);
    for (std::size_t h = 0; h < counts.size(); ++h) counts[h] = known ? chosen(problem, static_cast<index_t>(h)) : 0;
  }
  [[nodiscard]] status check(const budget_problem& problem) const noexcept {
    return budgets.check("budget_table.budgets", problem);
  }
  ///@}

  /// Fails on a budget that is negative or a ratio outside [0, 1]; names its place.
  [[nodiscard]] status check() const noexcept {
    const auto& table = budgets.values;
    if (table.data != nullptr) RESTKV_RETURN_IF_FAILED(detail::check_view("budget_table.budgets", table));
    for (index_t l = 0; table.data != nullptr && l < table.extent(0); ++l) {
      for (index_t h = 0; h < table.extent(1); ++h) {
        const budget_size& size = table(l, h);
        if (size.tokens >= 0 && size.ratio >= 0.0 && size.ratio <= 1.0) continue;
        return status::error(
            errc::invalid_argument,
            "budget_table.budgets(%lld, %lld) is %lld tokens and a ratio of %g: must be at least 0 and "
            "within [0, 1]",
            static_cast<long long>(l), static_cast<long long>(h), static_cast<long long>(size.tokens), size.ratio);
      }
    }
    return {};
  }

 private:
  /// Candidates that row h wants, of a head that has them all.
  [[nodiscard]] index_t wanted(const budget_problem& problem, index_t h) const noexcept {
    const auto columns = budgets.columns_of(h, problem.heads);
    index_t sum = 0;
    for (index_t i = 0; i < columns.count; ++i) {
      sum += budgets.values(problem.layer, columns.first + i).of(problem);
    }
    return std::clamp<index_t>(sum / columns.count - problem.protected_tokens(), 0, problem.candidates);
  }
  [[nodiscard]] index_t chosen(const budget_problem& problem, index_t h) const noexcept {
    return std::min(wanted(problem, h), problem.candidates_of(h));
  }
  [[nodiscard]] index_t sum_chosen(const budget_problem& problem) const noexcept {
    index_t sum = 0;
    for (index_t h = 0; h < problem.heads; ++h) sum += chosen(problem, h);
    return sum;
  }
};

}  // namespace restkv
