// SPDX-License-Identifier: Apache-2.0
/// @file
/// Exact, deterministic top-k by radix: the pivot of one row or of several together, and the positions above it.
#pragma once

#include <restkv/core/tensor_view.hpp>
#include <restkv/selection/order_key.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <span>

namespace restkv {

/// The k-th largest key and what it takes to split a set there.
template <std::unsigned_integral Key>
struct top_k_pivot {
  Key key = 0;          ///< keys above it are in; 0 when everything is in
  index_t greater = 0;  ///< keys above `key`
  index_t equal = 0;    ///< how many keys equal to it are in as well, in order of index
};

/// Finds the k-th largest of the keys key_at(row, n), all rows taken together; excluded keys (0) never count. With k
/// at or above the number of keys everything is in. Digits of 11 bits, from the top: 3 passes over float keys, 6 over
/// double; a pass after the first only counts keys with the same leading digits. Allocates nothing (a 16 KB histogram
/// on the stack).
template <std::unsigned_integral Key, std::invocable<index_t, index_t> KeyAt>
[[nodiscard]] top_k_pivot<Key> find_pivot(index_t rows, index_t length, const KeyAt& key_at, index_t k) noexcept {
  constexpr int key_bits = 8 * sizeof(Key);
  constexpr int digit_bits = 11;
  constexpr index_t digits = index_t(1) << digit_bits;
  if (k <= 0) return {static_cast<Key>(~Key(0)), 0, 0};
  std::array<index_t, static_cast<std::size_t>(digits)> histogram;
  Key prefix = 0;
  Key prefix_mask = 0;
  index_t wanted = k;  // the rank that is left to find among the keys that share the prefix
  for (int high = key_bits; high > 0;) {
    const int width = std::min(digit_bits, high);
    const int low = high - width;
    const Key digit_mask = static_cast<Key>((Key(1) << width) - 1);
    histogram.fill(0);
    for (index_t r = 0; r < rows; ++r) {
      for (index_t n = 0; n < length; ++n) {
        const Key key = key_at(r, n);
        if ((key & prefix_mask) == prefix && key != excluded_key) {
          ++histogram[static_cast<std::size_t>((key >> low) & digit_mask)];
        }
      }
    }
    index_t digit = static_cast<index_t>(digit_mask);
    for (; digit > 0 && histogram[static_cast<std::size_t>(digit)] < wanted; --digit) {
      wanted -= histogram[static_cast<std::size_t>(digit)];
    }
    if (const index_t lowest = histogram[static_cast<std::size_t>(digit)]; lowest < wanted) {
      return {0, k - wanted + lowest, 0};  // fewer than k keys
    }
    prefix = static_cast<Key>(prefix | (static_cast<Key>(digit) << low));
    prefix_mask = static_cast<Key>(prefix_mask | (digit_mask << low));
    high = low;
  }
  return {prefix, k - wanted, wanted};
}

/// The same over rows of keys in memory.
template <std::unsigned_integral Key>
[[nodiscard]] top_k_pivot<Key> find_pivot(tensor_view<const Key, 2> rows, index_t k) noexcept {
  return find_pivot<Key>(
      rows.extent(0), rows.extent(1), [&](index_t r, index_t n) { return rows(r, n); }, k);
}

/// Writes the indices of the k largest keys of a row, ascending; among equal keys the smaller index wins. Excluded
/// keys are never chosen, so fewer than k may be written: the count is returned. `out` holds at least
/// min(k, keys.size()) entries. Cost: `find_pivot` and one pass.
template <std::unsigned_integral Key>
index_t top_k(std::span<const Key> keys, index_t k, position_t* out) noexcept {
  const auto length = static_cast<index_t>(keys.size());
  const auto pivot = find_pivot<Key>(tensor_view<const Key, 2>(keys.data(), {1, length}), k);
  index_t written = 0;
  index_t equal_left = pivot.equal;
  for (index_t n = 0; n < length; ++n) {
    const Key key = keys[static_cast<std::size_t>(n)];
    if (key == excluded_key) continue;
    if (key > pivot.key || (key == pivot.key && equal_left-- > 0)) out[written++] = static_cast<position_t>(n);
  }
  return written;
}

}  // namespace restkv
