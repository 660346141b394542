// SPDX-License-Identifier: Apache-2.0
/// @file
/// Compaction: the kept keys and values of a cache, copied to a layout or moved to the front of the cache itself.
///
/// Which token a slot holds afterwards is `kept.positions` itself: slot i of head h holds what was at position
/// kept.positions(b, h, i). Keep it, or gather an array of positions along, for a later re-rotation (`rotate_keys`).
#pragma once

#include <restkv/cache/gather.hpp>

namespace restkv {

namespace detail {

/// Two outputs may interleave within their bounds, but not share an element.
template <cache_layout First, cache_layout Second>
[[nodiscard]] status check_separate(const const_kept_tokens& kept, const char* first, const First& a,
                                    const char* second, const Second& b) noexcept {
  const byte_range bytes_a = a.touched();
  const byte_range bytes_b = b.touched();
  if (!bytes_a.overlaps(bytes_b)) return {};
  if constexpr (requires {
                  { may_overlap(a.rows, b.rows) } -> std::same_as<bool>;
                }) {
    return may_overlap(a.rows, b.rows) ? overlap_error(first, second, bytes_a, bytes_b) : status{};
  } else {
    for (index_t i = 0; i < kept.batch(); ++i) {
      for (index_t h = 0; h < kept.heads(); ++h) {
        for (index_t slot = 0; slot < kept.lengths(i, h); ++slot) {
          const tensor_view<typename First::value_type, 1> row_a = a.row(i, h, slot);
          const tensor_view<typename Second::value_type, 1> row_b = b.row(i, h, slot);
          if (may_overlap(row_a, row_b)) return overlap_error(first, second, bytes_a, bytes_b);
        }
      }
    }
    return {};
  }
}

/// Moves the kept tokens of one head to its first slots. Positions ascend, so slot <= position: a token is never
/// written before it was read.
template <copyable_bytes T>
void compact_head(const const_kept_tokens& kept, const tensor_view<T, 4>& cache, index_t row) noexcept {
  const index_t b = row / kept.heads();
  const index_t h = row % kept.heads();
  const index_t length = kept.lengths(b, h);
  const tensor_view<T, 2> tokens = cache[b][h];  // [tokens, head_dim]
  token_copier<T> copier(cache.extent(3));
  for (index_t slot = 0; slot < length; ++slot) {
    const index_t position = kept.positions(b, h, slot);
    if (position != slot) copier.copy(tokens[position], tokens[slot]);
  }
  copier.flush();
}

/// That values have the sequences, heads and tokens of their keys.
template <class Key, class Value>
[[nodiscard]] status check_beside(const Key& key, const Value& value) noexcept {
  RESTKV_RETURN_IF_FAILED(check_equal("value", "sequences", value.extent(0), "key", key.extent(0)));
  RESTKV_RETURN_IF_FAILED(check_equal("value", "heads", value.extent(1), "key", key.extent(1)));
  return check_equal("value", "tokens", value.extent(2), "key", key.extent(2));
}

/// What `check_in_place` asks of memory, wherever it lies.
template <class Position, class T, memory_space Space>
[[nodiscard]] status check_memory_in_place(const basic_kept_tokens<Position, Space>& kept, const char* name,
                                           const tensor_view<T, 4, Space>& cache) noexcept {
  RESTKV_RETURN_IF_FAILED(check_one_set(kept.heads(), name, cache.extent(1)));
  RESTKV_RETURN_IF_FAILED(check_distinct(name, cache));
  return check_apart_from_kept(kept, name, touched_bytes(cache));
}

template <class T>
[[nodiscard]] status check_in_place(const const_kept_tokens& kept, const char* name,
                                    const tensor_view<T, 4>& cache) noexcept {
  RESTKV_RETURN_IF_FAILED(check_kept(kept, cache.extent(0), cache.extent(1), cache.extent(2)));
  return check_memory_in_place(kept, name, cache);
}

/// That an array takes the offsets of a kept set.
template <class Position, memory_space Space>
[[nodiscard]] status check_offsets(const basic_kept_tokens<Position, Space>& kept,
                                   const tensor_view<std::int64_t, 1, Space>& offsets) noexcept {
  RESTKV_RETURN_IF_FAILED(check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(check_view("offsets", offsets));
  RESTKV_RETURN_IF_FAILED(check_distinct("offsets", offsets));
  const index_t entries = kept.batch() * kept.heads() + 1;
  if (offsets.extent(0) != entries) {
    return status::error(errc::shape_mismatch, "offsets has %lld entries, %lld sequences of %lld heads need %lld",
                         static_cast<long long>(offsets.extent(0)), static_cast<long long>(kept.batch()),
                         static_cast<long long>(kept.heads()), static_cast<long long>(entries));
  }
  return check_apart_from_kept(kept, "offsets", touched_bytes(offsets));
}

}  // namespace detail

/// Copies the kept keys and values to two layouts: `gather_tokens` for both, with everything checked for both before
/// anything is written.
///
/// key: [batch, kv_heads, tokens, key_dim], value: [batch, kv_heads, tokens, value_dim], any strides, in one piece or
/// in chunks; out_key, out_value: layouts of [batch, kept.heads()] rows. Key and value may differ in channels and in
/// element type. A kept set per query head copies a KV head once for each of its query heads.
///
/// Fails as `gather_tokens` does; also when key and value differ in sequences, heads or tokens, when an output overlaps
/// the other tensor, and when the outputs share memory. The outputs may interleave within one buffer; for two layouts
/// other than `dense_layout` and `ragged_layout` that do, only rows of the same head and slot are compared.
///
/// Cost: one read and one write of the kept tokens; the aliasing check of two such interleaved layouts visits every
/// kept token once.
template <cache_layout KeyLayout, cache_layout ValueLayout, parallel_loop ParallelFor = serial_for>
  requires(detail::copyable_bytes<typename KeyLayout::value_type> &&
           detail::copyable_bytes<typename ValueLayout::value_type>)
[[nodiscard]] status compact(const const_kept_tokens& kept,
                             const chunked_tensor_view<const typename KeyLayout::value_type>& key,
                             const chunked_tensor_view<const typename ValueLayout::value_type>& value,
                             const KeyLayout& out_key, const ValueLayout& out_value,
                             const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_source("key", key));
  RESTKV_RETURN_IF_FAILED(detail::check_source("value", value));
  RESTKV_RETURN_IF_FAILED(detail::check_beside(key, value));
  RESTKV_RETURN_IF_FAILED(detail::check_gather(kept, "key", key, "out_key", out_key));
  RESTKV_RETURN_IF_FAILED(detail::check_gather(kept, "value", value, "out_value", out_value));
  RESTKV_RETURN_IF_FAILED(detail::check_untouched("value", value, "out_key", out_key));
  RESTKV_RETURN_IF_FAILED(detail::check_untouched("key", key, "out_value", out_value));
  RESTKV_RETURN_IF_FAILED(detail::check_separate(kept, "out_key", out_key, "out_value", out_value));
  parallel_for(kept.batch() * kept.heads(), [&](index_t row) {
    detail::gather_head(kept, key, out_key, row);
    detail::gather_head(kept, value, out_value, row);
  });
  return {};
}

/// Moves the kept keys and values to the front of their own heads: key[b][h][i] = key[b][h][kept.positions(b, h, i)],
/// likewise value. The tokens of a head behind its length hold leftovers afterwards.
///
/// key: [batch, kv_heads, tokens, key_dim], value: [batch, kv_heads, tokens, value_dim], any strides. They may
/// interleave within one buffer, but not share an element. Arrays of scales beside them are moved by a second call, as
/// tensors of one channel.
///
/// Fails, before anything is moved: a kept set that does not fit (`check_kept`) or was made per query head
/// (errc::unsupported: a KV head cannot hold several sets in place), other sequences, heads or tokens, a null pointer,
/// and memory shared within key or value (a stride of 0), between them, or with the kept set (errc::aliasing).
///
/// Cost: one read and one write of the kept tokens that move.
template <class K, class V, parallel_loop ParallelFor = serial_for>
  requires(detail::copyable_bytes<K> && detail::copyable_bytes<V>)
[[nodiscard]] status compact_in_place(const const_kept_tokens& kept, const tensor_view<K, 4>& key,
                                      const tensor_view<V, 4>& value, const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(detail::check_view("key", key));
  RESTKV_RETURN_IF_FAILED(detail::check_view("value", value));
  RESTKV_RETURN_IF_FAILED(detail::check_beside(key, value));
  RESTKV_RETURN_IF_FAILED(detail::check_in_place(kept, "key", key));
  RESTKV_RETURN_IF_FAILED(detail::check_in_place(kept, "value", value));
  if (may_overlap(key, value)) {
    return detail::overlap_error("key", "value", touched_bytes(key), touched_bytes(value));
  }
  parallel_for(kept.batch() * kept.heads(), [&](index_t row) {
    detail::compact_head(kept, key, row);
    detail::compact_head(kept, value, row);
  });
  return {};
}

/// Where each head's tokens begin in a ragged buffer that holds exactly the kept tokens: offsets(0) = 0,
/// offsets(r + 1) = offsets(r) + kept.lengths(b, h) for r = b * heads + h; the last entry is kept.total().
///
/// offsets: [batch * heads + 1], int64, as variable-length attention kernels take them (cu_seqlens) and as
/// `ragged_layout` wants them. Fails when the array has another size or shares memory with the kept set, and when a
/// length is outside [0, capacity].
[[nodiscard]] inline status ragged_offsets(const const_kept_tokens& kept,
                                           const tensor_view<std::int64_t, 1>& offsets) noexcept {
  RESTKV_RETURN_IF_FAILED(detail::check_offsets(kept, offsets));
  RESTKV_RETURN_IF_FAILED(detail::check_lengths(kept));
  std::int64_t end = 0;
  offsets(0) = 0;
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      end += kept.lengths(b, h);
      offsets(b * kept.heads() + h + 1) = end;
    }
  }
  return {};
}

}  // namespace restkv
