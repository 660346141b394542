// SPDX-License-Identifier: Apache-2.0
/// @file
/// `caote` and `fast_caote`: the deletion error in the head's own output.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// score = a / (1 - a) * ||o - v||_2, per query of the window (CAOTE, arXiv 2504.14051): `rest_kv` without W_O, by the
/// name under which it was published. As a correction of any other score: `caote_rescoring`. Cost: as `rest_kv`, without
/// the d x d product.
struct caote {
  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::odds | feature::distance;
  static constexpr bool monotone_in_distance = true;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return token.odds * token.distance;
  }
  ///@}
};

/// score = a / (1 - a) * ||mean(v) - v||_2, with the mean of the sequence's values in place of the output (FastCAOTE,
/// arXiv 2504.14051). Cost: as `snap_kv`, and two reads of the values.
struct fast_caote {
  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::odds | feature::mean_distance;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return token.odds * token.mean_distance;
  }
  ///@}
};

}  // namespace restkv
