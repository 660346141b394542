// SPDX-License-Identifier: Apache-2.0
/// @file
/// `lava_budget`: layers by the entropy of their scores.
#pragma once

#include <restkv/model/model_budget.hpp>

namespace restkv {

/// Layers by the entropy of their scores, heads by competition (LAVa, arXiv 2509.09754): the share of a layer is
/// proportional to the summary's score_entropy, and the best scores of the layer's heads together are kept. With `lava`
/// as the policy's rescoring, which makes the heads' scores comparable.
struct lava_budget {
  budget_size budget{};  ///< mean over all layers and heads
  index_t least = 0;     ///< candidates that every head keeps

  ///@{
  /// See `model_budget`.
  static constexpr bool compares_heads = true;

  [[nodiscard]] RESTKV_HD constexpr double preference(const layer_summary& summary) const noexcept {
    return summary.score_entropy;
  }
  ///@}
  /// Fails on a bad budget.
  [[nodiscard]] status check() const noexcept { return detail::check_model_size("lava_budget", budget, least); }
};

static_assert(model_budget<lava_budget>);

}  // namespace restkv
