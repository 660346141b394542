// SPDX-License-Identifier: Apache-2.0
/// @file
/// `value_range`: tokens whose value has a large spread between its channels.
#pragma once

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
      Real low = value.empty() ? Real(0) : value[0];
      Real high = low;
      bool numbers = true;
      for (const Real x : value) {
        low = std::min(low, x);
        high = std::max(high, x);
        numbers = numbers && x == x;
      }
      scores[static_cast<std::size_t>(n)] = numbers ? high - low : std::numeric_limits<Real>::quiet_NaN();
    }
  }
  ///@}
};

}  // namespace restkv
