// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a model keeps while its layers come in, in the memory of a bulk backend: `kept_pool` of all sequences at once.
#pragma once

#include <restkv/backend/bulk.hpp>
#include <restkv/core/workspace.hpp>
#include <restkv/model/layer_sums.hpp>

#include <algorithm>
#include <array>

namespace restkv::detail {

namespace bulk {

/// The rows of a pool: row (b * layers + l) * rows + r is row r of layer l of sequence b. The rows of a sequence lie
/// behind each other; units ascend; those that are held for good have key 0.
struct pool_rows {
  index_t batch;
  index_t layers;
  index_t rows;     ///< of a layer of a sequence
  index_t entries;  ///< that a sequence has at most

  /// Rows of a sequence.
  [[nodiscard]] RESTKV_HD constexpr index_t of_sequence() const noexcept { return layers * rows; }
  /// Rows of all.
  [[nodiscard]] RESTKV_HD constexpr index_t count() const noexcept { return batch * layers * rows; }
  /// The row of a row of layer l as the layer counts them, [batch * rows].
  [[nodiscard]] RESTKV_HD constexpr index_t of_layer(index_t l, index_t row) const noexcept {
    return (row / rows * layers + l) * rows + row % rows;
  }
};

/// Empty rows. For each row.
struct clear_pool {
  pool_rows pool;
  bulk_span* spans;
  index_t* firsts;
  index_t* live;

  RESTKV_HD void operator()(index_t row) const noexcept {
    spans[row] = {};
    firsts[row] = row / pool.of_sequence() * pool.entries;
    live[row] = 0;
  }
};

/// Where the tokens of a layer's rows lie. For each row of the layer.
struct note_spans {
  bulk_rows from;  ///< of the layer
  bulk_span* spans;

  RESTKV_HD void operator()(index_t row) const noexcept { spans[row] = from.span_of(row); }
};

/// Puts the rows of a layer behind those that are there. For each sequence.
struct extend_pool {
  pool_rows pool;
  index_t layer;
  bulk_rows from;  ///< of the layer
  index_t least;
  bulk_span* spans;
  index_t* firsts;
  index_t* live;  ///< candidates that are not held for good

  RESTKV_HD void operator()(index_t b) const noexcept {
    const index_t begin = pool.of_layer(layer, b * pool.rows);
    index_t at = layer == 0 ? b * pool.entries : firsts[begin - 1] + spans[begin - 1].length;
    for (index_t r = 0; r < pool.rows; ++r) {
      const index_t row = b * pool.rows + r;
      const index_t candidates = from.span_of(row).candidates;
      firsts[begin + r] = at;
      spans[begin + r].length = static_cast<position_t>(from.units_of(row));
      live[begin + r] = candidates > least ? candidates - least : 0;
      at += from.units_of(row);
    }
    // The rows of layers to come are empty and begin here, so that a search among all of them ends.
    for (index_t row = begin + pool.rows; row < (b + 1) * pool.of_sequence(); ++row) firsts[row] = at;
  }
};

/// The units and keys of a layer. For each (row of the layer, unit).
template <class Budget>
struct append_to_pool {
  pool_rows pool;
  index_t layer;
  bulk_rows from;                  ///< of the layer
  const std::uint32_t* from_keys;  ///< likewise
  index_t width;                   ///< units of the longest row
  Budget budget;
  const layer_summary* summaries;  ///< [batch]
  const index_t* firsts;
  std::uint32_t* keys;
  position_t* units;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / width;
    const index_t u = item % width;
    if (u >= from.units_of(row)) return;
    const index_t at = firsts[pool.of_layer(layer, row)] + u;
    keys[at] = rescaled_key<float>(from_keys[from.begin_of(row) + u], scale_of(budget, summaries[row / pool.rows]));
    units[at] = static_cast<position_t>(u);
  }
};

/// wanted[row] = `least` for the rows of the layer, 0 for others. For each row.
struct want_least {
  pool_rows pool;
  index_t layer;
  index_t least;
  index_t* wanted;

  RESTKV_HD void operator()(index_t row) const noexcept {
    wanted[row] = row / pool.rows % pool.layers == layer ? least : 0;
  }
};

/// Key 0 for the units of a layer's rows that were chosen. For each (row of the layer, unit).
struct hold_chosen {
  pool_rows pool;
  index_t layer;
  index_t width;
  const index_t* firsts;
  const position_t* chosen;   ///< its units
  const position_t* lengths;  ///< of the rows of what was chosen
  std::uint32_t* keys;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = pool.of_layer(layer, item / width);
    const index_t i = item % width;
    if (i < lengths[row]) keys[firsts[row] + chosen[firsts[row] + i]] = excluded_key;
  }
};

/// New lengths, and where the rows then begin. For each sequence.
struct place_rows {
  pool_rows pool;
  const position_t* lengths;
  bulk_span* spans;
  index_t* firsts;

  RESTKV_HD void operator()(index_t b) const noexcept {
    index_t at = b * pool.entries;
    for (index_t row = b * pool.of_sequence(); row < (b + 1) * pool.of_sequence(); ++row) {
      firsts[row] = at;
      spans[row].length = lengths[row];
      at += lengths[row];
    }
  }
};

/// Brings the chosen units and their keys to where their rows now begin. For each (sequence, entry).
struct move_chosen {
  pool_rows pool;
  index_t width;  ///< entries of a sequence, at most
  const bulk_span* spans;
  const index_t* from_firsts;
  const index_t* to_firsts;
  const position_t* chosen;
  const std::uint32_t* from_keys;
  const position_t* from_units;
  std::uint32_t* keys;
  position_t* units;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t b = item / width;
    const index_t at = b * pool.entries + item % width;
    index_t row = b * pool.of_sequence();  // the last that begins at `at` or before: not an empty one
    for (index_t left = pool.of_sequence(); left > 1;) {
      const index_t half = left / 2;
      if (to_firsts[row + half] <= at) {
        row += half;
        left -= half;
      } else {
        left = half;
      }
    }
    const index_t i = at - to_firsts[row];
    if (i >= spans[row].length) return;
    const index_t from = from_firsts[row] + chosen[from_firsts[row] + i];
    keys[at] = from_keys[from];
    units[at] = from_units[from];
  }
};

/// The tokens of the units of one layer, by position or by slot. For each (sequence, head, token).
template <memory_space Space>
struct write_pool_tokens {
  pool_rows pool;
  index_t layer;
  index_t unit;
  index_t copies;                  ///< heads that share a row
  const bulk_span* layer_spans;    ///< of the layer's rows as it came in, [batch, rows]
  const bulk_span* spans;          ///< of the pool's
  const index_t* unit_firsts;      ///< where the units of the pool's rows lie
  const position_t* units;         ///< positions, or slots of the same number
  const index_t* position_firsts;  ///< where their positions lie
  const position_t* positions;     ///< units of the pool; the length follows from the last of a row
  bool from_begin;                 ///< whether slots count from the beginning of a sequence in the cache
  tensor_view<position_t, 3, Space> out;
  tensor_view<position_t, 2, Space> lengths;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t tokens = out.extent(2) > 0 ? out.extent(2) : 1;
    const index_t n = item % tokens;
    const index_t h = item / tokens % out.extent(1);
    const index_t b = item / tokens / out.extent(1);
    const index_t of_layer = b * pool.rows + h / copies;
    const index_t row = pool.of_layer(layer, of_layer);
    const bulk_span& span = layer_spans[of_layer];
    const index_t count = spans[row].length;
    index_t length = 0;
    if (count > 0) {
      const index_t last = positions[position_firsts[row] + count - 1] * unit;
      length = (count - 1) * unit + (span.length - last < unit ? span.length - last : unit);
    }
    if (n == 0) lengths(b, h) = static_cast<position_t>(length);
    if (n >= length) return;
    const index_t begin = from_begin ? span.begin : 0;
    out(b, h, n) = static_cast<position_t>(begin + units[unit_firsts[row] + n / unit] * unit + n % unit);
  }
};

}  // namespace bulk

/// The kept units of all layers that came in, in the memory of a bulk backend. What the host knows of them is how many
/// a sequence has at most. Memory: 20 bytes for each unit that a sequence holds at most.
template <class Backend>
class bulk_pool {
  static constexpr memory_space space = space_of<Backend>();

 public:
  /// What is needed while a layer comes in, and not afterwards.
  struct scratch {
    index_t* wanted;                     // [rows]
    position_t* lengths;                 // [rows]
    top_k_pivot<std::uint32_t>* pivots;  // [rows]
    typename Backend::top_k_scratch top_k;

    scratch(const Backend& backend, const bulk::pool_rows& rows, index_t longest, workspace& from)
        : wanted(from.take<index_t>(rows.count())),
          lengths(from.take<position_t>(rows.count())),
          pivots(from.take<top_k_pivot<std::uint32_t>>(rows.count())),
          top_k(backend, bulk_shape{rows.count(), longest, std::min(rows.batch * rows.entries, rows.count() * longest)},
                from) {}
  };

  /// Rows of at most `longest` units.
  bulk_pool(const bulk::pool_rows& rows, index_t longest, workspace& from) noexcept
      : rows_(rows),
        longest_(longest),
        layer_spans_(from.take<bulk_span>(rows.count())),
        spans_(from.take<bulk_span>(rows.count())),
        live_(from.take<index_t>(rows.count())),
        slots_(from.take<position_t>(rows.batch * rows.entries)) {
    for (auto& half : halves_) {
      half = {from.take<index_t>(rows.count()), from.take<std::uint32_t>(rows.batch * rows.entries),
              from.take<position_t>(rows.batch * rows.entries)};
    }
  }

  /// The rows.
  [[nodiscard]] const bulk::pool_rows& rows() const noexcept { return rows_; }
  /// Candidates of each row that are not held for good, in the backend's memory.
  [[nodiscard]] const index_t* live() const noexcept { return live_; }

  /// Appends the rows of a layer, the first of which empties the pool. from, keys: of the layer, each of at most
  /// `width` units; the best `least` candidates of each are held for good.
  template <class Budget>
  [[nodiscard]] status append(Backend& backend, index_t layer, const bulk_rows& from, const std::uint32_t* keys,
                              index_t width, const Budget& budget, const layer_summary* summaries, scratch& memory) {
    const half_t& now = halves_[current_];
    if (layer == 0) {
      RESTKV_RETURN_IF_FAILED(backend.for_each(rows_.count(), bulk::clear_pool{rows_, spans_, now.firsts, live_}));
    }
    const index_t least = budget.least;
    RESTKV_RETURN_IF_FAILED(backend.for_each(rows_.batch * rows_.rows, bulk::note_spans{from, spans_of(layer)}));
    RESTKV_RETURN_IF_FAILED(
        backend.for_each(rows_.batch, bulk::extend_pool{rows_, layer, from, least, spans_, now.firsts, live_}));
    RESTKV_RETURN_IF_FAILED(backend.for_each(rows_.batch * rows_.rows * width,
                                             bulk::append_to_pool<Budget>{rows_, layer, from, keys, width, budget,
                                                                          summaries, now.firsts, now.keys, now.units}));
    if (least == 0) return {};
    RESTKV_RETURN_IF_FAILED(backend.for_each(rows_.count(), bulk::want_least{rows_, layer, least, memory.wanted}));
    RESTKV_RETURN_IF_FAILED(backend.find_pivots(memory.top_k, now.keys, key_rows(), 1, memory.wanted, memory.pivots));
    RESTKV_RETURN_IF_FAILED(write_slots(backend, memory));
    return backend.for_each(rows_.batch * rows_.rows * width,
                            bulk::hold_chosen{rows_, layer, width, now.firsts, slots_, memory.lengths, now.keys});
  }

  /// Keeps what is held for good and the best memory.wanted[s] candidates of each `rows_per_segment` rows, ties to the
  /// smaller row and unit. `most`: entries of a sequence afterwards, at most.
  [[nodiscard]] status keep_best(Backend& backend, index_t rows_per_segment, index_t most, scratch& memory) {
    const half_t& now = halves_[current_];
    const half_t& next = halves_[1 - current_];
    RESTKV_RETURN_IF_FAILED(
        backend.find_pivots(memory.top_k, now.keys, key_rows(), rows_per_segment, memory.wanted, memory.pivots));
    RESTKV_RETURN_IF_FAILED(
        backend.count_chosen(memory.top_k, now.keys, key_rows(), rows_per_segment, memory.pivots, live_));
    if (rows_per_segment > 1) {
      RESTKV_RETURN_IF_FAILED(backend.find_pivots(memory.top_k, now.keys, key_rows(), 1, live_, memory.pivots));
    }
    RESTKV_RETURN_IF_FAILED(write_slots(backend, memory));
    RESTKV_RETURN_IF_FAILED(
        backend.for_each(rows_.batch, bulk::place_rows{rows_, memory.lengths, spans_, next.firsts}));
    const index_t width = std::min(most, rows_.entries);
    RESTKV_RETURN_IF_FAILED(
        backend.for_each(rows_.batch * width, bulk::move_chosen{rows_, width, spans_, now.firsts, next.firsts, slots_,
                                                                now.keys, now.units, next.keys, next.units}));
    current_ = 1 - current_;
    return {};
  }

  /// The tokens that a layer keeps, by position, or by slot of the cache as it was before the last `keep_best`.
  [[nodiscard]] status write(Backend& backend, index_t layer, index_t unit, bool by_slot, bool from_begin,
                             const tensor_view<position_t, 3, space>& out,
                             const tensor_view<position_t, 2, space>& lengths) const {
    const half_t& now = halves_[current_];
    const half_t& before = halves_[1 - current_];
    const index_t tokens = std::max<index_t>(out.extent(2), 1);
    return backend.for_each(
        rows_.batch * out.extent(1) * tokens,
        bulk::write_pool_tokens<space>{rows_, layer, unit, out.extent(1) / rows_.rows, spans_of(layer), spans_,
                                       by_slot ? before.firsts : now.firsts, by_slot ? slots_ : now.units, now.firsts,
                                       now.units, from_begin, out, lengths});
  }

 private:
  struct half_t {
    index_t* firsts = nullptr;      // [rows]
    std::uint32_t* keys = nullptr;  // [batch * entries]
    position_t* units = nullptr;    // likewise
  };

  [[nodiscard]] bulk_span* spans_of(index_t layer) const noexcept {
    return layer_spans_ + layer * rows_.batch * rows_.rows;
  }
  [[nodiscard]] bulk_rows key_rows() const noexcept {
    return {.spans = spans_,
            .count = rows_.count(),
            .rows_per_span = 1,
            .stride = longest_,
            .unit = 1,
            .firsts = halves_[current_].firsts};
  }
  /// Where in their rows the chosen units lie.
  [[nodiscard]] status write_slots(Backend& backend, scratch& memory) {
    const bulk_kept kept{slots_, memory.lengths, longest_, 1, halves_[current_].firsts};
    return backend.write_chosen(memory.top_k, halves_[current_].keys, key_rows(), memory.pivots, kept);
  }

  bulk::pool_rows rows_;
  index_t longest_;
  bulk_span* layer_spans_;  // of the layers as they came in, [layers, batch, rows]
  bulk_span* spans_;        // of the pool's rows, in units
  index_t* live_;           // [rows]
  position_t* slots_;       // of the last choice, where its rows began
  std::array<half_t, 2> halves_;
  std::size_t current_ = 0;
};

}  // namespace restkv::detail
