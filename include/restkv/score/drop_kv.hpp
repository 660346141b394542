// SPDX-License-Identifier: Apache-2.0
/// @file
/// `drop_kv`: the squared deletion error.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/score/features.hpp>

namespace restkv {

/// score = (a / (1 - a + epsilon))^2 * ||v - o||^2, per query of the window; published with the temporal smoother `sum`, a
/// window of 8 and max pooling over 11 tokens (DropKV, ICML 2026). It is the square of CAOTE's score, so the sum
/// over queries weighs the largest error most. Heads are comparable, which suits `ada_kv`. 1 - a comes from the odds, not
/// from a subtraction. Cost: as `caote`.
struct drop_kv {
  float epsilon = 1e-6f;  ///< keeps the odds finite, >= 0

  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention | feature::odds | feature::distance;
  static constexpr bool monotone_in_distance = true;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    const Real rest = token.odds > 0 ? token.attention / token.odds : Real(1);
    const Real error = token.attention / (rest + static_cast<Real>(epsilon)) * token.distance;
    return error * error;
  }
  ///@}

  /// Fails on a negative epsilon.
  [[nodiscard]] status check() const noexcept {
    if (!(epsilon >= 0.0f)) {
      return status::error(errc::invalid_argument, "drop_kv.epsilon is %g, must not be negative", double{epsilon});
    }
    return {};
  }
};

}  // namespace restkv
