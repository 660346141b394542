// SPDX-License-Identifier: Apache-2.0
/// @file
/// The numbers of a problem, each a function of the seed and of its own index.
#pragma once

#include <restkv/verify/parity/problem.hpp>

#include <bit>
#include <cmath>
#include <limits>

namespace restkv::parity {

/// What a number belongs to.
enum class tensor_name : std::uint8_t { scores, query, key, value };

namespace detail {

/// About standard normal: the sum of four uniform numbers, scaled. Without a library's logarithm, so that it is the
/// same everywhere.
[[nodiscard]] constexpr double normal_of(std::uint64_t bits) noexcept {
  double sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<double>((bits >> (16 * i)) & 0xffffu) / 65536.0;
  return (sum - 2.0) * 1.7320508075688772;
}

}  // namespace detail

/// The score of token n in a row, for selections alone.
[[nodiscard]] inline float score_of(const problem& p, index_t row, index_t n) noexcept {
  using limits = std::numeric_limits<float>;
  const std::uint64_t bits = counter_bits(p.seed, static_cast<int>(tensor_name::scores), row, n);
  const auto normal = static_cast<float>(detail::normal_of(bits));
  const std::uint64_t choice = mix_bits(bits);
  switch (p.values) {
    case distribution::normal:
      return normal;
    case distribution::all_equal:
      return 1.5f;
    case distribution::five_values: {
      constexpr std::array values{-2.0f, -0.0f, 0.0f, 0.25f, 3.0f};
      return values[choice % values.size()];
    }
    case distribution::leading_bits:
      return std::bit_cast<float>(0x3f800000u | static_cast<std::uint32_t>(choice & 0x3fu));
    case distribution::dominant_token:
      return n == 0 ? 1e9f : std::fabs(normal) * 1e-9f;
    case distribution::mostly_minus_infinity:
      return choice % 10 == 0 ? normal : -limits::infinity();
    case distribution::huge:
      return normal * 1e38f;
    case distribution::non_finite:
      break;
  }
  switch (choice % 12) {
    case 0:
      return limits::quiet_NaN();
    case 1:
      return std::bit_cast<float>(0xffc12345u);  // a NaN with a sign and a payload
    case 2:
      return limits::infinity();
    case 3:
      return -limits::infinity();
    case 4:
      return -0.0f;
    case 5:
      return 0.0f;
    case 6:
      return limits::denorm_min() * static_cast<float>(bits & 7u);
    case 7:
      return -limits::denorm_min() * static_cast<float>(bits & 7u);
    default:
      return normal;
  }
}

/// Element [b, h, n, c] of a layer's tensor. Queries are finite in every distribution.
[[nodiscard]] inline double element_of_layer(const problem& p, tensor_name tensor, index_t b, index_t h, index_t n,
                                             index_t c) noexcept {
  using limits = std::numeric_limits<double>;
  const int which = static_cast<int>(tensor);
  const std::uint64_t bits = counter_bits(p.seed, which, b, h, n, c);
  const double normal = detail::normal_of(bits);
  // Queries share the signs of their channels where one kind of token is to have all or nothing of their attention.
  const double sign = (counter_bits(p.seed, 0x516e, c) & 1u) != 0 ? 1.0 : -1.0;
  if (tensor == tensor_name::query) {
    const bool aimed = p.values == distribution::dominant_token || p.values == distribution::mostly_minus_infinity;
    return aimed ? sign * (0.5 + std::fabs(normal) / 2) : 1.5 * normal;
  }
  const std::uint64_t of_token = counter_bits(p.seed, 0x70c, b, h, n);  // the same for key and value
  switch (p.values) {
    case distribution::normal:
      return normal;
    case distribution::all_equal:
      return detail::normal_of(counter_bits(p.seed, which, b, h, c));
    case distribution::five_values:
      return detail::normal_of(counter_bits(p.seed, which, b, h, of_token % 5, c));
    case distribution::leading_bits:
      return detail::normal_of(counter_bits(p.seed, which, b, h, c)) * (1.0 + 0x1p-9 * normal);
    case distribution::dominant_token:
      // A logit of 25 or so, whatever head_dim is.
      if (tensor == tensor_name::key && n == 0) return sign * 28.0 / std::sqrt(static_cast<double>(p.head_dim));
      return normal / (tensor == tensor_name::key ? std::sqrt(static_cast<double>(p.head_dim)) : 1.0);
    case distribution::mostly_minus_infinity:
      return tensor == tensor_name::key && of_token % 10 != 0 ? -1e4 * sign : normal;
    case distribution::huge:
      return tensor == tensor_name::key ? normal : normal * (p.type == element_type::float16 ? 1e4 : 1e15);
    case distribution::non_finite:
      break;
  }
  const std::uint64_t choice = mix_bits(bits);
  if (of_token % 8 != 0) return choice % 16 == 0 ? -0.0 : choice % 16 == 1 ? 1e-40 : normal;
  if (choice % 4 != 0) return normal;
  const std::uint64_t kind = (choice >> 8) % 4;
  return kind == 0 ? limits::infinity() : kind == 1 ? -limits::infinity() : limits::quiet_NaN();
}

}  // namespace restkv::parity
