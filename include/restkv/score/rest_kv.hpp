// SPDX-License-Identifier: Apache-2.0
/// @file
/// `rest_kv`: how much the attention output changes when a token is deleted.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/score/features.hpp>

#include <cmath>

namespace restkv {

/// score = a / (1 - a) * ||W (o - v)||^tau, optionally divided by ||W o||.
///
/// Deleting token n and renormalising the rest moves the output from o to (o - a v) / (1 - a), that is by
/// a / (1 - a) * ||o - v||, exactly (ReST-KV, arXiv 2605.08840, Eq. 7).
///
/// Order `before` is the paper: one score per query, with o over all tokens. Order `after` is what its release runs:
/// the attention rows are smoothed first, and o is their sum over past tokens, not renormalised.
///
/// With metric::identity and the temporal smoother `mean` this is CAOTE (arXiv 2504.14051) over plain attention.
/// Cost per token and query head: one row of the window's attention, one d x d product (pruned where possible).
struct rest_kv {
  query_order order = query_order::before;                         ///< score each query, or the smoothed attention
  restkv::metric metric_of_distance = restkv::metric::projection;  ///< through W_O, or not
  float tau = 1.0f;                                                ///< exponent of the distance, > 0
  bool normalised = false;  ///< divide each query's score by ||W o||; a zero output divides by 1

  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::odds | feature::distance | feature::output_norm;
  static constexpr bool monotone_in_distance = true;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    const Real distance = tau == 1.0f ? token.distance : std::pow(token.distance, static_cast<Real>(tau));
    const Real scale = normalised && token.output_norm > 0 ? token.output_norm : Real(1);
    return token.odds * distance / scale;
  }
  ///@}

  /// Fails on a tau outside (0, 64].
  [[nodiscard]] status check() const noexcept {
    if (!(tau > 0.0f) || tau > 64.0f) {
      return status::error(errc::invalid_argument, "rest_kv.tau is %g, must be above 0 and at most 64", double{tau});
    }
    return {};
  }
};

}  // namespace restkv
