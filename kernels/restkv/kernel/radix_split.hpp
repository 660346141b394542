// SPDX-License-Identifier: Apache-2.0
/// @file
/// The pivots of few segments of keys: a radix select whose passes are spread over many blocks a segment.
#pragma once

#include <restkv/kernel/radix_keys.hpp>

namespace restkv::kernel {

/// How far the search for a pivot has come.
struct radix_state {
  index_t left;          ///< the rank that is left to find among the keys that share the prefix
  std::uint32_t prefix;  ///< the leading digits of the pivot
  bool done;             ///< nothing is left to find
};

/// Sets the states and clears the histograms. Blocks: a segment each.
struct radix_begin {
  static constexpr int threads = 256;
  struct shared {};

  const index_t* wanted;               ///< [segments]
  radix_state* states;                 ///< [segments]
  index_t* histograms;                 ///< [segments, bins]
  top_k_pivot<std::uint32_t>* pivots;  ///< [segments]

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t segment) const {
    group.for_each(radix_digit::bins, [&](index_t i) { group.write(histograms[segment * radix_digit::bins + i], 0); });
    group.for_each(1, [&](index_t) {
      const index_t k = wanted[segment];
      states[segment] = {k, 0, k <= 0};
      if (k <= 0) pivots[segment] = {~std::uint32_t{0}, 0, 0};
    });
  }
};

/// Adds the digits of the keys that share the prefix to the segment's histogram: each block counts in shared memory
/// first; integer sums come out alike in any order. Blocks: [rows from the first segment on, pieces].
struct radix_count {
  static constexpr int threads = 512;
  struct shared {
    std::uint32_t histogram[radix_digit::bins];
  };

  key_segments segments;
  radix_digit digit;
  index_t first_segment;      ///< the one that `states` and `histograms` begin with
  index_t pieces;             ///< of a row
  index_t quads_of_piece;     ///< fours of keys
  const radix_state* states;  ///< [segments]
  index_t* histograms;        ///< [segments, bins]

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t r = first_segment * segments.rows_per_segment + block / pieces;
    const index_t segment = r / segments.rows_per_segment - first_segment;
    const radix_state state = states[segment];
    const key_row row = segments.row(r);
    const index_t begin = block % pieces * quads_of_piece;
    const int first = static_cast<int>(begin);
    const int last = static_cast<int>(begin + quads_of_piece < row.quads() ? begin + quads_of_piece : row.quads());
    if (state.done || first >= last) return;
    group.for_each(radix_digit::bins, [&](index_t i) { group.write(memory.histogram[i], 0u); });
    group.sync();
    for_each_keys(group, row, first, last, digit.pass == 1,
                  [&](const auto& keys) { count_digits(group, memory.histogram, keys, digit, state.prefix); });
    group.sync();
    group.for_each(radix_digit::bins, [&](index_t i) {
      const std::uint32_t count = group.read(memory.histogram[i]);
      if (count > 0) group.add(histograms[segment * radix_digit::bins + i], static_cast<index_t>(count));
    });
  }
};

/// Chooses the next digit of each pivot and clears the histogram for the next pass. Blocks: a segment each.
struct radix_choose {
  static constexpr int threads = 256;
  struct shared {
    collective_memory<index_t, threads> sums;
    digit_choice choice;
  };

  radix_digit digit;
  const index_t* wanted;               ///< [segments]
  radix_state* states;                 ///< [segments]
  index_t* histograms;                 ///< [segments, bins]
  top_k_pivot<std::uint32_t>* pivots;  ///< [segments]

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t segment) const {
    radix_state state = group.read(states[segment]);
    if (state.done) return;
    index_t* const histogram = histograms + segment * radix_digit::bins;
    const index_t there = choose_digit(group, histogram, state.left, memory.choice, memory.sums);
    group.for_each(radix_digit::bins, [&](index_t i) { group.write(histogram[i], 0); });
    if (there < state.left) {
      state.done = true;
      group.for_each(1, [&](index_t) { pivots[segment] = {0, there, 0}; });
    } else {
      const digit_choice choice = group.read(memory.choice);
      state.left -= choice.above;
      state.prefix |= choice.digit << digit.low();
      group.for_each(1, [&](index_t) {
        if (digit.pass + 1 == radix_digit::passes)
          pivots[segment] = {state.prefix, wanted[segment] - state.left, state.left};
      });
    }
    group.for_each(1, [&](index_t) { group.write(states[segment], state); });
  }
};

}  // namespace restkv::kernel
