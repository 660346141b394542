// SPDX-License-Identifier: Apache-2.0
/// @file
/// Scores as unsigned integers of the same order: what makes ties, NaN and -0 well defined in every selection.
#pragma once

#include <restkv/core/config.hpp>

#include <bit>
#include <concepts>
#include <type_traits>

namespace restkv {

/// The unsigned integer that stands for a Real.
template <std::floating_point Real>
using order_key_t = std::conditional_t<sizeof(Real) == 4, std::uint32_t, std::uint64_t>;

/// The key of a token that must not be chosen; below the key of every score.
inline constexpr unsigned excluded_key = 0;

/// Maps a score to an integer such that a < b exactly when key(a) < key(b): NaN lowest (key 1, whatever its sign or
/// payload), then -inf .. +inf, with -0 equal to 0. Key 0 is left for `excluded_key`.
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD constexpr order_key_t<Real> order_key(Real score) noexcept {
  using key_t = order_key_t<Real>;
  constexpr key_t sign = key_t(1) << (8 * sizeof(Real) - 1);
  if (score != score) return key_t(1);
  const key_t bits = std::bit_cast<key_t>(score == 0 ? Real(0) : score);
  return (bits & sign) != 0 ? static_cast<key_t>(~bits) : static_cast<key_t>(bits | sign);
}

/// The score of a key; NaN for the keys of NaN and of excluded tokens.
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD constexpr Real score_of_key(order_key_t<Real> key) noexcept {
  using key_t = order_key_t<Real>;
  constexpr key_t sign = key_t(1) << (8 * sizeof(Real) - 1);
  if (key <= 1) return std::bit_cast<Real>(static_cast<key_t>(sizeof(Real) == 4 ? 0x7fc00000u : 0x7ff8000000000000u));
  return std::bit_cast<Real>((key & sign) != 0 ? static_cast<key_t>(key & ~sign) : static_cast<key_t>(~key));
}

}  // namespace restkv
