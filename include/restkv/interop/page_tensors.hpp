// SPDX-License-Identifier: Apache-2.0
/// @file
/// Pools of pages as engines lay them out, as the views [pages, kv_heads, page_size, head_dim] that compaction takes.
///
/// - FlashInfer: [pages, 2, page_size, kv_heads, head_dim] (NHD) or [pages, 2, kv_heads, page_size, head_dim] (HND) by
///   `key_value_pages` with the pair on axis 1; keys and values in two tensors, without the 2, by `head_pages`.
/// - vLLM: [2, pages, page_size, kv_heads, head_dim] for FlashAttention, the pair on axis 0, and [pages, 2, page_size,
///   kv_heads, head_dim] for FlashInfer, on axis 1. Its shapes name tokens before heads whatever lies first in memory,
///   which is in the strides: so NHD for both.
/// - PagedAttention's own kernels: keys [pages, kv_heads, head_dim / x, page_size, x] by `channel_pages`, values
/// [pages,
///   kv_heads, head_dim, page_size] by `transposed_pages`.
/// - A table for each KV head: [pages, page_size, head_dim] is a view [pages, 1, page_size, head_dim].
///
/// Strides are those of the engine's tensor, so a permuted or sliced one works as it is.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

namespace restkv {

/// What comes first in a page of all KV heads: `nhd` tokens, then heads; `hnd` heads, then tokens.
enum class page_order { nhd, hnd };

/// Keys and values of one pool.
template <class T, memory_space Space = memory_space::host>
struct page_pair {
  tensor_view<T, 4, Space> key{};    ///< [pages, kv_heads, page_size, head_dim]
  tensor_view<T, 4, Space> value{};  ///< [pages, kv_heads, page_size, head_dim]
};

/// A pool of keys or of values, in its order of axes, as [pages, kv_heads, page_size, head_dim].
template <class T, memory_space Space>
[[nodiscard]] constexpr tensor_view<T, 4, Space> head_pages(const tensor_view<T, 4, Space>& pool,
                                                            page_order order) noexcept {
  if (order == page_order::hnd) return pool;
  return {pool.data,
          {pool.extent(0), pool.extent(2), pool.extent(1), pool.extent(3)},
          {pool.stride(0), pool.stride(2), pool.stride(1), pool.stride(3)}};
}

/// A pool that holds keys and values, told apart by index 0 and 1 of axis `pair_axis`, which is 0 or 1.
///
/// Fails, with `out` as it was, for another axis and for an extent that is not 2.
template <class T, memory_space Space>
[[nodiscard]] status key_value_pages(const tensor_view<T, 5, Space>& pool, std::size_t pair_axis, page_order order,
                                     page_pair<T, Space>& out) noexcept {
  if (pair_axis > 1) {
    return status::error(errc::invalid_argument, "keys and values are told apart by axis %zu, must be 0 or 1",
                         pair_axis);
  }
  if (pool.extent(pair_axis) != 2) {
    return status::error(errc::shape_mismatch, "the pool has extent %lld on axis %zu, keys and values need 2",
                         static_cast<long long>(pool.extent(pair_axis)), pair_axis);
  }
  const std::size_t page_axis = 1 - pair_axis;
  const auto half = [&](index_t which) {
    T* const data = pool.data == nullptr ? nullptr : pool.data + which * pool.stride(pair_axis);
    return head_pages(
        tensor_view<T, 4, Space>{data,
                                 {pool.extent(page_axis), pool.extent(2), pool.extent(3), pool.extent(4)},
                                 {pool.stride(page_axis), pool.stride(2), pool.stride(3), pool.stride(4)}},
        order);
  };
  out = {half(0), half(1)};
  return {};
}

/// Values whose tokens come last, [pages, kv_heads, head_dim, page_size], as [pages, kv_heads, page_size, head_dim].
template <class T, memory_space Space>
[[nodiscard]] constexpr tensor_view<T, 4, Space> transposed_pages(const tensor_view<T, 4, Space>& pool) noexcept {
  return {pool.data,
          {pool.extent(0), pool.extent(1), pool.extent(3), pool.extent(2)},
          {pool.stride(0), pool.stride(1), pool.stride(3), pool.stride(2)}};
}

/// Keys whose channels are cut into pieces of x that lie apart, [pages, kv_heads, head_dim / x, page_size, x]: channels
/// piece * x to (piece + 1) * x - 1 of them, as [pages, kv_heads, page_size, x].
///
/// No view of four axes has all of the channels. Move them piece by piece: `move_tokens` once for each, under one plan
/// of `plan_page_moves`. To score such keys, copy them out piece by piece (`copy_pages` to slices of the channels).
///
/// piece: within [0, pool.extent(2)), which is the caller's to keep.
template <class T, memory_space Space>
[[nodiscard]] constexpr tensor_view<T, 4, Space> channel_pages(const tensor_view<T, 5, Space>& pool,
                                                               index_t piece) noexcept {
  return {pool.data == nullptr ? nullptr : pool.data + piece * pool.stride(2),
          {pool.extent(0), pool.extent(1), pool.extent(3), pool.extent(4)},
          {pool.stride(0), pool.stride(1), pool.stride(3), pool.stride(4)}};
}

}  // namespace restkv
