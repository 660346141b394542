// SPDX-License-Identifier: Apache-2.0
/// @file
/// Matrix products and exponentials over blocks of lanes, one lane per query, with nothing but the standard library.
///
/// Loops have a fixed number of lanes, so that compilers keep them in vector registers; every element is summed in a
/// fixed order, whatever else is computed with it.
#pragma once

#include <restkv/core/config.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

namespace restkv::detail {

/// Lanes of a block; rows of lanes are padded to a multiple.
inline constexpr index_t set_lanes = 16;

/// `count` rounded up to whole blocks of lanes.
[[nodiscard]] constexpr index_t padded_set_lanes(index_t count) noexcept {
  return (count + set_lanes - 1) / set_lanes * set_lanes;
}

/// Elements (m, k) at data[m * row + k * column].
struct lane_factor {
  const float* data;
  index_t row;
  index_t column;
};

#if defined(__GNUC__)
/// A block of lanes as compilers with vector types keep it in registers: GCC does not find that out from loops.
using lane_block_vector [[gnu::vector_size(sizeof(float) * set_lanes)]] = float;
#endif

/// One block of lanes of `lane_product` for a few rows.
template <index_t Rows>
void lane_product_rows(const lane_factor& a, const float* b, index_t b_row, index_t depth, float* c, index_t c_row,
                       bool accumulate) noexcept {
  const float* left = a.data;
#if defined(__GNUC__)
  lane_block_vector sums[Rows] = {};
  for (index_t m = 0; accumulate && m < Rows; ++m) std::memcpy(&sums[m], c + m * c_row, sizeof sums[m]);
  for (index_t k = depth; k > 0; --k, left += a.column, b += b_row) {
    lane_block_vector right;
    std::memcpy(&right, b, sizeof right);
    for (index_t m = 0; m < Rows; ++m) sums[m] += left[m * a.row] * right;
  }
  for (index_t m = 0; m < Rows; ++m) std::memcpy(c + m * c_row, &sums[m], sizeof sums[m]);
#else
  float sums[Rows][set_lanes] = {};
  for (index_t m = 0; accumulate && m < Rows; ++m) std::copy_n(c + m * c_row, set_lanes, sums[m]);
  for (index_t k = depth; k > 0; --k, left += a.column, b += b_row) {
    for (index_t m = 0; m < Rows; ++m) {
      for (index_t j = 0; j < set_lanes; ++j) sums[m][j] += left[m * a.row] * b[j];
    }
  }
  for (index_t m = 0; m < Rows; ++m) std::copy_n(sums[m], set_lanes, c + m * c_row);
#endif
}

/// c[m][lane] = sum over k of a(m, k) b[k][lane], or += with `accumulate`. `lanes` is a multiple of set_lanes.
/// Cost: rows * lanes * depth multiply-adds.
inline void lane_product(const lane_factor& a, index_t rows, const float* b, index_t b_row, index_t lanes,
                         index_t depth, float* c, index_t c_row, bool accumulate = false) noexcept {
  for (index_t block = lanes / set_lanes; block > 0; --block, b += set_lanes, c += set_lanes) {
    index_t m = 0;
    for (; m < rows / 4 * 4; m += 4) {
      lane_product_rows<4>({a.data + m * a.row, a.row, a.column}, b, b_row, depth, c + m * c_row, c_row, accumulate);
    }
    for (; m < rows; ++m) {
      lane_product_rows<1>({a.data + m * a.row, a.row, a.column}, b, b_row, depth, c + m * c_row, c_row, accumulate);
    }
  }
}

/// e^x for x <= 0, 0 below -87; within a few units in the last place. x must not be NaN.
[[nodiscard]] inline float lane_exponential(float x) noexcept {
  constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + rounder;
  const float n = shifted - rounder;
  const float r = (clamped - n * 0.693145751953125f) - n * 1.42860682e-6f;
  float q = 1.0f / 720;  // e^r, |r| <= ln(2) / 2, by its series; the next term is below 2^-23
  q = q * r + 1.0f / 120;
  q = q * r + 1.0f / 24;
  q = q * r + 1.0f / 6;
  q = q * r + 0.5f;
  const float mantissa = q * r * r + r + 1.0f;
  const auto exponent = std::bit_cast<std::uint32_t>(shifted) << 23;
  const float power = std::bit_cast<float>(std::bit_cast<std::uint32_t>(mantissa) + exponent);
  return x < -87.0f ? 0.0f : power;
}

}  // namespace restkv::detail
