// SPDX-License-Identifier: Apache-2.0
/// @file
/// Batched top-k by kernels: its working memory, and which kernels serve which shape.
#pragma once

#include <restkv/core/workspace.hpp>
#include <restkv/kernel/choose_write.hpp>
#include <restkv/kernel/radix_select.hpp>
#include <restkv/kernel/radix_split.hpp>

#include <algorithm>

namespace restkv::kernel {

/// Working memory of a batched top-k: a byte a key, 8 bytes a tile of 8192 keys, and 16 KB for each of the segments
/// that are split over blocks.
struct top_k_memory {
  radix_tuning tuning;
  bulk_shape shape;
  index_t room;             ///< keys that may be put aside
  index_t split_segments;   ///< segments that there are histograms for
  index_t tiles;            ///< of a row
  std::uint32_t* aside;     ///< [room]
  radix_state* states;      ///< [split_segments]
  index_t* histograms;      ///< [split_segments, bins]
  std::uint64_t* of_rows;   ///< [rows]
  std::uint64_t* of_tiles;  ///< [rows, tiles]

  /// Counts where the workspace counts.
  top_k_memory(const radix_tuning& with, const bulk_shape& largest, workspace& space) noexcept
      : tuning(with),
        shape(largest),
        room(largest.most_keys() / 4),
        split_segments(std::min(largest.rows, std::max<index_t>(with.blocks_to_fill, 1))),
        tiles(most_tiles(largest.units)),
        aside(space.take<std::uint32_t>(room)),
        states(space.take<radix_state>(split_segments)),
        histograms(space.take<index_t>(split_segments * radix_digit::bins)),
        of_rows(space.take<std::uint64_t>(largest.rows)),
        of_tiles(space.take<std::uint64_t>(largest.rows * tiles)) {}

  /// Pieces that each row is cut into so that the blocks fill the device.
  [[nodiscard]] index_t pieces(index_t rows) const noexcept {
    const index_t least = std::max<index_t>(tuning.least_keys_of_block, 1);
    const index_t most = std::max<index_t>(1, (shape.units + least - 1) / least);
    return std::clamp<index_t>((tuning.blocks_to_fill + rows - 1) / rows, 1, most);
  }
  /// True where a block for each of `parts` parts is the way: enough of them, or little in each.
  [[nodiscard]] bool one_block_each(index_t parts, index_t keys_of_part) const noexcept {
    return 2 * parts >= tuning.blocks_to_fill || keys_of_part <= 2 * tuning.least_keys_of_block;
  }
};

/// See `bulk_backend::find_pivots`.
template <class Executor>
void find_pivots(Executor& executor, const top_k_memory& memory, const std::uint32_t* keys, const bulk_rows& rows,
                 index_t rows_per_segment, const index_t* wanted, top_k_pivot<std::uint32_t>* pivots) {
  if (rows.count <= 0 || rows_per_segment <= 0) return;
  const key_segments segments{keys, rows, rows_per_segment};
  const index_t keys_of_segment = std::min(rows_per_segment, rows.count) * memory.shape.units;
  constexpr index_t most_keys = index_t(1) << 31;  // that a block counts in 32 bits
  const bool many = segments.count() > memory.split_segments;
  if (keys_of_segment < most_keys && (many || memory.one_block_each(segments.count(), keys_of_segment))) {
    const index_t room = memory.room / segments.count();
    executor.launch(radix_select{segments, wanted, pivots, memory.aside, room}, segments.count());
    return;
  }
  const index_t pieces = memory.pieces(rows.count);
  const index_t quads = (most_quads(memory.shape.units) + pieces - 1) / pieces;
  for (index_t first = 0; first < segments.count(); first += memory.split_segments) {
    const index_t count = std::min(memory.split_segments, segments.count() - first);
    const index_t rows_here = std::min(count * rows_per_segment, rows.count - first * rows_per_segment);
    executor.launch(radix_begin{wanted + first, memory.states, memory.histograms, pivots + first}, count);
    for (int pass = 0; pass < radix_digit::passes; ++pass) {
      executor.launch(radix_count{segments, {pass}, first, pieces, quads, memory.states, memory.histograms},
                      rows_here * pieces);
      executor.launch(radix_choose{{pass}, wanted + first, memory.states, memory.histograms, pivots + first}, count);
    }
  }
}

/// See `bulk_backend::count_chosen`.
template <class Executor>
void count_chosen(Executor& executor, const top_k_memory& memory, const std::uint32_t* keys, const bulk_rows& rows,
                  index_t rows_per_segment, const top_k_pivot<std::uint32_t>* pivots, index_t* counts) {
  if (rows.count <= 0 || rows_per_segment <= 0) return;
  const key_segments segments{keys, rows, rows_per_segment};
  const index_t pieces = memory.pieces(rows.count);
  const index_t quads = (most_quads(memory.shape.units) + pieces - 1) / pieces;
  executor.launch(choose_begin{memory.of_rows, rows.count},
                  (rows.count + choose_begin::threads - 1) / choose_begin::threads);
  executor.launch(choose_count{segments, pivots, pieces, quads, memory.of_rows}, rows.count * pieces);
  executor.launch(choose_share{memory.of_rows, pivots, rows.count, rows_per_segment, counts}, segments.count());
}

/// See `bulk_backend::write_chosen`. What lies behind a unit that was left out for the capacity is left out too.
template <class Executor>
void write_chosen(Executor& executor, const top_k_memory& memory, const std::uint32_t* keys, const bulk_rows& rows,
                  const top_k_pivot<std::uint32_t>* pivots, const bulk_kept& kept) {
  if (rows.count <= 0) return;
  const chosen_length length{rows, keys, pivots, kept};
  const index_t tiles = memory.tiles;
  if (memory.one_block_each(rows.count, memory.shape.units)) {
    executor.launch(choose_write{length, tiles, nullptr}, rows.count);
    return;
  }
  executor.launch(choose_tiles{keys, rows, pivots, tiles, memory.of_tiles}, rows.count * tiles);
  executor.launch(choose_scan{length, tiles, memory.of_tiles}, rows.count);
  executor.launch(choose_write{length, tiles, memory.of_tiles}, rows.count * tiles);
}

}  // namespace restkv::kernel
