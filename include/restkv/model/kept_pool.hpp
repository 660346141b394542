// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a model keeps while its layers come in, one sequence: the units of every row with their order keys.
#pragma once

#include <restkv/core/workspace.hpp>
#include <restkv/selection/top_k.hpp>

#include <concepts>
#include <span>

namespace restkv::detail {

/// The key of a unit that is never evicted; no score has it.
template <std::unsigned_integral Key>
inline constexpr Key held_key = static_cast<Key>(~Key(0));

/// The kept units of one sequence in all layers that came in, row by row: row l * rows + h is head h of layer l. Rows
/// lie behind each other, units ascend. Nothing is ever added to a row that was closed.
template <std::unsigned_integral Key>
class kept_pool {
 public:
  kept_pool() = default;
  /// Room for `entries` units in `rows` rows.
  kept_pool(index_t rows, index_t entries, workspace& space) noexcept
      : keys_(space.take<Key>(entries)),
        units_(space.take<position_t>(entries)),
        slots_(space.take<position_t>(entries)),
        first_(space.take<index_t>(rows + 1)) {}

  void clear() noexcept {
    rows_ = 0;
    first_[0] = 0;
  }
  [[nodiscard]] index_t rows() const noexcept { return rows_; }
  /// Units of a row.
  [[nodiscard]] index_t size(index_t row) const noexcept { return first_[row + 1] - first_[row]; }
  /// Units of all rows.
  [[nodiscard]] index_t size() const noexcept { return first_[rows_]; }
  [[nodiscard]] std::span<Key> keys(index_t row) noexcept { return {keys_ + first_[row], count(row)}; }
  [[nodiscard]] std::span<const Key> keys(index_t row) const noexcept { return {keys_ + first_[row], count(row)}; }
  /// Positions in the sequence, in units.
  [[nodiscard]] std::span<const position_t> units(index_t row) const noexcept {
    return {units_ + first_[row], count(row)};
  }
  /// Where each unit lay in its row before the last `keep_best`; in a row that was new then, `units`.
  [[nodiscard]] std::span<const position_t> cache_slots(index_t row) const noexcept {
    return {slots_ + first_[row], count(row)};
  }

  /// A new row: the unit and key of each of `keys`, one behind the other.
  void append(std::span<const Key> keys) noexcept {
    const index_t first = first_[rows_];
    for (std::size_t u = 0; u < keys.size(); ++u) {
      const auto at = first + static_cast<index_t>(u);
      keys_[at] = keys[u] == excluded_key ? held_key<Key> : keys[u];
      units_[at] = static_cast<position_t>(u);
      slots_[at] = static_cast<position_t>(u);
    }
    first_[++rows_] = first + static_cast<index_t>(keys.size());
  }

  /// Units of rows [begin, end) that may be evicted.
  [[nodiscard]] index_t candidates(index_t begin, index_t end) const noexcept {
    index_t sum = 0;
    for (index_t n = first_[begin]; n < first_[end]; ++n) sum += keys_[n] == held_key<Key> ? 0 : 1;
    return sum;
  }

  /// Holds the `least` best candidates of a row for good.
  void hold(index_t row, index_t least) noexcept {
    const std::span<Key> keys = this->keys(row);
    const auto pivot = pivot_of(first_[row], first_[row + 1], least);
    index_t equal_left = pivot.equal;
    for (Key& key : keys) {
      if (key == held_key<Key> || !(key > pivot.key || (key == pivot.key && equal_left-- > 0))) continue;
      key = held_key<Key>;
    }
  }

  /// Begins a round of evictions, in which every row is passed to `keep_best`, in order.
  void begin_eviction() noexcept {
    done_ = 0;
    read_ = 0;
    kept_ = 0;
  }
  /// Keeps the `count` best candidates of rows [done, end) together, ties to the smaller row and unit, and whatever is
  /// held for good. `fresh` is the first row whose slots stay units. Cost: a `find_pivot` and a pass over these rows.
  void keep_best(index_t end, index_t count, index_t fresh) noexcept {
    const auto pivot = pivot_of(read_, first_[end], count);
    index_t equal_left = pivot.equal;
    for (; done_ < end; ++done_) {
      const index_t row_end = first_[done_ + 1];
      first_[done_] = kept_;
      for (const index_t row_begin = read_; read_ < row_end; ++read_) {
        const Key key = keys_[read_];
        if (key != held_key<Key> && !(key > pivot.key || (key == pivot.key && equal_left-- > 0))) continue;
        const position_t slot =
            done_ >= fresh ? units_[read_] : static_cast<position_t>(read_ - row_begin);
        keys_[kept_] = key;
        units_[kept_] = units_[read_];
        slots_[kept_] = slot;
        ++kept_;
      }
    }
    if (done_ == rows_) first_[rows_] = kept_;
  }

 private:
  [[nodiscard]] std::size_t count(index_t row) const noexcept { return static_cast<std::size_t>(size(row)); }

  /// Of the candidates among the entries [begin, end).
  [[nodiscard]] top_k_pivot<Key> pivot_of(index_t begin, index_t end, index_t count) const noexcept {
    return find_pivot<Key>(
        1, end - begin,
        [this, begin](index_t, index_t n) {
          const Key key = keys_[begin + n];
          return key == held_key<Key> ? Key{excluded_key} : key;
        },
        count);
  }

  Key* keys_ = nullptr;           // [entries]
  position_t* units_ = nullptr;   // [entries]
  position_t* slots_ = nullptr;   // [entries]
  index_t* first_ = nullptr;      // [rows + 1]
  index_t rows_ = 0;
  index_t done_ = 0;  // rows that were passed to keep_best
  index_t read_ = 0;  // first entry of row `done_` as it lay before
  index_t kept_ = 0;  // entries of the rows before it
};

}  // namespace restkv::detail
