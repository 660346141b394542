// SPDX-License-Identifier: Apache-2.0
/// @file
/// Where a head's tokens lie after compaction: the `cache_layout` concept and its two simple models.
#pragma once

#include <restkv/core/check_view.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

#include <concepts>

namespace restkv {

namespace detail {

template <class L>
concept has_value_type = requires { typename L::value_type; };

template <class L>
concept has_batch_heads_and_head_dim = requires(const L& layout) {
  { layout.batch() } -> std::convertible_to<index_t>;
  { layout.heads() } -> std::convertible_to<index_t>;
  { layout.head_dim() } -> std::convertible_to<index_t>;
};

template <class L>
concept has_capacity_of_each_head = requires(const L& layout, index_t i) {
  { layout.capacity(i, i) } -> std::convertible_to<index_t>;
};

template <class L>
concept has_row_of_each_slot = requires(const L& layout, index_t i) {
  { layout.row(i, i, i) } -> std::convertible_to<tensor_view<typename L::value_type, 1>>;
};

template <class L>
concept has_touched_bytes = requires(const L& layout) {
  { layout.touched() } -> std::convertible_to<byte_range>;
};

template <class L>
concept has_check = requires(const L& layout) {
  { layout.check() } -> std::convertible_to<status>;
};

}  // namespace detail

/// A destination for kept tokens: `value_type`; `batch()`, `heads()` and `head_dim()`; `row(b, h, slot)` is the vector of head_dim channels that holds the head's
/// `slot`-th kept token; `capacity(b, h)` is how many slots the head has; `touched()` bounds the memory written, for
/// the aliasing check; `check()` says whether the layout itself is consistent.
template <class L>
concept cache_layout = detail::has_value_type<L> && detail::has_batch_heads_and_head_dim<L> &&
                       detail::has_capacity_of_each_head<L> && detail::has_row_of_each_slot<L> &&
                       detail::has_touched_bytes<L> && detail::has_check<L>;

namespace detail {

/// That there is an offset for each head of a batch, and one behind the last.
[[nodiscard]] inline status check_ragged_entries(index_t entries, index_t sequences, index_t heads) noexcept {
  const index_t needed = saturated_sum(saturated_product(sequences, heads), 1);
  if (entries == needed) return {};
  return status::error(errc::shape_mismatch, "ragged offsets have %lld entries, %lld sequences of %lld heads need %lld",
                       static_cast<long long>(entries), static_cast<long long>(sequences),
                       static_cast<long long>(heads), static_cast<long long>(needed));
}

}  // namespace detail

/// [batch, heads, capacity, head_dim]: every head has the same number of slots.
template <class T>
struct dense_layout {
  using value_type = T;      ///< of keys or values
  tensor_view<T, 4> rows{};  ///< [batch, heads, capacity, head_dim]

  ///@{
  /// See `cache_layout`.
  [[nodiscard]] constexpr index_t batch() const noexcept { return rows.extent(0); }
  [[nodiscard]] constexpr index_t heads() const noexcept { return rows.extent(1); }
  [[nodiscard]] constexpr index_t head_dim() const noexcept { return rows.extent(3); }
  [[nodiscard]] constexpr index_t capacity(index_t, index_t) const noexcept { return rows.extent(2); }
  [[nodiscard]] constexpr tensor_view<T, 1> row(index_t b, index_t h, index_t slot) const noexcept {
    return rows[b][h][slot];
  }
  [[nodiscard]] byte_range touched() const noexcept { return touched_bytes(rows); }
  [[nodiscard]] status check() const noexcept { return {}; }
  ///@}
};
/// `dense_layout{view}` finds the element type.
template <class T>
dense_layout(tensor_view<T, 4>) -> dense_layout<T>;

/// All heads' tokens behind each other, as variable-length attention kernels take them: head h of sequence b occupies
/// rows offsets(b * heads + h) .. offsets(b * heads + h + 1) of a [total_tokens, head_dim] buffer.
template <class T>
struct ragged_layout {
  using value_type = T;                          ///< of keys or values
  tensor_view<T, 2> rows{};                      ///< [total_tokens, head_dim]
  tensor_view<const std::int64_t, 1> offsets{};  ///< [batch * heads + 1], ascending from 0 (cu_seqlens)
  index_t sequences = 0;                         ///< batch
  index_t heads_per_sequence = 0;                ///< rows of the kept set per sequence

  ///@{
  /// See `cache_layout`.
  [[nodiscard]] constexpr index_t batch() const noexcept { return sequences; }
  [[nodiscard]] constexpr index_t heads() const noexcept { return heads_per_sequence; }
  [[nodiscard]] constexpr index_t head_dim() const noexcept { return rows.extent(1); }
  [[nodiscard]] constexpr index_t capacity(index_t b, index_t h) const noexcept {
    const index_t i = b * heads_per_sequence + h;
    return offsets(i + 1) - offsets(i);
  }
  [[nodiscard]] constexpr tensor_view<T, 1> row(index_t b, index_t h, index_t slot) const noexcept {
    return rows[offsets(b * heads_per_sequence + h) + slot];
  }
  [[nodiscard]] byte_range touched() const noexcept { return touched_bytes(rows); }
  ///@}
  /// Offsets must have batch * heads + 1 entries, ascend from 0 and end within the buffer.
  [[nodiscard]] status check() const noexcept {
    const index_t entries = offsets.extent(0);
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    RESTKV_RETURN_IF_FAILED(detail::check_view("offsets", offsets));
    RESTKV_RETURN_IF_FAILED(detail::check_ragged_entries(entries, sequences, heads_per_sequence));
    for (index_t i = 0; i + 1 < entries; ++i) {
      if (offsets(i) < 0 || offsets(i + 1) < offsets(i)) {
        return status::error(errc::invalid_argument, "ragged offset %lld is %lld and the next is %lld: they must ascend",
                             ll(i), ll(offsets(i)), ll(offsets(i + 1)));
      }
    }
    if (offsets(entries - 1) > rows.extent(0)) {
      return status::error(errc::shape_mismatch, "ragged offsets end at row %lld, the buffer has %lld rows",
                           ll(offsets(entries - 1)), ll(rows.extent(0)));
    }
    return {};
  }
};

}  // namespace restkv
