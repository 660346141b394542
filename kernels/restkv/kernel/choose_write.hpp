// SPDX-License-Identifier: Apache-2.0
/// @file
/// The positions that a pivot chooses of each row, in ascending order.
#pragma once

#include <restkv/kernel/choose_count.hpp>

#include <bit>

namespace restkv::kernel {

/// Keys of a row by tiles: a thread has so many fours that follow each other.
struct chosen_tile {
  static constexpr int threads = 512;
  static constexpr int quads_of_thread = 4;
  static constexpr int units_of_thread = 4 * quads_of_thread;
  static constexpr int units = threads * units_of_thread;

  key_row row;
  std::uint32_t pivot;
  int number;  ///< of the tile

  /// Which of a thread's keys are chosen whatever their place, above the pivot or protected, and of which it decides.
  struct marks {
    std::uint32_t bits = 0;  // of the former; 16 bits further up those of the latter

    [[nodiscard]] RESTKV_HD constexpr chosen_counts counts() const noexcept {
      return {static_cast<std::uint32_t>(std::popcount(bits & 0xffffu)),
              static_cast<std::uint32_t>(std::popcount(bits >> 16))};
    }
  };

  /// The unit at the first place of a thread; a place may lie beyond the row at either end.
  [[nodiscard]] RESTKV_HD int first_unit(int thread) const noexcept {
    return row.index((number * threads + thread) * quads_of_thread, 0);
  }
  /// Reads a thread's keys, `excluded_key` beyond the row.
  template <class Group, class Keys>
  RESTKV_HD void load(const Group& group, int thread, Keys& keys) const {
    for (int i = 0; i < quads_of_thread; ++i) {
      const int quad = (number * threads + thread) * quads_of_thread + i;
      const key_quad some = quad < row.quads() ? row.load(group, quad) : key_quad{};
      for (int j = 0; j < 4; ++j) keys[static_cast<std::size_t>(4 * i + j)] = some[static_cast<std::size_t>(j)];
    }
  }
  /// Compares a thread's keys with the pivot.
  template <class Keys>
  [[nodiscard]] RESTKV_HD marks mark(int thread, const Keys& keys) const {
    marks made;
    const int first = first_unit(thread);
    for (int i = 0; i < units_of_thread; ++i) {
      const std::uint32_t key = keys[static_cast<std::size_t>(i)];
      const bool within = first + i >= 0 && first + i < row.count;
      if (within && (key > pivot || key == excluded_key)) made.bits |= 1u << i;
      if (key == pivot && key != excluded_key) made.bits |= 1u << (i + 16);
    }
    return made;
  }
};

/// Tiles of a row of `units` keys, at most.
[[nodiscard]] constexpr index_t most_tiles(index_t units) noexcept {
  return units <= 0 ? 0 : (units + 3 + chosen_tile::units - 1) / chosen_tile::units;
}

/// lengths of a row, from the counts of the whole row; a unit that would pass the capacity is left out.
struct chosen_length {
  bulk_rows rows;
  const std::uint32_t* keys;
  const top_k_pivot<std::uint32_t>* pivots;  ///< [rows]
  bulk_kept kept;

  /// For one thread of a row.
  template <class Group>
  RESTKV_HD void operator()(const Group& group, index_t row, chosen_counts all) const {
    const top_k_pivot<std::uint32_t> pivot = pivots[row];
    const index_t units = rows.units_of(row);
    index_t tokens = all.chosen(pivot.equal) * rows.unit;
    if (units > 0) {
      const std::uint32_t last = keys[rows.begin_of(row) + units - 1];
      const bool chosen = last == excluded_key || last > pivot.key || (last == pivot.key && all.equal <= pivot.equal);
      if (chosen) tokens -= units * rows.unit - rows.span_of(row).length;  // the last unit may be smaller
    }
    // Only the last unit may be smaller, so those before it fill whole multiples of a unit.
    if (tokens > kept.capacity) tokens = kept.capacity / rows.unit * rows.unit;
    for (index_t copy = row * kept.copies; copy < (row + 1) * kept.copies; ++copy) {
      group.write(kept.lengths[copy], static_cast<position_t>(tokens));
    }
  }
};

/// The counts of each tile of each row. Blocks: [rows, tiles].
struct choose_tiles {
  static constexpr int threads = chosen_tile::threads;
  struct shared {
    collective_memory<std::uint64_t, threads> sums;
  };

  const std::uint32_t* keys;
  bulk_rows rows;
  const top_k_pivot<std::uint32_t>* pivots;  ///< [rows]
  index_t tiles;                             ///< of a row
  std::uint64_t* of_tiles;                   ///< `chosen_counts::packed`, [rows, tiles]

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t r = block / tiles;
    const chosen_tile tile{{keys + rows.begin_of(r), rows.units_of(r)}, pivots[r].key, static_cast<int>(block % tiles)};
    auto mine = group.template locals<std::uint64_t, 1>();
    group.for_each_thread([&](int t) {
      std::array<std::uint32_t, chosen_tile::units_of_thread> own;
      tile.load(group, t, own);
      mine(t)[0] = tile.mark(t, own).counts().packed();
    });
    const std::uint64_t total = group.exclusive_sum(mine, memory.sums);
    group.for_each(1, [&](index_t) { group.write(of_tiles[block], total); });
  }
};

/// Makes each tile's counts those of the tiles before it, and writes the row's length. Blocks: a row each.
struct choose_scan {
  static constexpr int threads = 256;
  struct shared {
    collective_memory<std::uint64_t, threads> sums;
  };

  chosen_length length;
  index_t tiles;            ///< of a row
  std::uint64_t* of_tiles;  ///< [rows, tiles]

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t row) const {
    std::uint64_t* const mine = of_tiles + row * tiles;
    std::uint64_t before = 0;
    for (index_t first = 0; first < tiles; first += threads) {
      auto sums = group.template locals<std::uint64_t, 1>();
      group.for_each_thread([&](int t) { sums(t)[0] = first + t < tiles ? group.read(mine[first + t]) : 0; });
      const std::uint64_t total = group.exclusive_sum(sums, memory.sums);
      group.for_each_thread([&](int t) {
        if (first + t < tiles) group.write(mine[first + t], before + sums(t)[0]);
      });
      before += total;
    }
    group.for_each(1, [&](index_t) { length(group, row, chosen_counts::of(before)); });
  }
};

/// Writes the positions of the chosen units, see `bulk_backend::write_chosen`. Blocks: [rows, tiles], or [rows] without
/// `of_tiles`. Ties go to the smaller unit. Cost: one read of the keys; a tile's positions are put in order
/// in shared memory, so that neighbours are written together.
struct choose_write {
  static constexpr int threads = chosen_tile::threads;
  static constexpr int resident_blocks = 2;
  struct shared {
    collective_memory<std::uint64_t, threads> sums;
    position_t units[chosen_tile::units];  ///< chosen ones of a tile
  };

  chosen_length length;
  index_t tiles;                  ///< of a row
  const std::uint64_t* of_tiles;  ///< what `choose_scan` left; null where one block has the whole row and its length

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const bulk_rows& rows = length.rows;
    const index_t r = of_tiles == nullptr ? block : block / tiles;
    const int first = of_tiles == nullptr ? 0 : static_cast<int>(block % tiles);
    const top_k_pivot<std::uint32_t> pivot = length.pivots[r];
    // No row has 2^32 keys.
    const auto wanted = static_cast<std::uint32_t>(pivot.equal < 0xffffffff ? pivot.equal : 0xffffffff);
    std::uint64_t before = of_tiles == nullptr ? 0 : of_tiles[r * tiles + first];
    const key_row row{length.keys + rows.begin_of(r), rows.units_of(r)};
    const int of_row = (row.quads() + chosen_tile::units / 4 - 1) / (chosen_tile::units / 4);
    const int last = of_tiles == nullptr || of_row <= first ? of_row : first + 1;
    auto keys = group.template locals<std::uint32_t, chosen_tile::units_of_thread>();
    auto marks = group.template locals<chosen_tile::marks, 1>();
    group.for_each_thread([&](int t) { chosen_tile{row, pivot.key, first}.load(group, t, keys(t)); });
    for (int number = first; number < last; ++number) {
      const chosen_tile tile{row, pivot.key, number};
      auto mine = group.template locals<std::uint64_t, 1>();
      group.for_each_thread([&](int t) {
        marks(t)[0] = tile.mark(t, keys(t));
        mine(t)[0] = marks(t)[0].counts().packed();
        // The next tile's keys are on their way while this one's are put in order.
        if (number + 1 < last) chosen_tile{row, pivot.key, number + 1}.load(group, t, keys(t));
      });
      const std::uint64_t total = group.exclusive_sum(mine, memory.sums);
      const auto begin = static_cast<std::uint32_t>(chosen_counts::of(before).chosen(wanted));
      const auto end = static_cast<std::uint32_t>(chosen_counts::of(before + total).chosen(wanted));
      if (end > begin) {
        group.for_each_thread([&](int t) {
          const chosen_tile::marks own = marks(t)[0];
          if (own.bits == 0) return;
          chosen_counts seen = chosen_counts::of(before + mine(t)[0]);
          auto at = static_cast<int>(seen.chosen(wanted) - begin);
          int u = tile.first_unit(t);
          for (std::uint32_t rest = own.bits; rest != 0; rest = rest >> 1 & 0x7fff7fffu, ++u) {
            const bool tied = (rest & 0x10000u) != 0;
            if ((rest & 1u) != 0 || (tied && seen.equal < wanted)) group.write(memory.units[at++], u);
            seen.equal += tied ? 1u : 0u;
          }
        });
        group.sync();
        write_tile(group, memory, r, begin, end - begin);
      }
      before += total;
    }
    if (of_tiles == nullptr) group.for_each(1, [&](index_t) { length(group, r, chosen_counts::of(before)); });
  }

 private:
  /// Writes `count` chosen units, the first of which is number `begin` of its row.
  template <class Group>
  RESTKV_HD void write_tile(Group& group, const shared& memory, index_t r, std::uint32_t begin,
                            std::uint32_t count) const {
    const bulk_rows& rows = length.rows;
    const bulk_kept& kept = length.kept;
    const bulk_span& span = rows.span_of(r);
    // A unit that is longer than the row is the only one.
    const auto unit = static_cast<std::uint32_t>(rows.unit < span.length ? rows.unit : index_t{span.length});
    for (index_t copy = r * kept.copies; copy < (r + 1) * kept.copies; ++copy) {
      position_t* const to = kept.positions + kept.begin_of(copy);
      group.for_each(count * unit, [&](index_t item) {
        const auto i = static_cast<std::uint32_t>(item);
        const index_t n = group.read(memory.units[i / unit]) * rows.unit + i % unit;
        if (n >= span.length) return;  // behind the row's last token
        // The unit fits or none of its tokens is written.
        const index_t token = begin * rows.unit + i;
        const index_t left = span.length - n + i % unit;
        if (token - i % unit + (left < rows.unit ? left : rows.unit) > kept.capacity) return;
        group.write(to[token], static_cast<position_t>(span.begin + n));
      });
    }
  }
};

}  // namespace restkv::kernel
