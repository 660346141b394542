// SPDX-License-Identifier: Apache-2.0
/// @file
/// `duo_attention`: some heads keep everything, the others sinks and recent tokens.
#pragma once

#include <restkv/budget/model_table.hpp>

namespace restkv {

/// Retrieval heads and streaming heads (DuoAttention, arXiv 2410.10819): where retrieval_heads(l, h) is not 0 the head
/// keeps `retrieval`, by default all its tokens; the others keep `streaming`, by default nothing but what the policy
/// protects. With protection{.sink = 128, .recent = 256} that is the published pattern; any score may choose what a
/// head keeps beyond the protected tokens. One row that stands for several heads of the table retrieves where any of
/// them does.
///
/// Plan for a dense cache with care: one retrieval head makes a layer's capacity the whole sequence. Cost: heads.
struct duo_attention {
  model_table<std::uint8_t> retrieval_heads{};              ///< [layers, heads]; must outlive the policy
  budget_size retrieval = budget_size::keep_ratio(1.0);     ///< of a retrieval head
  budget_size streaming = 1;                                ///< of a streaming head; protected tokens at least

  ///@{
  /// See `budget_allocator`.
  [[nodiscard]] index_t tokens_per_head(const budget_problem& problem) const noexcept {
    return problem.protected_tokens() + chosen_in_layer(problem) / std::max<index_t>(problem.heads, 1);
  }
  [[nodiscard]] index_t most_per_head(const budget_problem& problem) const noexcept {
    index_t most = 0;
    for (index_t h = 0; h < problem.heads; ++h) most = std::max(most, wanted(problem, h));
    return problem.protected_tokens() + most;
  }
  [[nodiscard]] index_t chosen_in_layer(const budget_problem& problem) const noexcept {
    index_t sum = 0;
    for (index_t h = 0; h < problem.heads; ++h) sum += std::min(wanted(problem, h), problem.candidates_of(h));
    return sum;
  }
  [[nodiscard]] constexpr index_t deciding_keys(const budget_problem&) const noexcept { return 0; }

  template <std::unsigned_integral Key>
  void allocate(const budget_problem& problem, tensor_view<const Key, 2>, std::span<index_t> counts,
                std::span<double>) const noexcept {
    for (std::size_t h = 0; h < counts.size(); ++h) {
      const auto row = static_cast<index_t>(h);
      counts[h] = std::min(wanted(problem, row), problem.candidates_of(row));
    }
  }
  [[nodiscard]] status check(const budget_problem& problem) const noexcept {
    return retrieval_heads.check("duo_attention.retrieval_heads", problem);
  }
  ///@}

  /// Fails on a bad budget.
  [[nodiscard]] status check() const noexcept {
    RESTKV_RETURN_IF_FAILED(retrieval.check("duo_attention.retrieval"));
    return streaming.check("duo_attention.streaming");
  }

 private:
  [[nodiscard]] bool retrieves(const budget_problem& problem, index_t h) const noexcept {
    if (!retrieval_heads.fits(problem)) return false;
    const auto columns = retrieval_heads.columns_of(h, problem.heads);
    for (index_t i = 0; i < columns.count; ++i) {
      if (retrieval_heads.values(problem.layer, columns.first + i) != 0) return true;
    }
    return false;
  }
  [[nodiscard]] index_t wanted(const budget_problem& problem, index_t h) const noexcept {
    const budget_size& size = retrieves(problem, h) ? retrieval : streaming;
    return std::clamp<index_t>(size.of(problem) - problem.protected_tokens(), 0, problem.candidates);
  }
};

}  // namespace restkv
