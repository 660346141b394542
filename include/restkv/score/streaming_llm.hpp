// SPDX-License-Identifier: Apache-2.0
/// @file
/// `streaming_llm`: the newest tokens, whatever they say.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// score = position, so that the budget left by `protection` goes to the newest tokens. With protection{.sink = 4}
/// this is StreamingLLM (arXiv 2309.17453). Needs neither queries, keys nor values. Positions are exact in float up to
/// 2^24.
struct streaming_llm {
  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::none;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return static_cast<Real>(token.position);
  }
  ///@}
};

}  // namespace restkv
