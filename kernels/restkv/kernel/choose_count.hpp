// SPDX-License-Identifier: Apache-2.0
/// @file
/// How many keys of each row are chosen by the pivot of its segment.
#pragma once

#include <restkv/kernel/radix_keys.hpp>

namespace restkv::kernel {

/// Keys of a row or of a tile of one: how many lie above a pivot, or are protected, and how many equal it. In one
/// number, so that one scan serves both.
struct chosen_counts {
  std::uint32_t above;
  std::uint32_t equal;

  /// Both counts, `equal` in the upper half. Neither passes 2^31: rows are no longer.
  [[nodiscard]] RESTKV_HD constexpr std::uint64_t packed() const noexcept {
    return static_cast<std::uint64_t>(equal) << 32 | above;
  }
  /// What `packed` made.
  [[nodiscard]] RESTKV_HD static constexpr chosen_counts of(std::uint64_t both) noexcept {
    return {static_cast<std::uint32_t>(both), static_cast<std::uint32_t>(both >> 32)};
  }
  /// Units that are chosen where `wanted` of the equal ones are.
  [[nodiscard]] RESTKV_HD constexpr index_t chosen(index_t wanted) const noexcept {
    return above + (equal < wanted ? equal : wanted);
  }
};

/// Clears the rows' counts. Blocks: `threads` rows each.
struct choose_begin {
  static constexpr int threads = 256;
  struct shared {};

  std::uint64_t* of_rows;  ///< [rows]
  index_t rows;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    group.for_each(threads, [&](index_t i) {
      if (block * threads + i < rows) group.write(of_rows[block * threads + i], 0);
    });
  }
};

/// Adds the counts of a piece of a row to the row's. Blocks: [rows, pieces].
struct choose_count {
  static constexpr int threads = 512;
  struct shared {
    collective_memory<std::uint64_t, threads> sums;
  };

  key_segments segments;
  const top_k_pivot<std::uint32_t>* pivots;  ///< [segments]
  index_t pieces;                            ///< of a row
  index_t quads_of_piece;                    ///< fours of keys
  std::uint64_t* of_rows;                    ///< `chosen_counts::packed`, [rows]

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t r = block / pieces;
    const std::uint32_t pivot = pivots[r / segments.rows_per_segment].key;
    const key_row row = segments.row(r);
    const index_t begin = block % pieces * quads_of_piece;
    const int first = static_cast<int>(begin);
    const int last = static_cast<int>(begin + quads_of_piece < row.quads() ? begin + quads_of_piece : row.quads());
    if (first >= last) return;
    auto mine = group.template locals<std::uint64_t, 1>();
    group.for_each_thread([&](int t) {
      mine(t)[0] = 0;
      chosen_counts counts{0, 0};
      for (int q = first + t; q < last; q += threads) {
        for (const std::uint32_t key : row.load(group, q)) {
          counts.above += key > pivot && key != excluded_key ? 1u : 0u;
          counts.equal += key == pivot && key != excluded_key ? 1u : 0u;
        }
      }
      mine(t)[0] = counts.packed();
    });
    const std::uint64_t total = group.exclusive_sum(mine, memory.sums);
    group.for_each(1, [&](index_t) {
      if (total > 0) group.add(of_rows[r], total);
    });
  }
};

/// counts[row] of the rows of a segment: the first keys that equal the pivot are given to the first rows. Blocks: a
/// segment each.
struct choose_share {
  static constexpr int threads = 256;
  struct shared {
    collective_memory<index_t, threads> sums;
  };

  const std::uint64_t* of_rows;              ///< [rows]
  const top_k_pivot<std::uint32_t>* pivots;  ///< [segments]
  index_t rows;
  index_t rows_per_segment;
  index_t* counts;  ///< [rows]

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t segment) const {
    const index_t wanted = pivots[segment].equal;
    const index_t begin = segment * rows_per_segment;
    const index_t end = begin + rows_per_segment < rows ? begin + rows_per_segment : rows;
    index_t given = 0;  // equal keys of the rows before
    for (index_t first = begin; first < end; first += threads) {
      auto before = group.template locals<index_t, 1>();
      group.for_each_thread(
          [&](int t) { before(t)[0] = first + t < end ? chosen_counts::of(of_rows[first + t]).equal : 0; });
      const index_t total = group.exclusive_sum(before, memory.sums);
      group.for_each_thread([&](int t) {
        if (first + t >= end) return;
        const index_t left = wanted - given - before(t)[0];
        group.write(counts[first + t], chosen_counts::of(of_rows[first + t]).chosen(left > 0 ? left : 0));
      });
      given += total;
    }
  }
};

}  // namespace restkv::kernel
