// SPDX-License-Identifier: Apache-2.0
/// @file
/// The `bulk_backend` concept: a backend whose primitives take the rows of a whole layer at once, as a GPU wants them.
///
/// `select` runs on such a backend without looking at a score, a key or a position itself: everything it decides on the
/// host follows from shapes, lengths and masks. So the backend may run behind the host, on memory that the host cannot
/// read.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/selection/top_k.hpp>

#include <span>
#include <type_traits>

namespace restkv {

/// The largest batched top-k of a plan.
struct bulk_shape {
  index_t rows = 0;   ///< rows of keys in all
  index_t units = 0;  ///< of the longest row
  index_t keys = -1;  ///< of all rows together, where these are fewer than rows * units

  /// Keys of all rows, at most.
  [[nodiscard]] constexpr index_t most_keys() const noexcept { return keys < 0 ? rows * units : keys; }
};

/// Where the tokens of a row of scores lie, and which may be evicted. Positions but `begin` count from it; `first`,
/// `end` and `candidates` count units.
struct bulk_span {
  position_t begin = 0;       ///< first token on the token axis
  position_t length = 0;      ///< tokens
  position_t past = 0;        ///< tokens that have a score
  position_t first = 0;       ///< first unit without a sink
  position_t end = 0;         ///< first unit behind it with a recent token, or that is not full
  position_t candidates = 0;  ///< units of [first, end) that no mask protects
};

/// The rows of a selection, in the backend's memory.
struct bulk_rows {
  const bulk_span* spans = nullptr;  ///< of every sequence, or of every row where heads differ
  index_t count = 0;                 ///< rows in all
  index_t rows_per_span = 1;         ///< row / rows_per_span is its span
  index_t stride = 0;                ///< from one row of scores or keys to the next, in elements; no row has more
  index_t unit = 1;                  ///< tokens of a unit of eviction
  const index_t* firsts = nullptr;   ///< where rows begin, [count]; null where that is at multiples of the stride

  /// Where a row of scores or keys begins.
  [[nodiscard]] RESTKV_HD constexpr index_t begin_of(index_t row) const noexcept {
    return firsts == nullptr ? row * stride : firsts[row];
  }
  /// The span of a row.
  [[nodiscard]] RESTKV_HD constexpr const bulk_span& span_of(index_t row) const noexcept {
    return spans[row / rows_per_span];
  }
  /// Units of a row.
  [[nodiscard]] RESTKV_HD constexpr index_t units_of(index_t row) const noexcept {
    return (span_of(row).length + unit - 1) / unit;
  }
};

/// Where the kept positions of rows go: to `copies` rows of the result each.
struct bulk_kept {
  position_t* positions = nullptr;  ///< [count * copies, capacity], or rows that begin at `firsts`
  position_t* lengths = nullptr;    ///< [count * copies]
  index_t capacity = 0;             ///< of a row
  index_t copies = 1;               ///< heads that share a row
  const index_t* firsts = nullptr;  ///< where rows begin, [count * copies]; null where that is at multiples of capacity

  /// Where the positions of a row begin.
  [[nodiscard]] RESTKV_HD constexpr index_t begin_of(index_t row) const noexcept {
    return firsts == nullptr ? row * capacity : firsts[row];
  }
};

namespace detail {

/// What a bulk backend is asked to run for every index.
struct archetype_bulk_body {
  RESTKV_HD void operator()(index_t) const noexcept {}
};

template <class B>
concept has_bulk_loops = requires(B& backend, index_t n, index_t* to, std::span<const index_t> values) {
  { backend.for_each(n, archetype_bulk_body{}) } -> std::same_as<status>;
  { backend.upload(to, values) } -> std::same_as<status>;
};

template <class B>
concept has_top_k_scratch = std::constructible_from<typename B::top_k_scratch, const B&, const bulk_shape&, workspace&>;

template <class B>
concept has_bulk_top_k = requires(B& backend, typename B::top_k_scratch& scratch, const std::uint32_t* keys,
                                  const bulk_rows& rows, index_t rows_per_segment, const index_t* wanted,
                                  top_k_pivot<std::uint32_t>* pivots, const top_k_pivot<std::uint32_t>* found,
                                  index_t* counts, const bulk_kept& kept) {
  { backend.find_pivots(scratch, keys, rows, rows_per_segment, wanted, pivots) } -> std::same_as<status>;
  { backend.count_chosen(scratch, keys, rows, rows_per_segment, found, counts) } -> std::same_as<status>;
  { backend.write_chosen(scratch, keys, rows, found, kept) } -> std::same_as<status>;
};

}  // namespace detail

/// A tensor backend that also has:
///
/// * `for_each(n, body)`: body(i) for i in [0, n), each once, in any order, maybe at the same time; `body` is trivially
///   copyable and callable where the backend's memory is.
/// * `upload(to, values)`: copies host values to the backend's memory; the host may change them when the call is back.
/// * `top_k_scratch`: working memory of the three primitives below, carved by its constructor
///   `(backend, shape, workspace)`, once with a counting workspace and once with a real one.
/// * `find_pivots(scratch, keys, rows, rows_per_segment, wanted, pivots)`: pivots[s] = the pivot of the wanted[s]
///   largest of the keys (0 .. units_of(row)) of rows s * rows_per_segment .. (s + 1) * rows_per_segment, all together;
///   see `find_pivot`. Key 0 never counts.
/// * `count_chosen(scratch, keys, rows, rows_per_segment, pivots, counts)`: counts[row] = how many keys of the row lie
///   above its segment's pivot, or equal it and are among the first `pivots[s].equal` such keys of the segment, by row,
///   then unit.
/// * `write_chosen(scratch, keys, rows, pivots, kept)`: for each row, with a pivot of its own, the positions of the
///   tokens of its chosen units (as above) and of those with key 0, which are protected, ascending: span.begin + token;
///   their number goes to `kept.lengths`. A unit that would pass the capacity is left out.
///
/// All return at once where the backend is asynchronous, and run in the order of the calls. keys, wanted, pivots,
/// counts and kept lie in the backend's memory. A call that fails has changed nothing that the caller sees as a result.
///
/// One that is a `bounding_backend` too is asked for bounds, and then two or three times for the scores of some tokens,
/// where it says that this pays and the policy admits it; see bulk_pruning.hpp.
template <class B>
concept bulk_backend = tensor_backend<B> && std::same_as<typename B::score_type, float> && detail::has_bulk_loops<B> &&
    detail::has_top_k_scratch<B> && detail::has_bulk_top_k<B>;

}  // namespace restkv
