// SPDX-License-Identifier: Apache-2.0
/// @file
/// Random numbers as pure functions of a seed and of what they are for: the same on every backend and thread count.
#pragma once

#include <restkv/core/config.hpp>

#include <concepts>
#include <cstdint>

namespace restkv {

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
[[nodiscard]] RESTKV_HD constexpr std::uint64_t mix_bits(std::uint64_t z) noexcept {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/// 64 random bits for a seed and a list of counters: layer, sequence, head, position, ...
template <std::integral... Counters>
[[nodiscard]] RESTKV_HD constexpr std::uint64_t counter_bits(std::uint64_t seed, Counters... counters) noexcept {
  std::uint64_t state = mix_bits(seed + 0x9e3779b97f4a7c15u);
  ((state = mix_bits(state ^ static_cast<std::uint64_t>(counters))), ...);
  return state;
}

/// The 24 highest bits as a number in [0, 1), exact in float.
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD constexpr Real uniform_of(std::uint64_t bits) noexcept {
  return static_cast<Real>(bits >> 40) * static_cast<Real>(5.9604644775390625e-08);  // 2^-24
}

}  // namespace restkv
