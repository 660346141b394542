// SPDX-License-Identifier: Apache-2.0
/// @file
/// `random_score`: the null policy that every comparison needs.
#pragma once

#include <restkv/core/counter_random.hpp>
#include <restkv/score/features.hpp>

namespace restkv {

/// score = a uniform number in [0, 1), a pure function of (seed, layer, sequence, head, position): counter-based, hence
/// the same on every backend and thread count. 24 random bits, exact in float (`counter_bits`).
struct random_score {
  std::uint64_t seed = 0;  ///< another seed draws other tokens

  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::none;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return uniform_of<Real>(counter_bits(seed, token.layer, token.batch, token.head, token.position));
  }
  ///@}
};

}  // namespace restkv
