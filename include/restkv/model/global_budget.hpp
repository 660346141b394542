// SPDX-License-Identifier: Apache-2.0
/// @file
/// `global_budget`: one competition of all layers and heads.
#pragma once

#include <restkv/model/model_budget.hpp>

namespace restkv {

/// One competition of all scores of all layers and heads (LaProx, arXiv 2605.07234; Layer-DefensiveKV, arXiv
/// 2510.13334). With `normalise` a layer's scores count as shares of their sum, for scores whose size differs from
/// layer to layer.
struct global_budget {
  budget_size budget{};   ///< mean over all layers and heads
  index_t least = 0;      ///< candidates that every head keeps
  bool normalise = false;  ///< divide scores by the sum of their layer's

  ///@{
  /// See `model_budget`.
  static constexpr bool compares_heads = true;
  static constexpr bool compares_layers = true;

  [[nodiscard]] RESTKV_HD double scale(const layer_summary& summary) const noexcept {
    return normalise && summary.score_sum > 0 && std::isfinite(summary.score_sum) ? 1.0 / summary.score_sum : 1.0;
  }
  ///@}
  /// Fails on a bad budget.
  [[nodiscard]] status check() const noexcept { return detail::check_model_size("global_budget", budget, least); }
};

static_assert(model_budget<global_budget>);

}  // namespace restkv
