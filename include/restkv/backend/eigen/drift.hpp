// SPDX-License-Identifier: Apache-2.0
/// @file
/// The drift of attention over the window, by selection instead of sorting.
#pragma once

#include <restkv/backend/eigen/window_softmax.hpp>
#include <restkv/selection/top_k.hpp>

namespace restkv::eigen {

/// Sum of the positions of the `count` largest of `keys`; among equal keys the smaller position counts.
[[nodiscard]] inline double sum_of_top_positions(std::span<const std::uint32_t> keys, index_t count) noexcept {
  const auto length = static_cast<index_t>(keys.size());
  const auto pivot = find_pivot<std::uint32_t>(
      1, length, [&](index_t, index_t n) { return keys[static_cast<std::size_t>(n)]; }, count);
  index_t equal_left = pivot.equal;
  index_t sum = 0;
  for (index_t n = 0; n < length; ++n) {
    const std::uint32_t key = keys[static_cast<std::size_t>(n)];
    if (key > pivot.key || (key == pivot.key && equal_left-- > 0)) sum += n;
  }
  return static_cast<double>(sum);
}

}  // namespace restkv::eigen
