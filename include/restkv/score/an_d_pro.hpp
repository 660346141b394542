// SPDX-License-Identifier: Apache-2.0
/// @file
/// `an_d_pro`: how much of the output points along the value.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// score = a * <o, v>, per query of the window (AnDPro, NeurIPS 2025): the length that the token adds to the output along
/// the output's own direction, up to the factor ||o||. Negative for a value that points against the output. Published with
/// units of 4 tokens and a protected first token. Cost: as `caote`.
struct an_d_pro {
  restkv::metric metric_of_distance = restkv::metric::identity;  ///< through W_O, or not

  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention | feature::alignment;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention * token.alignment;
  }
  ///@}
};

}  // namespace restkv
