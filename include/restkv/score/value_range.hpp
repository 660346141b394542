// SPDX-License-Identifier: Apache-2.0
/// @file
/// `value_range`: tokens whose value has a large spread between its channels.
#pragma once

#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <limits>

namespace restkv {

/// score = max_c v[c] - min_c v[c], the range by which VaSE (arXiv 2606.03928) finds values that must not be lost: it
/// keeps the 200 tokens of the largest range besides the sinks.
///
/// A value with a NaN scores NaN and touches no other token. Cost: one pass over the values, 2 d comparisons a token;
/// scratch of one row.
struct value_range {
  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::values;

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept { return shape.head_dim; }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const std::span<Real> value = scratch.first(static_cast<std::size_t>(head.head_dim()));
    for (index_t n = 0; n < head.length(); ++n) {
      head.value(n, value);
      scores[static_cast<std::size_t>(n)] = range(value.data(), head.head_dim());
    }
  }
  ///@}

 private:
  template <std::floating_point Real>
  [[nodiscard]] static Real range(const Real* row, index_t channels) noexcept {
    if (channels == 0) return 0;
    Real low[row_lanes];
    Real high[row_lanes];
    std::fill(low, low + row_lanes, row[0]);
    std::fill(high, high + row_lanes, row[0]);
    const auto take = [&](index_t j, Real x) {
      low[j] = x < low[j] ? x : low[j];
      high[j] = x > high[j] ? x : high[j];
    };
    index_t c = 0;
    for (; c + row_lanes <= channels; c += row_lanes) {
      for (index_t j = 0; j < row_lanes; ++j) take(j, row[c + j]);
    }
    for (index_t j = 0; c + j < channels; ++j) take(j, row[c + j]);
    const auto is_nan = [=](index_t i) { return row[i] == row[i] ? Real(0) : Real(1); };
    const Real missing = detail::sum_in_lanes<Real>(channels, is_nan);
    if (missing > 0) return std::numeric_limits<Real>::quiet_NaN();
    return *std::max_element(high, high + row_lanes) - *std::min_element(low, low + row_lanes);
  }
};

}  // namespace restkv
