// SPDX-License-Identifier: Apache-2.0
/// @file
/// `merged_cache`: a compacted cache whose entries may stand for more than one token.
#pragma once

#include <restkv/cache/compact.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/core/vector_math.hpp>

#include <algorithm>

namespace restkv {

/// A compacted cache, as `compact` wrote it, on which `merge`, `add_summary` and `fit_values` work. A view.
///
/// Entry i < kept.lengths(b, h) is at the RoPE position of the token kept.positions(b, h, i), and a query sees it
/// where it sees that token. One more entry may follow, where lengths(b, h) is kept.lengths(b, h) + 1: it belongs to no
/// position, and every query sees it (`add_summary`).
template <cache_layout KeyLayout, cache_layout ValueLayout>
struct merged_cache {
  const_kept_tokens kept{};                ///< the set that was compacted
  KeyLayout key{};                         ///< [batch, heads] rows of head_dim channels
  ValueLayout value{};                     ///< [batch, heads] rows of head_dim channels
  tensor_view<position_t, 2> lengths{};    ///< entries of each head, [batch, heads]; optional: kept.lengths

  /// Entries of a head.
  [[nodiscard]] constexpr index_t length(index_t b, index_t h) const noexcept {
    return lengths.data == nullptr ? kept.lengths(b, h) : lengths(b, h);
  }
};
/// `merged_cache{kept, key, value}` finds the layouts' types.
template <class KeyLayout, class ValueLayout>
merged_cache(const_kept_tokens, KeyLayout, ValueLayout) -> merged_cache<KeyLayout, ValueLayout>;
/// The same with `lengths`.
template <class KeyLayout, class ValueLayout>
merged_cache(const_kept_tokens, KeyLayout, ValueLayout, tensor_view<position_t, 2>)
    -> merged_cache<KeyLayout, ValueLayout>;

namespace detail {

template <class Layout>
concept element_layout = element<typename Layout::value_type> && !std::is_const_v<typename Layout::value_type>;

/// That `cache` is a compaction of the layer's first `tokens` tokens, and that nothing it may write is read.
template <class KeyLayout, class ValueLayout, element T>
[[nodiscard]] status check_merged(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer,
                                  index_t tokens, index_t window) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const problem_shape shape = shape_of(layer);
  if (layer.key.missing()) return status::error(errc::missing_input, "the layer has no key");
  if (shape.head_dim < 1 || shape.head_dim > 4096) {
    return status::error(errc::invalid_argument, "head_dim is %lld, must be within [1, 4096]", ll(shape.head_dim));
  }
  RESTKV_RETURN_IF_FAILED(check_source("key", layer.key));
  RESTKV_RETURN_IF_FAILED(check_layer(layer, shape, window, window > 0, true, false));
  if (window > 0) RESTKV_RETURN_IF_FAILED(check_groups(shape.query_heads, shape.kv_heads));
  if (window > 0 && layer.projection.data != nullptr) {
    RESTKV_RETURN_IF_FAILED(check_projection_width(layer.projection, shape.query_heads, shape.head_dim));
    RESTKV_RETURN_IF_FAILED(check_view("W_O", layer.projection));
  }
  RESTKV_RETURN_IF_FAILED(check_kept_memory(cache.kept));
  RESTKV_RETURN_IF_FAILED(check_kept(cache.kept, shape.batch, shape.kv_heads, tokens));
  if (cache.kept.heads() < 1) {
    return status::error(errc::shape_mismatch, "the kept set has %lld heads, key has %lld", ll(cache.kept.heads()),
                         ll(shape.kv_heads));
  }
  if (window > 0 && shape.query_heads % cache.kept.heads() != 0) {
    return status::error(errc::shape_mismatch,
                         "the kept set has %lld heads, query has %lld: query heads must be a multiple of them",
                         ll(cache.kept.heads()), ll(shape.query_heads));
  }
  RESTKV_RETURN_IF_FAILED(check_room(cache.kept, "key entries", cache.key));
  RESTKV_RETURN_IF_FAILED(check_room(cache.kept, "value entries", cache.value));
  RESTKV_RETURN_IF_FAILED(check_equal("key entries", "channels", cache.key.head_dim(), "key", shape.head_dim));
  RESTKV_RETURN_IF_FAILED(check_equal("value entries", "channels", cache.value.head_dim(), "value", shape.head_dim));
  if (cache.lengths.data != nullptr) {
    RESTKV_RETURN_IF_FAILED(check_equal("lengths", "sequences", cache.lengths.extent(0), "the kept set", shape.batch));
    RESTKV_RETURN_IF_FAILED(
        check_equal("lengths", "heads", cache.lengths.extent(1), "the kept set", cache.kept.heads()));
  }
  for (index_t b = 0; b < shape.batch; ++b) {
    for (index_t h = 0; h < cache.kept.heads(); ++h) {
      const index_t kept = cache.kept.lengths(b, h);
      const index_t entries = cache.length(b, h);
      const index_t most = std::min({cache.key.capacity(b, h), cache.value.capacity(b, h), kept + 1});
      if (entries < kept || entries > most) {
        return status::error(errc::invalid_argument,
                             "head %lld of sequence %lld has %lld entries, must be within [%lld, %lld]", ll(h), ll(b),
                             ll(entries), ll(kept), ll(most));
      }
    }
  }
  return check_kept_sequences(cache.kept, layer);
}

/// That what is written shares no memory with what is read.
template <class KeyLayout, class ValueLayout, element T>
[[nodiscard]] status check_written(const merged_cache<KeyLayout, ValueLayout>& cache,
                                   const layer_view<T>& layer) noexcept {
  RESTKV_RETURN_IF_FAILED(check_untouched("key", layer.key, "key entries", cache.key));
  RESTKV_RETURN_IF_FAILED(check_untouched("value", layer.value, "key entries", cache.key));
  RESTKV_RETURN_IF_FAILED(check_untouched("key", layer.key, "value entries", cache.value));
  RESTKV_RETURN_IF_FAILED(check_untouched("value", layer.value, "value entries", cache.value));
  const byte_range query = touched_bytes(layer.query);
  RESTKV_RETURN_IF_FAILED(check_disjoint("key entries", cache.key.touched(), "query", query));
  RESTKV_RETURN_IF_FAILED(check_disjoint("value entries", cache.value.touched(), "query", query));
  const byte_range projection = touched_bytes(layer.projection);
  RESTKV_RETURN_IF_FAILED(check_disjoint("key entries", cache.key.touched(), "W_O", projection));
  RESTKV_RETURN_IF_FAILED(check_disjoint("value entries", cache.value.touched(), "W_O", projection));
  if (cache.lengths.data != nullptr) {
    const byte_range lengths = touched_bytes(cache.lengths);
    RESTKV_RETURN_IF_FAILED(check_disjoint("key entries", cache.key.touched(), "lengths", lengths));
    RESTKV_RETURN_IF_FAILED(check_disjoint("value entries", cache.value.touched(), "lengths", lengths));
  }
  return check_separate(cache.kept, "key entries", cache.key, "value entries", cache.value);
}

/// Writes a vector. [count]
template <std::floating_point Real, class T>
void narrow_row(const Real* from, index_t count, const tensor_view<T, 1>& row) noexcept {
  for (index_t c = 0; c < count; ++c) row.data[c * row.stride(0)] = narrow<T>(from[c]);
}

/// Calls visit(token, key row, value row) for the tokens [begin, end) of one KV head.
template <element T, class Visit>
void for_each_token(const layer_view<T>& layer, index_t b, index_t kv_head, index_t begin, index_t end,
                    const Visit& visit) noexcept {
  index_t token = begin;
  while (token < end) {
    const auto key = layer.key.from_token(token);
    const auto value = layer.value.from_token(token);
    const index_t count = std::min({key.extent(2), value.extent(2), end - token});
    const auto keys = key[b][kv_head];
    const auto values = value[b][kv_head];
    for (index_t n = 0; n < count; ++n) visit(token + n, keys[n], values[n]);
    token += count;
  }
}

}  // namespace detail

}  // namespace restkv
