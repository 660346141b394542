// SPDX-License-Identifier: Apache-2.0
/// @file
/// The pivots of many segments of keys: a radix select by one block a segment, in one launch.
#pragma once

#include <restkv/kernel/radix_keys.hpp>

namespace restkv::kernel {

/// pivots[s] of every segment, see `bulk_backend::find_pivots`. Blocks: a segment each.
///
/// Three digits. The first two passes read all keys; the second one puts aside those that share the first digit with
/// the pivot, so that the third reads only them, unless more than `room` do. Where they lie depends on the order in
/// which threads arrive, what is counted of them does not. Cost: two reads of the keys, three where ties are many.
struct radix_select {
  static constexpr int threads = 512;
  static constexpr int resident_blocks = 2;
  struct shared {
    std::uint32_t histogram[radix_digit::bins];
    collective_memory<index_t, threads> sums;
    digit_choice choice;
    std::uint32_t aside;  ///< keys that were put aside
  };

  key_segments segments;
  const index_t* wanted;               ///< [segments]
  top_k_pivot<std::uint32_t>* pivots;  ///< [segments]
  std::uint32_t* room;                 ///< for keys that are put aside, [segments, room_of_segment]
  index_t room_of_segment;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t segment) const {
    const index_t k = wanted[segment];
    std::uint32_t* const mine = room + segment * room_of_segment;
    top_k_pivot<std::uint32_t> pivot{~std::uint32_t{0}, 0, 0};
    index_t left = k;  // the rank that is left to find among the keys that share the prefix
    bool aside = false;
    std::uint32_t prefix = 0;
    for (int pass = 0; pass < radix_digit::passes && k > 0; ++pass) {
      const radix_digit digit{pass};
      group.for_each(radix_digit::bins, [&](index_t i) { group.write(memory.histogram[i], 0u); });
      if (pass == 0) group.for_each(1, [&](index_t) { group.write(memory.aside, 0u); });
      group.sync();
      if (pass == 2 && aside) {
        // By plain reads: the block itself wrote them.
        group.for_each(memory_count(group, memory), [&](index_t i) {
          const std::array<std::uint32_t, 1> key{group.read(mine[i])};
          count_digits(group, memory.histogram, key, digit, prefix);
        });
      } else {
        const bool puts_aside = pass == 1 && aside;
        for (index_t r = segment * segments.rows_per_segment; r < segments.end(segment); ++r) {
          const key_row row = segments.row(r);
          for_each_keys(group, row, 0, row.quads(), pass == 1, [&](const auto& keys) {
            count_digits(group, memory.histogram, keys, digit, prefix);
            if (puts_aside) put_aside(group, memory, mine, keys, digit, prefix);
          });
        }
      }
      group.sync();
      const index_t there = choose_digit(group, memory.histogram, left, memory.choice, memory.sums);
      if (there < left) {
        pivot = {0, there, 0};
        break;
      }
      const digit_choice choice = group.read(memory.choice);
      left -= choice.above;
      prefix |= choice.digit << digit.low();
      aside = pass == 0 ? choice.equal <= room_of_segment : aside;
      pivot = {prefix, k - left, left};
      group.sync();
    }
    group.for_each(1, [&](index_t) { pivots[segment] = pivot; });
  }

 private:
  template <class Group>
  [[nodiscard]] RESTKV_HD static index_t memory_count(const Group& group, const shared& memory) {
    return static_cast<index_t>(group.read(memory.aside));
  }
  template <class Group, std::size_t N>
  RESTKV_HD static void put_aside(const Group& group, shared& memory, std::uint32_t* mine,
                                  const std::array<std::uint32_t, N>& keys, radix_digit digit, std::uint32_t prefix) {
    std::uint32_t count = 0;
    for (std::size_t i = 0; i < N; ++i) count += digit.follows(keys[i], prefix) ? 1u : 0u;
    if (count == 0) return;
    std::uint32_t at = group.add(memory.aside, count);
    for (std::size_t i = 0; i < N; ++i) {
      if (digit.follows(keys[i], prefix)) group.write(mine[at++], keys[i]);
    }
  }
};

}  // namespace restkv::kernel
