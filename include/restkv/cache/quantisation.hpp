// SPDX-License-Identifier: Apache-2.0
/// @file
/// Numbers as small integers: `code_format`, and how a group of numbers gets its scale and its codes.
///
/// A group of numbers shares a scale s, and a zero point z or an offset o: value = s * (code - z) + o. Which of the two
/// a cache has is its convention:
///
/// - neither, signed codes (symmetric): s = max |x| / highest, as in int8 caches with a scale for each token.
/// - a zero point, in units of codes (asymmetric): the range is widened to hold 0, so that z is a code and 0 is exact.
/// - an offset, in units of values (asymmetric): s = (max - min) / (highest - lowest), and min has the lowest code, as
///   in KIVI (Liu et al., arXiv 2402.02750).
///
/// Codes of 8 bits may be numbers of their own, `e4m3`, as engines store keys and values with a scale for the tensor or
/// for each token: value = s * e4m3(code). They are read, scored, copied and compacted as they are; `quantise` makes
/// none.
///
/// Codes are rounded to nearest, ties to even, and saturate. With the parameters rounded to their type, a number x of
/// the group's range and its value differ by at most s / 2 + (highest - lowest) * (rounding of s) + (rounding of o).
///
/// Numbers that are not finite do not shape the range: infinities take the code at their end, NaN that of the value
/// nearest to 0, and a group with nothing finite is 0. A group of equal numbers is exact with an offset (s = 0), and so
/// is a group of zeros in every convention. Parameters that exceed their type saturate.
#pragma once

#include <restkv/core/dtype.hpp>
#include <restkv/core/status.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>

namespace restkv {

/// An axis of a cache: of [batch, heads, tokens, channels] the last or the one before.
enum class cache_axis {
  channels,  ///< codes of one byte belong to neighbouring channels of a token
  tokens,    ///< codes of one byte belong to neighbouring tokens of a channel
};

/// The number of an 8-bit float of 4 exponent bits and 3 of fraction (OCP's E4M3, "fn"): up to 448, no infinities; 0x7f
/// and 0xff are NaN. Exact.
[[nodiscard]] RESTKV_HD constexpr float e4m3_to_float(std::uint8_t code) noexcept {
  const std::uint32_t magnitude = code & 0x7fu;
  const std::uint32_t sign = std::uint32_t(code & 0x80u) << 24;
  if (magnitude == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude < 8u) {  // a multiple of 2^-9
    const float number = static_cast<float>(magnitude) * 0x1p-9f;
    return sign != 0 ? -number : number;
  }
  return std::bit_cast<float>(sign | ((magnitude << 20) + 0x3c000000u));
}

/// How codes lie in bytes: 8 / bits of them in each, the first in the lowest bits.
struct code_format {
  int bits = 8;                              ///< 2, 4 or 8
  bool is_signed = true;                     ///< two's complement; else from 0
  cache_axis packed = cache_axis::channels;  ///< which neighbours share a byte
  bool e4m3 = false;                         ///< 8 bits that are a float, see `e4m3_to_float`

  /// Codes of a byte.
  [[nodiscard]] constexpr index_t per_byte() const noexcept { return 8 / bits; }
  /// Bytes for so many neighbouring codes.
  [[nodiscard]] constexpr index_t bytes(index_t codes) const noexcept {
    return codes / per_byte() + (codes % per_byte() != 0 ? 1 : 0);
  }
  /// The smallest code.
  [[nodiscard]] constexpr int lowest() const noexcept { return is_signed ? -(1 << (bits - 1)) : 0; }
  /// The largest code.
  [[nodiscard]] constexpr int highest() const noexcept { return is_signed ? (1 << (bits - 1)) - 1 : (1 << bits) - 1; }
  /// Code number `place` of a byte.
  [[nodiscard]] constexpr int read(std::uint8_t byte, index_t place) const noexcept {
    const int code = (byte >> (place * bits)) & ((1 << bits) - 1);
    return is_signed && code > highest() ? code - (1 << bits) : code;
  }
  /// The number that code number `place` of a byte stands for before scale and zero point.
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD constexpr Real number(std::uint8_t byte, index_t place) const noexcept {
    return e4m3 ? static_cast<Real>(e4m3_to_float(byte)) : static_cast<Real>(read(byte, place));
  }
  /// The byte with code number `place` replaced.
  [[nodiscard]] constexpr std::uint8_t write(std::uint8_t byte, index_t place, int code) const noexcept {
    const int mask = ((1 << bits) - 1) << (place * bits);
    return static_cast<std::uint8_t>((byte & ~mask) | ((code << (place * bits)) & mask));
  }
  /// Fails on a number of bits other than 2, 4 and 8, and other than 8 for e4m3.
  [[nodiscard]] status check() const noexcept {
    if (e4m3 && bits != 8) return status::error(errc::invalid_argument, "e4m3 codes have %d bits, must have 8", bits);
    if (bits == 2 || bits == 4 || bits == 8) return {};
    return status::error(errc::invalid_argument, "codes have %d bits, must have 2, 4 or 8", bits);
  }
};

/// What the numbers of a group share: value = scale * (code - zero) + offset.
template <element Scale>
struct group_parameters {
  Scale scale = Scale(0.0f);   ///< step between codes
  Scale zero = Scale(0.0f);    ///< the code of `offset`
  Scale offset = Scale(0.0f);  ///< the value at `zero`

  /// The value of a code.
  template <std::floating_point Real>
  [[nodiscard]] constexpr Real value(int code) const noexcept {
    return value_at(static_cast<Real>(code));
  }
  /// The value at a code or between codes.
  template <std::floating_point Real>
  [[nodiscard]] constexpr Real value_at(Real code) const noexcept {
    return widen<Real>(scale) * (code - widen<Real>(zero)) + widen<Real>(offset);
  }
};

/// What a cache stores beside the scale.
enum class quantisation_kind {
  symmetric,  ///< nothing
  zero,       ///< a zero point
  offset,     ///< an offset
};

namespace detail {

template <element Scale>
[[nodiscard]] constexpr double largest_finite() noexcept {
  if constexpr (std::is_same_v<Scale, half>) {
    return 65504.0;
  } else if constexpr (std::is_same_v<Scale, bfloat16>) {
    return static_cast<double>(static_cast<float>(bfloat16::from_bits(0x7f7f)));
  } else {
    return static_cast<double>(std::numeric_limits<Scale>::max());
  }
}

template <element Scale>
[[nodiscard]] constexpr Scale saturated(double number) noexcept {
  return narrow<Scale>(std::clamp(number, -largest_finite<Scale>(), largest_finite<Scale>()));
}

}  // namespace detail

/// The range of a group's finite numbers, from which its parameters follow.
struct number_range {
  double low = std::numeric_limits<double>::infinity();    ///< the smallest so far
  double high = -std::numeric_limits<double>::infinity();  ///< the largest so far

  /// Takes a number in, unless it is not finite.
  constexpr void include(double number) noexcept {
    if (!(number - number == 0)) return;
    low = std::min(low, number);
    high = std::max(high, number);
  }
};

/// The parameters for numbers of a range; an empty range is that of zeros. Symmetric needs signed codes.
template <element Scale>
[[nodiscard]] RESTKV_HD group_parameters<Scale> fit_group(number_range range, const code_format& format,
                                                          quantisation_kind kind) noexcept {
  const double low = range.low <= range.high ? range.low : 0;
  const double high = range.low <= range.high ? range.high : 0;
  group_parameters<Scale> made;
  if (kind == quantisation_kind::symmetric) {
    made.scale = detail::saturated<Scale>(std::max(-low, high) / format.highest());
    return made;
  }
  const double steps = format.highest() - format.lowest();
  if (kind == quantisation_kind::offset) {
    made.scale = detail::saturated<Scale>(high / steps - low / steps);
    made.offset = detail::saturated<Scale>(low - format.lowest() * widen<double>(made.scale));
    return made;
  }
  const double from = std::min(low, 0.0);
  made.scale = detail::saturated<Scale>(std::max(high, 0.0) / steps - from / steps);
  const double step = widen<double>(made.scale);
  const double zero = step > 0 ? std::rint(format.lowest() - from / step) : format.lowest();
  made.zero = narrow<Scale>(std::clamp(zero, double(format.lowest()), double(format.highest())));
  return made;
}

/// The code nearest to a number, ties to the even one. Symmetric codes do not use the lowest, so that -x has the code
/// of x with its sign changed.
template <element Scale>
[[nodiscard]] RESTKV_HD int quantise_number(double number, const group_parameters<Scale>& group,
                                            const code_format& format, quantisation_kind kind) noexcept {
  const double lowest = kind == quantisation_kind::symmetric ? -format.highest() : format.lowest();
  const double step = widen<double>(group.scale);
  const double known = number == number ? number : 0;
  const double steps = step > 0 ? (known - widen<double>(group.offset)) / step : 0;
  return static_cast<int>(std::clamp(std::rint(steps + widen<double>(group.zero)), lowest, double(format.highest())));
}

}  // namespace restkv
