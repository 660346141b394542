// SPDX-License-Identifier: Apache-2.0
/// @file
/// `la_prox`: attention times the projected value.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// score = a * ||W v||_2, per query of the window. With the temporal smoother `root_sum_square` the row is
/// ||A[:, n]||_2 * ||W[h] v_n||_2, a bound on the Frobenius norm of what the token adds to the layer's output (LaProx, arXiv
/// 2605.07234; there with a window of 32, average pooling over 7 tokens, and one ranking over all layers and heads).
/// Cost: as `snap_kv`, and one d x d product a token and query head.
struct la_prox {
  restkv::metric metric_of_distance = restkv::metric::projection;  ///< through W_O, or not

  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention | feature::value_norm;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention * token.value_norm;
  }
  ///@}
};

}  // namespace restkv
