// SPDX-License-Identifier: Apache-2.0
/// @file
/// Element types of queries, keys and values: float, double, `half` (IEEE binary16) and `bfloat16`.
///
/// `half` and `bfloat16` are storage types: they convert to and from float, and all arithmetic is done in float. The
/// conversions are written with integers, so they work on every compiler; a compiler that has `_Float16` gets the
/// machine instruction instead. Both round to nearest, ties to even, and keep NaN, infinities, -0 and subnormals.
#pragma once

#include <restkv/core/config.hpp>

#include <bit>
#include <concepts>
#include <type_traits>

namespace restkv {

namespace detail {

RESTKV_HD constexpr float half_bits_to_float(std::uint16_t h) noexcept {
  const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1fu;
  std::uint32_t fraction = h & 0x3ffu;
  if (exponent == 0x1fu) return std::bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {
    // A subnormal half is fraction * 2^-24, exactly representable in float.
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-08f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
  }
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

RESTKV_HD constexpr std::uint16_t float_to_half_bits(float value) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN, made quiet
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                                                    // below 2^-14: subnormal or zero
    if (magnitude < 0x33000000u) return sign;                                       // below half of 2^-24
    const std::uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t shift = 126u - (magnitude >> 23);  // 14 .. 24
    const std::uint32_t kept = fraction >> shift;
    const std::uint32_t rest = fraction & ((1u << shift) - 1u);
    const std::uint32_t middle = 1u << (shift - 1u);
    return static_cast<std::uint16_t>(sign | (kept + ((rest > middle || (rest == middle && (kept & 1u))) ? 1u : 0u)));
  }
  const std::uint32_t rebased = magnitude - 0x38000000u;
  const std::uint32_t rounded = rebased + 0xfffu + ((rebased >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

RESTKV_HD constexpr float bfloat16_bits_to_float(std::uint16_t b) noexcept {
  return std::bit_cast<float>(std::uint32_t(b) << 16);
}

RESTKV_HD constexpr std::uint16_t float_to_bfloat16_bits(float value) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // NaN, made quiet
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace detail

/// IEEE 754 binary16, 2 bytes, the layout of `__half` and of safetensors' F16.
class half {
 public:
  half() = default;
  /// Rounds to nearest, ties to even.
  RESTKV_HD constexpr explicit half(float value) noexcept : bits_(detail::float_to_half_bits(value)) {}
  /// The number with these 16 bits.
  RESTKV_HD static constexpr half from_bits(std::uint16_t bits) noexcept {
    half h{};
    h.bits_ = bits;
    return h;
  }
  /// The 16 bits.
  [[nodiscard]] RESTKV_HD constexpr std::uint16_t bits() const noexcept { return bits_; }
  /// Exact.
  RESTKV_HD constexpr explicit operator float() const noexcept {
#if defined(__FLT16_MANT_DIG__) && defined(__F16C__) && !defined(__CUDACC__)
    if (!std::is_constant_evaluated()) return static_cast<float>(std::bit_cast<_Float16>(bits_));
#endif
    return detail::half_bits_to_float(bits_);
  }

 private:
  std::uint16_t bits_;
};

/// bfloat16: the upper 16 bits of a float, 2 bytes, the layout of `__nv_bfloat16` and of safetensors' BF16.
class bfloat16 {
 public:
  bfloat16() = default;
  /// Rounds to nearest, ties to even.
  RESTKV_HD constexpr explicit bfloat16(float value) noexcept : bits_(detail::float_to_bfloat16_bits(value)) {}
  /// The number with these 16 bits.
  RESTKV_HD static constexpr bfloat16 from_bits(std::uint16_t bits) noexcept {
    bfloat16 b{};
    b.bits_ = bits;
    return b;
  }
  /// The 16 bits.
  [[nodiscard]] RESTKV_HD constexpr std::uint16_t bits() const noexcept { return bits_; }
  /// Exact.
  RESTKV_HD constexpr explicit operator float() const noexcept { return detail::bfloat16_bits_to_float(bits_); }

 private:
  std::uint16_t bits_;
};

static_assert(sizeof(half) == 2 && std::is_trivially_copyable_v<half>);
static_assert(sizeof(bfloat16) == 2 && std::is_trivially_copyable_v<bfloat16>);

namespace detail {
template <class T>
inline constexpr bool is_float_double_half_or_bfloat16 =
    std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, half> || std::is_same_v<T, bfloat16>;
}  // namespace detail

/// The element types a cache may have. double is for oracles and tests; it is not supported on a GPU.
template <class T>
concept element = detail::is_float_double_half_or_bfloat16<std::remove_cv_t<T>>;

/// `value` as `Real`, exactly (every element type widens to float or double; double narrows to float).
template <std::floating_point Real, element T>
RESTKV_HD constexpr Real widen(T value) noexcept {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<Real>(value);
  } else {
    return static_cast<Real>(static_cast<float>(value));
  }
}

namespace detail {

/// `value` as a float that rounds to 16 bits as `value` itself does: cut towards zero, and its last bit set where
/// something was cut, so that what a second rounding takes for a tie is one ("rounding to odd").
RESTKV_HD constexpr float narrow_to_odd(double value) noexcept {
  const auto nearest = static_cast<float>(value);
  const auto back = static_cast<double>(nearest);
  if (back == value || value != value) return nearest;
  std::uint32_t bits = std::bit_cast<std::uint32_t>(nearest);
  if (value < 0 ? back < value : back > value) --bits;
  return std::bit_cast<float>(bits | 1u);
}

}  // namespace detail

/// `value` rounded to element type `T`, to nearest, ties to even.
template <element T, std::floating_point Real>
RESTKV_HD constexpr T narrow(Real value) noexcept {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(value);
  } else if constexpr (sizeof(Real) > sizeof(float)) {
    return T(detail::narrow_to_odd(static_cast<double>(value)));
  } else {
    return T(value);
  }
}

}  // namespace restkv
