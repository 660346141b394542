// SPDX-License-Identifier: Apache-2.0
/// @file
/// Batched top-k over order keys: pivots by a sort, counts by a reduction of rows, positions by a scan by key.
#pragma once

#include <restkv/backend/bulk.hpp>
#include <restkv/backend/thrust/drift.cuh>

#include <thrust/iterator/transform_iterator.h>
#include <thrust/scan.h>

namespace restkv::on_thrust {

/// item / length: the row of an item.
struct row_of_item {
  index_t length;

  [[nodiscard]] RESTKV_HD index_t operator()(index_t item) const noexcept { return item / length; }
};

/// Rows of keys: unit u of row r at keys[begin_of(r) + u], u < units_of(r) <= width.
struct key_rows {
  const std::uint32_t* keys;
  bulk_rows rows;
  index_t width;  ///< places of a row that are looked at

  /// The key at a place of a row, 0 behind its last unit.
  [[nodiscard]] RESTKV_HD std::uint32_t at(index_t row, index_t u) const noexcept {
    return u < rows.units_of(row) ? keys[rows.begin_of(row) + u] : std::uint32_t{excluded_key};
  }
};

/// sorted[item] = a segment's number above a key turned round. For each place of the slab's rows.
struct pack_keys {
  key_rows rows;
  index_t rows_per_segment;
  index_t first_row;
  std::uint64_t* packed;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / rows.width;
    packed[item] = descending(row / rows_per_segment, rows.at(first_row + row, item % rows.width));
  }
};

/// pivots[segment] from the segment's sorted keys. For each segment of the slab.
struct read_pivots {
  const std::uint64_t* sorted;
  index_t rows_per_segment;
  index_t rows;  ///< of the slab
  index_t width;
  const index_t* wanted;
  top_k_pivot<std::uint32_t>* pivots;

  RESTKV_HD void operator()(index_t segment) const noexcept {
    const index_t first = segment * rows_per_segment * width;
    const index_t end = (segment + 1) * rows_per_segment < rows ? first + rows_per_segment * width : rows * width;
    const index_t k = wanted[segment];
    top_k_pivot<std::uint32_t>& pivot = pivots[segment];
    if (k <= 0) {
      pivot = {~std::uint32_t{0}, 0, 0};
      return;
    }
    const index_t counting = lower_bound(first, end, descending(segment, std::uint32_t{excluded_key}));
    if (k > counting) {
      pivot = {0, counting, 0};
      return;
    }
    const std::uint64_t at = sorted[first + k - 1];
    const index_t greater = lower_bound(first, end, at);
    pivot = {~static_cast<std::uint32_t>(at), greater, k - greater};
  }

 private:
  /// Places from `first` on whose key lies before `key`.
  [[nodiscard]] RESTKV_HD index_t lower_bound(index_t first, index_t end, std::uint64_t key) const noexcept {
    index_t low = first;
    while (low < end) {
      const index_t middle = low + (end - low) / 2;
      if (sorted[middle] < key) {
        low = middle + 1;
      } else {
        end = middle;
      }
    }
    return low - first;
  }
};

/// Keys that are sorted or scanned together, at most, unless one segment has more.
inline constexpr index_t keys_of_slab = index_t(1) << 23;

/// How many keys of a row lie above its segment's pivot, and how many equal it.
struct pivot_counts {
  index_t above = 0;
  index_t equal = 0;
};

/// Working memory of a batched top-k: 8 bytes a key of a slab, 16 bytes a row. A segment that is longer than a slab
/// takes temporary memory of the system.
struct top_k_memory {
  index_t width = 0;  ///< units of the longest row
  index_t keys = 0;   ///< of the slab
  std::byte* slab = nullptr;
  pivot_counts* of_rows = nullptr;  ///< [rows]
  pivot_counts* partial = nullptr;  ///< [rows, parts_of(width)]

  top_k_memory(const bulk_shape& shape, workspace& space) noexcept
      : width(shape.units),
        keys(std::min(shape.rows * shape.units, std::max(keys_of_slab, shape.units))),
        slab(space.take<std::byte>(keys * static_cast<index_t>(sizeof(std::uint64_t)))),
        of_rows(space.take<pivot_counts>(shape.rows)),
        partial(space.take<pivot_counts>(shape.rows * parts_of(shape.units))) {}
};

/// See `bulk_backend::find_pivots`.
template <class System>
void find_pivots(const instance<System>& system, const top_k_memory& memory, const std::uint32_t* keys,
                 const bulk_rows& rows, index_t rows_per_segment, const index_t* wanted,
                 top_k_pivot<std::uint32_t>* pivots) {
  if (rows.count <= 0 || rows_per_segment <= 0) return;
  const auto& policy = system.policy();
  const key_rows all{keys, rows, std::min(memory.width, rows.stride)};
  const index_t segments = (rows.count + rows_per_segment - 1) / rows_per_segment;
  const index_t of_segment = std::max<index_t>(rows_per_segment * all.width, 1);
  const index_t at_once = std::clamp<index_t>(memory.keys / of_segment, 1, segments);
  const temporary<System, std::uint64_t> more(system, of_segment > memory.keys ? of_segment : 0);
  auto* const packed = of_segment > memory.keys ? more.data() : reinterpret_cast<std::uint64_t*>(memory.slab);
  for (index_t first = 0; first < segments; first += at_once) {
    const index_t count = std::min(at_once, segments - first);
    const index_t first_row = first * rows_per_segment;
    const index_t rows_here = std::min(count * rows_per_segment, rows.count - first_row);
    const index_t items = rows_here * all.width;
    loop(policy, items, pack_keys{all, rows_per_segment, first_row, packed});
    if (items > 0) ::thrust::sort(policy, packed, packed + items);
    loop(policy, count, read_pivots{packed, rows_per_segment, rows_here, all.width, wanted + first, pivots + first});
  }
}

/// Both counts added.
struct add_counts {
  [[nodiscard]] RESTKV_HD pivot_counts operator()(const pivot_counts& a, const pivot_counts& b) const noexcept {
    return {a.above + b.above, a.equal + b.equal};
  }
};

/// The counts of one key.
struct compare_to_pivot {
  key_rows rows;
  index_t rows_per_segment;
  const top_k_pivot<std::uint32_t>* pivots;

  [[nodiscard]] RESTKV_HD pivot_counts operator()(index_t item) const noexcept {
    const index_t row = item / rows.width;
    const std::uint32_t key = rows.at(row, item % rows.width);
    const std::uint32_t pivot = pivots[row / rows_per_segment].key;
    if (key == excluded_key) return {};
    return {key > pivot ? 1 : 0, key == pivot ? 1 : 0};
  }
};

/// counts[row] of the rows of a segment: the first keys that equal the pivot are given to the first rows. For each
/// segment.
struct share_equal_keys {
  const pivot_counts* of_rows;
  const top_k_pivot<std::uint32_t>* pivots;
  index_t rows_per_segment;
  index_t rows;
  index_t* counts;

  RESTKV_HD void operator()(index_t segment) const noexcept {
    index_t left = pivots[segment].equal;
    const index_t first = segment * rows_per_segment;
    for (index_t row = first; row < first + rows_per_segment && row < rows; ++row) {
      const index_t equal = of_rows[row].equal < left ? of_rows[row].equal : left;
      counts[row] = of_rows[row].above + equal;
      left -= equal;
    }
  }
};

/// counts[row] = 0, where rows hold no keys. For each row.
struct count_nothing {
  index_t* counts;

  RESTKV_HD void operator()(index_t row) const noexcept { counts[row] = 0; }
};

/// See `bulk_backend::count_chosen`.
template <class System>
void count_chosen(const instance<System>& system, const top_k_memory& memory, const std::uint32_t* keys,
                  const bulk_rows& rows, index_t rows_per_segment, const top_k_pivot<std::uint32_t>* pivots,
                  index_t* counts) {
  if (rows.count <= 0 || rows_per_segment <= 0) return;
  const auto& policy = system.policy();
  const key_rows all{keys, rows, std::min(memory.width, rows.stride)};
  if (all.width <= 0) return loop(policy, rows.count, count_nothing{counts});
  reduce_rows(policy, rows.count, all.width, compare_to_pivot{all, rows_per_segment, pivots}, memory.partial,
              memory.of_rows, add_counts{});
  loop(policy, (rows.count + rows_per_segment - 1) / rows_per_segment,
       share_equal_keys{memory.of_rows, pivots, rows_per_segment, rows.count, counts});
}

/// Rows of a slab whose chosen units are written together.
struct chosen_rows {
  key_rows rows;
  const top_k_pivot<std::uint32_t>* pivots;
  index_t first_row;

  [[nodiscard]] RESTKV_HD index_t row_of(index_t item) const noexcept { return first_row + item / rows.width; }
  [[nodiscard]] RESTKV_HD index_t unit_of(index_t item) const noexcept { return item % rows.width; }
  [[nodiscard]] RESTKV_HD std::uint32_t key(index_t item) const noexcept {
    return rows.at(row_of(item), unit_of(item));
  }
  /// Tokens of a unit; the last of a row may have fewer.
  [[nodiscard]] RESTKV_HD position_t tokens_of(index_t item) const noexcept {
    const index_t left = rows.rows.span_of(row_of(item)).length - unit_of(item) * rows.rows.unit;
    return static_cast<position_t>(left < rows.rows.unit ? left : rows.rows.unit);
  }
};

/// 1 for a key that equals its row's pivot.
struct equals_pivot {
  chosen_rows rows;

  [[nodiscard]] RESTKV_HD position_t operator()(index_t item) const noexcept {
    const std::uint32_t key = rows.key(item);
    return key != excluded_key && key == rows.pivots[rows.row_of(item)].key ? 1 : 0;
  }
};

/// Tokens that a unit adds to its row's kept ones; `ranks` counts the keys before it that equal the pivot.
struct kept_of_unit {
  chosen_rows rows;
  const position_t* ranks;

  [[nodiscard]] RESTKV_HD position_t operator()(index_t item) const noexcept {
    const index_t row = rows.row_of(item);
    if (rows.unit_of(item) >= rows.rows.rows.units_of(row)) return 0;
    const std::uint32_t key = rows.key(item);
    const top_k_pivot<std::uint32_t>& pivot = rows.pivots[row];
    const bool kept = key == excluded_key || key > pivot.key || (key == pivot.key && ranks[item] < pivot.equal);
    return kept ? rows.tokens_of(item) : 0;
  }
};

/// Writes the positions of a unit that is kept, behind the tokens before it. For each place of the slab's rows.
struct write_unit {
  kept_of_unit kept_tokens;
  const position_t* before;  ///< kept tokens of the row before each unit
  bulk_kept kept;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const chosen_rows& rows = kept_tokens.rows;
    const index_t row = rows.row_of(item);
    const position_t count = kept_tokens(item);
    const bool last = rows.unit_of(item) + 1 == rows.rows.width;
    const index_t end = before[item] + count;
    const bool fits = end <= kept.capacity;
    const bulk_span& span = rows.rows.rows.span_of(row);
    const auto first = static_cast<position_t>(span.begin + rows.unit_of(item) * rows.rows.rows.unit);
    for (index_t copy = row * kept.copies; copy < (row + 1) * kept.copies; ++copy) {
      // One unit writes a row's length: the last that fits, before one that does not, or at the row's end.
      if (last && fits) kept.lengths[copy] = static_cast<position_t>(end);
      if (!fits && before[item] <= kept.capacity && count > 0) kept.lengths[copy] = before[item];
      for (position_t i = 0; fits && i < count; ++i) {
        kept.positions[kept.begin_of(copy) + before[item] + i] = first + i;
      }
    }
  }
};

/// lengths = 0, where rows hold no keys. For each row of the result.
struct keep_nothing {
  position_t* lengths;

  RESTKV_HD void operator()(index_t row) const noexcept { lengths[row] = 0; }
};

/// See `bulk_backend::write_chosen`. What lies behind a unit that was left out for the capacity is left out too.
template <class System>
void write_chosen(const instance<System>& system, const top_k_memory& memory, const std::uint32_t* keys,
                  const bulk_rows& rows, const top_k_pivot<std::uint32_t>* pivots, const bulk_kept& kept) {
  if (rows.count <= 0) return;
  const auto& policy = system.policy();
  const key_rows all{keys, rows, std::min(memory.width, rows.stride)};
  if (all.width <= 0) return loop(policy, rows.count * kept.copies, keep_nothing{kept.lengths});
  const index_t at_once = std::min(rows.count, memory.keys / all.width);
  auto* const ranks = reinterpret_cast<position_t*>(memory.slab);
  position_t* const before = ranks + at_once * all.width;
  for (index_t first = 0; first < rows.count; first += at_once) {
    const index_t items = std::min(at_once, rows.count - first) * all.width;
    const chosen_rows chosen{all, pivots, first};
    const ::thrust::counting_iterator<index_t> places(0);
    const auto row_keys = ::thrust::make_transform_iterator(places, row_of_item{all.width});
    ::thrust::exclusive_scan_by_key(policy, row_keys, row_keys + items,
                                    ::thrust::make_transform_iterator(places, equals_pivot{chosen}), ranks,
                                    position_t{0});
    const kept_of_unit kept_tokens{chosen, ranks};
    ::thrust::exclusive_scan_by_key(policy, row_keys, row_keys + items,
                                    ::thrust::make_transform_iterator(places, kept_tokens), before, position_t{0});
    loop(policy, items, write_unit{kept_tokens, before, kept});
  }
}

}  // namespace restkv::on_thrust
