// SPDX-License-Identifier: Apache-2.0
/// @file
/// `random_score`: the null policy that every comparison needs.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// score = a uniform number in [0, 1), a pure function of (seed, layer, sequence, head, position): counter-based, hence
/// the same on every backend and thread count. 24 random bits, exact in float. The mixing function is the finaliser
/// of SplitMix64 (Steele, Lea, Flood 2014).
struct random_score {
  std::uint64_t seed = 0;  ///< another seed draws other tokens

  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::none;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    std::uint64_t state = mix(seed + 0x9e3779b97f4a7c15u);
    state = mix(state ^ static_cast<std::uint64_t>(token.layer));
    state = mix(state ^ static_cast<std::uint64_t>(token.batch));
    state = mix(state ^ static_cast<std::uint64_t>(token.head));
    state = mix(state ^ static_cast<std::uint64_t>(token.position));
    return static_cast<Real>(state >> 40) * static_cast<Real>(5.9604644775390625e-08);  // 2^-24
  }
  ///@}

 private:
  [[nodiscard]] RESTKV_HD static constexpr std::uint64_t mix(std::uint64_t z) noexcept {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};

}  // namespace restkv
