// SPDX-License-Identifier: Apache-2.0
/// @file
/// The one matrix kernel of the Eigen backend, on Eigen's packet layer so that it follows whatever instruction set the
/// program is compiled for.
#pragma once

#include <restkv/core/config.hpp>

#include <Eigen/Core>

#include <cmath>
#include <limits>

namespace restkv::eigen {

using packet = Eigen::internal::packet_traits<float>::type;
/// Floats in a vector register: 16 with AVX-512, 8 with AVX, 4 with SSE and NEON.
inline constexpr index_t packet_size = Eigen::internal::packet_traits<float>::size;

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // packets as template arguments
#endif

/// The smallest exponent whose exponential `exponential` computes; below it is 0.
inline constexpr float least_exponent = -87.0f;

/// e^x, 0 for x < least_exponent, e^88 beyond 88; within 3 units in the last place. x must not be NaN. A third of the
/// instructions of Eigen's pexp, which also serves subnormal results: exponentials are half of the cost of attention
/// once the products run at full speed.
///
/// x = n ln 2 + r, |r| <= ln(2) / 2; e^r = 1 + r + r^2 q(r), q of degree 4 fitted for the relative error (3e-9); 2^n by
/// adding n to the exponent's bits.
[[nodiscard]] EIGEN_ALWAYS_INLINE packet exponential(const packet& x) noexcept {
  using namespace Eigen::internal;
  if constexpr (packet_size == 1) {
    return pexp(x);
  } else {
    using bits = unpacket_traits<packet>::integer_packet;
    const packet clamped = pmin(pmax(x, pset1<packet>(least_exponent)), pset1<packet>(88.0f));
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits of the sum.
    const packet rounder = pset1<packet>(12582912.0f);
    const packet shifted = pmadd(clamped, pset1<packet>(1.44269504f), rounder);
    const packet n = psub(shifted, rounder);
    const packet coarse = pmadd(n, pset1<packet>(-0.693145751953125f), clamped);  // 15 bits of ln 2: exact
    const packet r = pmadd(n, pset1<packet>(-1.42860682e-6f), coarse);
    packet q = pmadd(r, pset1<packet>(0.0013814599f), pset1<packet>(0.008368717f));
    q = pmadd(q, r, pset1<packet>(0.04166839f));
    q = pmadd(q, r, pset1<packet>(0.16666521f));
    q = pmadd(q, r, pset1<packet>(0.49999994f));
    const packet mantissa = padd(pmadd(pmul(r, r), q, r), pset1<packet>(1.0f));
    const bits exponent = plogical_shift_left<23>(preinterpret<bits>(shifted));
    const packet result = preinterpret<packet>(padd(preinterpret<bits>(mantissa), exponent));
    return pandnot(result, pcmp_lt(x, pset1<packet>(least_exponent)));
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

/// Rows and vectors of a register tile. 32 registers hold 12 x 2 sums, 16 hold 6 x 2; with two vectors a row each loaded
/// scalar serves two multiply-adds, and 12 independent sums cover the latency of a multiply-add.
inline constexpr index_t tile_rows = packet_size >= 16 ? 12 : 6;
inline constexpr index_t tile_vectors = 2;

/// Lanes rounded up to whole vectors.
[[nodiscard]] constexpr index_t padded_lanes(index_t lanes) noexcept {
  return (lanes + packet_size - 1) / packet_size * packet_size;
}

/// A matrix whose elements are broadcast one by one: element (m, k) at data[m * row + k * column].
struct broadcast_matrix {
  const float* data;
  index_t row;
  index_t column;
};

namespace detail {

template <index_t Rows, index_t Vectors, bool Accumulate>
EIGEN_ALWAYS_INLINE void register_tile(const broadcast_matrix& a, const float* b, index_t b_row, index_t depth,
                                       float* c, index_t c_row) noexcept {
  using namespace Eigen::internal;
  packet sums[Rows][Vectors];
  for (index_t m = 0; m < Rows; ++m) {
    for (index_t v = 0; v < Vectors; ++v) {
      sums[m][v] = Accumulate ? ploadu<packet>(c + m * c_row + v * packet_size) : pset1<packet>(0.0f);
    }
  }
  const float* left = a.data;
  for (index_t k = 0; k < depth; ++k) {
    packet right[Vectors];
    for (index_t v = 0; v < Vectors; ++v) right[v] = ploadu<packet>(b + v * packet_size);
    for (index_t m = 0; m < Rows; ++m) {
      const packet scalar = pset1<packet>(left[m * a.row]);
      for (index_t v = 0; v < Vectors; ++v) sums[m][v] = pmadd(scalar, right[v], sums[m][v]);
    }
    left += a.column;
    b += b_row;
  }
  for (index_t m = 0; m < Rows; ++m) {
    for (index_t v = 0; v < Vectors; ++v) pstoreu(c + m * c_row + v * packet_size, sums[m][v]);
  }
}

template <index_t Vectors, bool Accumulate>
void lane_block(const broadcast_matrix& a, index_t rows, const float* b, index_t b_row, index_t depth, float* c,
                index_t c_row) noexcept {
  index_t m = 0;
  for (; m + tile_rows <= rows; m += tile_rows) {
    register_tile<tile_rows, Vectors, Accumulate>({a.data + m * a.row, a.row, a.column}, b, b_row, depth,
                                                  c + m * c_row, c_row);
  }
  if constexpr (tile_rows > 8) {
    for (; m + 8 <= rows; m += 8) {
      register_tile<8, Vectors, Accumulate>({a.data + m * a.row, a.row, a.column}, b, b_row, depth, c + m * c_row,
                                            c_row);
    }
  }
  for (; m + 4 <= rows; m += 4) {
    register_tile<4, Vectors, Accumulate>({a.data + m * a.row, a.row, a.column}, b, b_row, depth, c + m * c_row,
                                          c_row);
  }
  for (; m < rows; ++m) {
    register_tile<1, Vectors, Accumulate>({a.data + m * a.row, a.row, a.column}, b, b_row, depth, c + m * c_row,
                                          c_row);
  }
}

}  // namespace detail

/// c[m][lane] = sum over k of a(m, k) * b[k][lane], or += with Accumulate, for `rows` rows and `lanes` lanes, a
/// multiple of packet_size. The sum over k is sequential for every element, whatever the tile it falls in: a result
/// does not depend on which other rows are computed with it.
///
/// `b` and `c` have unit-stride lanes and row strides b_row and c_row; nothing need be aligned. b stays in the
/// first-level cache when depth * 2 vectors do. Cost: rows * lanes * depth multiply-adds at about nine tenths of peak.
template <bool Accumulate = false>
void multiply(const broadcast_matrix& a, index_t rows, const float* b, index_t b_row, index_t lanes, index_t depth,
              float* c, index_t c_row) noexcept {
  index_t lane = 0;
  for (; lane + tile_vectors * packet_size <= lanes; lane += tile_vectors * packet_size) {
    detail::lane_block<tile_vectors, Accumulate>(a, rows, b + lane, b_row, depth, c + lane, c_row);
  }
  for (; lane < lanes; lane += packet_size) {
    detail::lane_block<1, Accumulate>(a, rows, b + lane, b_row, depth, c + lane, c_row);
  }
}

/// sum over `lanes` (a multiple of packet_size) of a[i] * b[i]; the order depends on packet_size alone.
[[nodiscard]] EIGEN_ALWAYS_INLINE float dot(const float* a, const float* b, index_t lanes) noexcept {
  using namespace Eigen::internal;
  packet sum = pset1<packet>(0.0f);
  for (index_t i = 0; i < lanes; i += packet_size) sum = pmadd(ploadu<packet>(a + i), ploadu<packet>(b + i), sum);
  return predux(sum);
}

/// The root of the largest float: what a distance counts as whose square is infinite.
inline constexpr float most_distance = 1.8446743e19f;

/// The root of a square: 0 below 0, at most most_distance; NaN stays NaN.
[[nodiscard]] EIGEN_ALWAYS_INLINE float root(float square) noexcept {
  const float x = std::sqrt(square < 0.0f ? 0.0f : square);
  return x > most_distance ? most_distance : x;
}

/// The roots of `lanes` squares, a multiple of packet_size.
inline void square_roots(const float* x, index_t lanes, float* out) noexcept {
  using namespace Eigen::internal;
  const packet most = pset1<packet>(std::numeric_limits<float>::max());  // Eigen's root of infinity is NaN
  for (index_t i = 0; i < lanes; i += packet_size) {
    pstoreu(out + i, psqrt(pmin(pmax(ploadu<packet>(x + i), pset1<packet>(0.0f)), most)));
  }
}

/// sum over `lanes` (a multiple of packet_size) of (a[i] - b[i])^2.
[[nodiscard]] EIGEN_ALWAYS_INLINE float squared_distance(const float* a, const float* b, index_t lanes) noexcept {
  using namespace Eigen::internal;
  packet sum = pset1<packet>(0.0f);
  for (index_t i = 0; i < lanes; i += packet_size) {
    const packet difference = psub(ploadu<packet>(a + i), ploadu<packet>(b + i));
    sum = pmadd(difference, difference, sum);
  }
  return predux(sum);
}

}  // namespace restkv::eigen
