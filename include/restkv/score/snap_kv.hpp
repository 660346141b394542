// SPDX-License-Identifier: Apache-2.0
/// @file
/// `snap_kv`: the attention that the observation window pays to a token.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// score = a, per query of the window (SnapKV, arXiv 2404.14469). Published settings: temporal `mean` (its sum, up to
/// a factor), spatial `average_pool` of width 5 or 7, window 32 or 64, uniform budget.
struct snap_kv {
  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention;
  }
  ///@}
};

}  // namespace restkv
