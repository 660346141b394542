// SPDX-License-Identifier: Apache-2.0
/// @file
/// Rows of channels: widening, and dot products and norms with several partial sums in a fixed order.
///
/// The partial sums let a compiler use vector registers without being allowed to reorder additions, and make a result
/// depend on nothing but its row.
#pragma once

#include <restkv/core/dtype.hpp>
#include <restkv/core/tensor_view.hpp>

#include <cmath>
#include <bit>
#include <concepts>
#include <limits>
#include <type_traits>

namespace restkv {

/// Partial sums of a row: element c goes to sum c modulo this number.
inline constexpr index_t row_lanes = 16;

/// `count` elements from `row` into `out`: `widen` of each, in a form that vector units execute. [count]
template <element T, std::floating_point Real>
void widen_row(const T* row, Real* out, index_t count) noexcept {
  if constexpr (std::is_same_v<T, half>) {
    for (index_t c = 0; c < count; ++c) {
      const std::uint32_t bits = row[c].bits();
      const std::uint32_t magnitude = bits & 0x7fffu;
      // The exponents' biases differ by 112. Infinity and NaN get the largest exponent instead.
      const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
      const std::uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
      out[c] = static_cast<Real>(
          std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | special | ((bits & 0x8000u) << 16)));
    }
  } else {
    for (index_t c = 0; c < count; ++c) out[c] = widen<Real>(row[c]);
  }
}

/// The same for a row of any stride. [row.extent(0)]
template <class T, std::floating_point Real>
void widen_row(const tensor_view<T, 1>& row, Real* out) noexcept {
  if (row.stride(0) == 1) return widen_row(row.data, out, row.extent(0));
  for (index_t c = 0; c < row.extent(0); ++c) out[c] = widen<Real>(row(c));
}

namespace detail {

/// The sum of term(c) over [0, count) by `row_lanes` partial sums, which are added up in a tree.
template <std::floating_point Real, class Term>
[[nodiscard]] Real sum_in_lanes(index_t count, const Term& term) noexcept {
  Real lanes[row_lanes] = {};
  index_t c = 0;
  for (; c + row_lanes <= count; c += row_lanes) {
    for (index_t j = 0; j < row_lanes; ++j) lanes[j] += term(c + j);
  }
  for (index_t j = 0; c + j < count; ++j) lanes[j] += term(c + j);
  for (index_t half = row_lanes / 2; half > 0; half /= 2) {
    for (index_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

}  // namespace detail

/// The sum of x[c] y[c]. [count], [count]
template <std::floating_point Real>
[[nodiscard]] Real dot(const Real* x, const Real* y, index_t count) noexcept {
  return detail::sum_in_lanes<Real>(count, [=](index_t c) { return x[c] * y[c]; });
}

/// The sum of x[c]^2; infinite or 0 where a square leaves the range of Real. [count]
template <std::floating_point Real>
[[nodiscard]] Real squared_norm(const Real* x, index_t count) noexcept {
  return detail::sum_in_lanes<Real>(count, [=](index_t c) { return x[c] * x[c]; });
}

/// The sum of |x[c]|. [count]
template <std::floating_point Real>
[[nodiscard]] Real l1_norm(const Real* x, index_t count) noexcept {
  return detail::sum_in_lanes<Real>(count, [=](index_t c) { return std::fabs(x[c]); });
}

/// The root of the sum of x[c]^2, also where the squares leave the range of Real. In double, because the norm of finite
/// floats may pass the largest float. Infinite with an infinity, NaN with a NaN among the elements. [count]
template <std::floating_point Real>
[[nodiscard]] double norm(const Real* x, index_t count) noexcept {
  using limits = std::numeric_limits<Real>;
  const Real squares = squared_norm(x, count);
  if (squares >= limits::min() / (limits::epsilon() * limits::epsilon()) && squares <= limits::max()) {
    return std::sqrt(static_cast<double>(squares));
  }
  if (squares != squares) return static_cast<double>(squares);
  double largest = 0;
  for (index_t c = 0; c < count; ++c) {
    const double size = std::fabs(static_cast<double>(x[c]));
    largest = size > largest ? size : largest;
  }
  if (largest == 0 || largest > std::numeric_limits<double>::max()) return largest;
  return largest * std::sqrt(detail::sum_in_lanes<double>(count, [=](index_t c) {
           const double part = static_cast<double>(x[c]) / largest;
           return part * part;
         }));
}

/// 1 / ||x||; 0 for a row that is 0 or too short for its inverse to be a Real, NaN for one that is not finite. [count]
template <std::floating_point Real>
[[nodiscard]] double inverse_norm(const Real* x, index_t count) noexcept {
  const double length = norm(x, count);
  if (!(length <= std::numeric_limits<double>::max())) return std::numeric_limits<double>::quiet_NaN();
  return length >= static_cast<double>(std::numeric_limits<Real>::min()) ? 1 / length : 0;
}

/// True when no element is infinite or NaN. [count]
template <std::floating_point Real>
[[nodiscard]] bool all_finite(const Real* x, index_t count) noexcept {
  // 0 * x is 0 for what is finite and NaN for the rest.
  return detail::sum_in_lanes<Real>(count, [=](index_t c) { return Real(0) * x[c]; }) == 0;
}

}  // namespace restkv
