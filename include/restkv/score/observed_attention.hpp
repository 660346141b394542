// SPDX-License-Identifier: Apache-2.0
/// @file
/// `observed_attention`: the attention that every query which sees a token pays to it.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// score = a, per query that sees the token, tokens of the window included. What a temporal smoother makes of it:
///
/// * `sum` with `every_query`: H2O's accumulated attention (arXiv 2306.14048). Early tokens are seen by more queries.
/// * `mean` with `every_query`: the mean over the queries that see the token, which takes that advantage away.
/// * `ema` with `every_query`: a running score that forgets.
/// * `last` with a window of 1 and shared heads: TOVA (arXiv 2401.06104).
///
/// Every query sees past tokens only; a published implementation of H2O masks just its last window, so that early
/// queries look ahead, which this does not repeat. Cost: window * length / 2 logits and exponentials a query head, one
/// row of scores a query head and thread; nothing of the size window * length is stored.
struct observed_attention {
  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention;
  static constexpr bool scores_window = true;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention;
  }
  ///@}
};

}  // namespace restkv
