// SPDX-License-Identifier: Apache-2.0
/// @file
/// Do strided views share memory? Bounds are not enough: keys and values interleaved in one buffer, [batch, tokens, 2,
/// heads, head_dim], span the same bytes and share none.
#pragma once

#include <restkv/core/tensor_view.hpp>

#include <algorithm>
#include <array>

namespace restkv {

namespace detail {

/// One axis of two views in bytes, step >= 0: index i of the first view and j of the second are (i - j) * step apart,
/// and i - j takes every value within [-most_second, most_first].
struct paired_axis {
  index_t step = 0;
  index_t most_first = 0;
  index_t most_second = 0;

  /// Farthest that this axis leads, in bytes.
  [[nodiscard]] constexpr index_t reach() const noexcept { return std::max(most_first, most_second) * step; }
};

[[nodiscard]] constexpr index_t magnitude(index_t n) noexcept { return n < 0 ? -n : n; }

/// Bytes from one index of an axis to the next, whichever way; 0 for an axis with one index.
template <class T, std::size_t Rank, memory_space Space>
[[nodiscard]] constexpr index_t step_of(const tensor_view<T, Rank, Space>& view, std::size_t axis) noexcept {
  return view.extents[axis] == 1 ? 0 : magnitude(view.strides[axis]) * static_cast<index_t>(sizeof(T));
}

/// Sorts axes by step, the widest first; true when every step passes all that the narrower axes reach together, as in
/// every slice or transposition of a dense tensor. Distinct indices then have distinct addresses.
template <std::size_t Count>
[[nodiscard]] constexpr bool nest(std::array<paired_axis, Count>& axes) noexcept {
  std::sort(axes.begin(), axes.end(), [](const paired_axis& a, const paired_axis& b) {
    return a.step != b.step ? a.step > b.step : a.reach() > b.reach();
  });
  index_t inner = 0;
  for (std::size_t i = Count; i-- > 0;) {
    if (axes[i].most_first == 0 && axes[i].most_second == 0) continue;
    if (axes[i].step <= inner) return false;
    inner += axes[i].reach();
  }
  return true;
}

/// True when `distance` is a sum of one multiple of each step, each within its bounds. Over nested axes at most two
/// multiples of a step are within the reach of the rest, so the search ends after 2^Count steps.
template <std::size_t Count>
[[nodiscard]] constexpr bool reachable(const std::array<paired_axis, Count>& axes, std::size_t from,
                                       index_t distance) noexcept {
  while (from < Count && axes[from].most_first == 0 && axes[from].most_second == 0) ++from;
  if (from == Count) return distance == 0;
  index_t inner = 0;
  for (std::size_t i = from + 1; i < Count; ++i) inner += axes[i].reach();
  const paired_axis& axis = axes[from];
  const index_t nearest = distance / axis.step;  // rounded towards zero
  for (index_t multiple = nearest - 1; multiple <= nearest + 1; ++multiple) {
    if (multiple > axis.most_first || -multiple > axis.most_second) continue;
    const index_t rest = distance - multiple * axis.step;
    if (magnitude(rest) <= inner && reachable(axes, from + 1, rest)) return true;
  }
  return false;
}

}  // namespace detail

/// True when two indices of a view may name the same memory, as a stride of 0 makes them. Exact for slices and
/// transpositions of dense tensors; a view whose axes do not nest counts as overlapping, and so does one that no memory
/// can hold.
template <class T, std::size_t Rank, memory_space Space>
[[nodiscard]] bool may_overlap_itself(const tensor_view<T, Rank, Space>& view) noexcept {
  if (view.empty()) return false;
  if (detail::byte_span span; !detail::find_byte_span(view, span)) return true;
  std::array<detail::paired_axis, Rank> axes{};
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    axes[axis] = {detail::step_of(view, axis), view.extents[axis] - 1, view.extents[axis] - 1};
  }
  return !detail::nest(axes);
}

/// True when two views may share a byte. Exact when their bounds are disjoint or when they have the same strides in
/// bytes, up to sign, and nested axes (keys and values of one buffer); otherwise their bounds decide.
template <class T, class U, std::size_t Rank, memory_space Space>
[[nodiscard]] bool may_overlap(const tensor_view<T, Rank, Space>& first,
                               const tensor_view<U, Rank, Space>& second) noexcept {
  const byte_range a = touched_bytes(first);
  const byte_range b = touched_bytes(second);
  if (!a.overlaps(b)) return false;
  if (detail::byte_span span; !detail::find_byte_span(first, span) || !detail::find_byte_span(second, span))
    return true;
  std::array<detail::paired_axis, Rank + 1> axes{};
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    const index_t step_first = detail::step_of(first, axis);
    const index_t step_second = detail::step_of(second, axis);
    if (step_first != step_second && first.extents[axis] != 1 && second.extents[axis] != 1) return true;
    axes[axis] = {first.extents[axis] != 1 ? step_first : step_second, first.extents[axis] - 1,
                  second.extents[axis] - 1};
  }
  axes[Rank] = {1, static_cast<index_t>(sizeof(T)) - 1, static_cast<index_t>(sizeof(U)) - 1};
  return !detail::nest(axes) || detail::reachable(axes, 0, static_cast<index_t>(b.first - a.first));
}

}  // namespace restkv
