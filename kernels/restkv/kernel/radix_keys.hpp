// SPDX-License-Identifier: Apache-2.0
/// @file
/// What the kernels of a batched top-k share: how a block walks the keys of a row, and the digits of a radix select.
#pragma once

#include <restkv/backend/bulk.hpp>
#include <restkv/kernel/group.hpp>

#include <algorithm>
#include <array>

namespace restkv::kernel {

/// What may be tuned in a batched top-k. Nothing of it changes a result.
struct radix_tuning {
  index_t blocks_to_fill = 264;        ///< blocks that keep the device busy: two a multiprocessor
  index_t least_keys_of_block = 8192;  ///< a row is not split into smaller pieces
};

/// The tuning for an architecture, by its number (80, 90, 100).
[[nodiscard]] constexpr radix_tuning radix_tuning_for(int architecture) noexcept {
  if (architecture >= 100) return {.blocks_to_fill = 2 * 148, .least_keys_of_block = 8192};
  if (architecture >= 90) return {.blocks_to_fill = 2 * 132, .least_keys_of_block = 8192};
  return {.blocks_to_fill = 2 * 108, .least_keys_of_block = 8192};
}

/// A key's digits: 11, 11 and 10 bits, from the top.
struct radix_digit {
  static constexpr int most_bits = 11;
  static constexpr int bins = 1 << most_bits;
  static constexpr int passes = 3;

  int pass = 0;

  /// The lowest bit of the digit.
  [[nodiscard]] RESTKV_HD constexpr int low() const noexcept { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }
  /// The digit of a key.
  [[nodiscard]] RESTKV_HD constexpr std::uint32_t of(std::uint32_t key) const noexcept {
    return key >> low() & (pass == 2 ? 0x3ffu : 0x7ffu);
  }
  /// True for a key that counts and has the leading digits of `prefix`.
  [[nodiscard]] RESTKV_HD constexpr bool follows(std::uint32_t key, std::uint32_t prefix) const noexcept {
    return key != excluded_key && (pass == 0 || key >> (pass == 1 ? 21 : 10) == prefix >> (pass == 1 ? 21 : 10));
  }
};

/// Four keys of a row.
using key_quad = std::array<std::uint32_t, 4>;

/// Keys of a row in fours that begin on 16 bytes; the first and the last four may reach beyond the row. 32 bits suffice
/// for their numbers: a row has at most 2^31 - 2^16 keys.
struct key_row {
  const std::uint32_t* keys = nullptr;
  int count = 0;
  int lead = 0;  ///< places of the first four that lie before the row

  constexpr key_row() = default;
  RESTKV_HD key_row(const std::uint32_t* first, index_t length) noexcept
      : keys(first),
        count(static_cast<int>(length)),
        lead(static_cast<int>(reinterpret_cast<std::uintptr_t>(first) / sizeof(std::uint32_t) % 4)) {}

  /// Fours of the row.
  [[nodiscard]] RESTKV_HD int quads() const noexcept { return count == 0 ? 0 : (count + lead + 3) / 4; }
  /// The key that a place of a four is; negative or at least `count` beyond the row.
  [[nodiscard]] RESTKV_HD int index(int quad, int place) const noexcept { return quad * 4 + place - lead; }
  /// Four keys, `excluded_key` beyond the row.
  template <class Group>
  [[nodiscard]] RESTKV_HD key_quad load(const Group& group, int quad) const {
    const int first = index(quad, 0);
    if (first >= 0 && first + 4 <= count) return group.load_16_bytes(keys + first);
    key_quad some{};
    for (int i = 0; i < 4; ++i) {
      if (first + i >= 0 && first + i < count) some[static_cast<std::size_t>(i)] = keys[first + i];
    }
    return some;
  }
};

/// Calls f(keys) for fours [first, last) of a row, so many fours at once that the loads of a thread overlap; no call
/// knows which keys it was given, and `excluded_key` fills up. Of rows that are read twice the second time should go
/// backwards: their ends are still in the cache.
template <class Group, class F>
RESTKV_HD void for_each_keys(Group& group, const key_row& row, int first, int last, bool backwards, const F& f) {
  constexpr int at_once = 4;
  group.for_each_thread([&](int thread) {
    for (int q = first + thread; q < last; q += at_once * Group::threads) {
      std::array<std::uint32_t, 4 * at_once> keys;
      for (int i = 0; i < at_once; ++i) {
        const int quad = q + i * Group::threads;
        const key_quad some = quad < last ? row.load(group, backwards ? first + last - 1 - quad : quad) : key_quad{};
        for (int j = 0; j < 4; ++j) keys[static_cast<std::size_t>(4 * i + j)] = some[static_cast<std::size_t>(j)];
      }
      f(keys);
    }
  });
}

/// Adds keys to a histogram of their digits, equal neighbours at once.
template <class Group, std::size_t N>
RESTKV_HD void count_digits(const Group& group, std::uint32_t (&histogram)[radix_digit::bins],
                            const std::array<std::uint32_t, N>& keys, radix_digit digit, std::uint32_t prefix) {
  std::uint32_t bin = 0;
  std::uint32_t run = 0;
  for (std::size_t i = 0; i < N; ++i) {
    if (!digit.follows(keys[i], prefix)) continue;
    const std::uint32_t own = digit.of(keys[i]);
    if (run > 0 && own != bin) {
      group.add(histogram[bin], run);
      run = 0;
    }
    bin = own;
    ++run;
  }
  if (run > 0) group.add(histogram[bin], run);
}

/// The digit of the key that is looked for.
struct digit_choice {
  std::uint32_t digit;
  index_t above;  ///< keys with a larger digit
  index_t equal;  ///< keys with this digit
};

/// Finds the digit at which `wanted` keys, from the largest down, are reached, in a histogram of all digits; ends
/// phases. `choice` is set unless fewer than `wanted` are there. Returns how many are there.
template <class Count, class Group, int Threads>
RESTKV_HD index_t choose_digit(Group& group, const Count* histogram, index_t wanted, digit_choice& choice,
                               collective_memory<index_t, Threads>& sums) {
  constexpr int of_thread = radix_digit::bins / Threads;
  static_assert(of_thread * Threads == radix_digit::bins);
  auto before = group.template locals<index_t, 1>();
  group.for_each_thread([&](int t) {
    index_t sum = 0;
    for (int i = 0; i < of_thread; ++i) {
      sum += static_cast<index_t>(group.read(histogram[radix_digit::bins - 1 - t * of_thread - i]));
    }
    before(t)[0] = sum;
  });
  const index_t total = group.exclusive_sum(before, sums);
  group.for_each_thread([&](int t) {
    index_t above = before(t)[0];
    for (int i = 0; i < of_thread && above < wanted; ++i) {
      const int bin = radix_digit::bins - 1 - t * of_thread - i;
      const auto here = static_cast<index_t>(group.read(histogram[bin]));
      if (above + here >= wanted) group.write(choice, {static_cast<std::uint32_t>(bin), above, here});
      above += here;
    }
  });
  group.sync();
  return total;
}

/// Rows of keys in segments.
struct key_segments {
  const std::uint32_t* keys;
  bulk_rows rows;
  index_t rows_per_segment;

  /// Segments.
  [[nodiscard]] RESTKV_HD index_t count() const noexcept {
    return (rows.count + rows_per_segment - 1) / rows_per_segment;
  }
  /// One behind the last row of a segment.
  [[nodiscard]] RESTKV_HD index_t end(index_t segment) const noexcept {
    const index_t all = (segment + 1) * rows_per_segment;
    return all < rows.count ? all : rows.count;
  }
  /// The keys of a row.
  [[nodiscard]] RESTKV_HD key_row row(index_t r) const noexcept { return {keys + rows.begin_of(r), rows.units_of(r)}; }
};

/// Fours that a row of `units` keys has at most.
[[nodiscard]] constexpr index_t most_quads(index_t units) noexcept { return (units + 6) / 4; }

}  // namespace restkv::kernel
