// SPDX-License-Identifier: Apache-2.0
/// @file
/// Products and sums of sizes that somebody else gave: they stop at the largest number instead of overflowing.
#pragma once

#include <restkv/core/config.hpp>

namespace restkv::detail {

/// The number at which sizes stop: no memory has so many elements.
inline constexpr index_t too_many = INT64_MAX;

/// a * b of two sizes; 0 where one is 0 or below.
[[nodiscard]] RESTKV_HD constexpr index_t saturated_product(index_t a, index_t b) noexcept {
  if (a <= 0 || b <= 0) return 0;
  return a > too_many / b ? too_many : a * b;
}

/// a + b of two sizes.
[[nodiscard]] RESTKV_HD constexpr index_t saturated_sum(index_t a, index_t b) noexcept {
  return a > 0 && b > too_many - a ? too_many : a + b;
}

}  // namespace restkv::detail
