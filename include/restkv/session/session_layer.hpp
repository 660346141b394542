// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a session holds of one layer, and how tokens come and go.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <algorithm>
#include <array>
#include <span>

namespace restkv {

namespace detail {

/// [heads, tokens, head_dim] as a batch of one.
template <class T>
[[nodiscard]] tensor_view<T, 4> with_batch(const tensor_view<T, 3>& view) noexcept {
  return {view.data,
          {1, view.extent(0), view.extent(1), view.extent(2)},
          {view.size(), view.stride(0), view.stride(1), view.stride(2)}};
}

/// That an input of a session has its shape, and lies outside the session's memory.
template <class T>
[[nodiscard]] status check_session_tensor(const char* name, const tensor_view<const T, 3>& tensor,
                                          const std::array<index_t, 3>& wanted,
                                          std::span<const std::byte> memory) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (tensor.extents != wanted) {
    return status::error(errc::shape_mismatch, "%s is [%lld, %lld, %lld], [%lld, %lld, %lld] is needed", name,
                         ll(tensor.extent(0)), ll(tensor.extent(1)), ll(tensor.extent(2)), ll(wanted[0]), ll(wanted[1]),
                         ll(wanted[2]));
  }
  RESTKV_RETURN_IF_FAILED(check_view(name, tensor));
  const auto* const begin = reinterpret_cast<const unsigned char*>(memory.data());
  if (touched_bytes(tensor).overlaps({begin, begin + memory.size()})) {
    return status::error(errc::aliasing, "%s lies in the session's own memory", name);
  }
  return {};
}

/// What a session holds of one layer. Slots [0, length of the head) are in use, slots behind them are leftovers.
template <class T>
struct session_layer {
  tensor_view<T, 3> key{};                     ///< [kv_heads, capacity, head_dim]
  tensor_view<T, 3> value{};                   ///< [kv_heads, capacity, head_dim]
  tensor_view<position_t, 2> positions{};      ///< in the sequence as it was appended, [kv_heads, capacity]
  tensor_view<std::int32_t, 2> lengths{};      ///< speculated tokens included, [1, kv_heads]
  /// The query of token t lies in rows t mod query_rows and query_rows + t mod query_rows, so that the last ones always
  /// lie behind each other. [query_heads, 2 query_rows, head_dim]
  tensor_view<T, 3> queries{};
  tensor_view<double, 2> running{};            ///< [query_heads, capacity]
  tensor_view<std::int32_t, 2> observers{};    ///< queries that saw the token, [kv_heads, capacity]
  tensor_view<double, 3> attention{};          ///< of speculated tokens, [speculation, query_heads, capacity]
  tensor_view<const T, 2> projection{};        ///< W_O, see `layer_view`
  output_metric_view metric{};                 ///< from W_O
  index_t seen = 0;                            ///< tokens appended, speculated ones left out
  index_t since_eviction = 0;                  ///< tokens since the last eviction
  index_t evictions = 0;                       ///< that dropped something
  index_t speculated = 0;                      ///< tokens at the end that may be taken back

  /// Tokens of the longest head.
  [[nodiscard]] index_t longest() const noexcept {
    return *std::max_element(lengths.data, lengths.data + lengths.extent(1));
  }
  /// The first of the two rows that hold the query of a token.
  [[nodiscard]] index_t query_row(index_t token) const noexcept { return token % (queries.extent(1) / 2); }

  /// The cache, with the last `window` queries or as many as there are.
  [[nodiscard]] layer_view<T> view(index_t window) const noexcept {
    layer_view<T> cache;
    cache.key = with_batch(key).slice(2, 0, longest());
    cache.value = with_batch(value).slice(2, 0, longest());
    cache.head_lengths = lengths;
    cache.pad = padding::right;
    cache.projection = projection;
    cache.metric = metric;
    const index_t count = std::min(window, seen + speculated);
    cache.query = with_batch(queries).slice(2, count == 0 ? 0 : query_row(seen + speculated - count), count);
    return cache;
  }

  /// Writes a token's query to its second row.
  void repeat_query(index_t token) noexcept {
    const index_t row = query_row(token);
    for (index_t h = 0; h < queries.extent(0); ++h) {
      std::copy_n(&queries(h, row, 0), queries.extent(2), &queries(h, row + queries.extent(1) / 2, 0));
    }
  }

  /// The next token's key and value, token i of [kv_heads, n, head_dim], behind the others.
  void store(const tensor_view<const T, 3>& new_key, const tensor_view<const T, 3>& new_value, index_t i) noexcept {
    for (index_t h = 0; h < key.extent(0); ++h) {
      const index_t slot = lengths(0, h);
      for (index_t c = 0; c < key.extent(2); ++c) {
        key(h, slot, c) = new_key(h, i, c);
        value(h, slot, c) = new_value(h, i, c);
      }
      begin_token(h);
    }
  }

  /// The next token of a head, whose key and value lie in a slot behind the others already.
  void move_behind(index_t h, index_t from) noexcept {
    const index_t slot = lengths(0, h);
    if (slot != from) {
      std::copy_n(key[h][from].data, key.extent(2), key[h][slot].data);
      std::copy_n(value[h][from].data, value.extent(2), value[h][slot].data);
    }
    begin_token(h);
  }

  /// The next token's query, token i of [query_heads, n, head_dim]; before `store`.
  void store_query(const tensor_view<const T, 3>& query, index_t i) noexcept {
    const index_t token = seen + speculated;
    for (index_t h = 0; h < queries.extent(0); ++h) {
      for (index_t c = 0; c < queries.extent(2); ++c) queries(h, query_row(token), c) = query(h, i, c);
    }
    repeat_query(token);
  }

  /// One more query's scores, score(query head, slot), of the slots [0, count(KV head)).
  template <class Running, class Score, class Count>
  void fold(const Running& reduction, const Score& score, const Count& count) noexcept {
    const index_t group = running.extent(0) / key.extent(0);
    for (index_t h = 0; h < running.extent(0); ++h) {
      for (index_t slot = 0; slot < count(h / group); ++slot) {
        double& kept = running(h, slot);
        const index_t seen_by = observers(h / group, slot);
        kept = reduction.fold(seen_by == 0 ? 0.0 : kept, score(h, slot), seen_by);
      }
    }
    for (index_t h = 0; h < key.extent(0); ++h) {
      for (index_t slot = 0; slot < count(h); ++slot) ++observers(h, slot);
    }
  }

  /// What is known of the kept tokens moves as they do. Positions ascend: nothing is overwritten before it was read.
  void keep(const kept_tokens& kept) noexcept {
    for (index_t h = 0; h < key.extent(0); ++h) {
      const index_t length = kept.lengths(0, h);
      for (index_t i = 0; i < length; ++i) {
        const index_t from = kept.positions(0, h, i);
        positions(h, i) = positions(h, from);
        if (observers.data == nullptr) continue;
        observers(h, i) = observers(h, from);
        const index_t group = running.extent(0) / key.extent(0);
        for (index_t q = h * group; q < (h + 1) * group; ++q) running(q, i) = running(q, from);
      }
      lengths(0, h) = static_cast<std::int32_t>(length);
    }
  }

  /// Without the speculated tokens.
  void take_back() noexcept {
    for (index_t h = 0; h < key.extent(0); ++h) lengths(0, h) -= static_cast<std::int32_t>(speculated);
    speculated = 0;
  }

  /// Forgets the tokens.
  void clear() noexcept {
    std::fill_n(lengths.data, lengths.extent(1), 0);
    seen = since_eviction = evictions = speculated = 0;
  }

 private:
  void begin_token(index_t h) noexcept {
    const index_t slot = lengths(0, h)++;
    positions(h, slot) = static_cast<position_t>(seen + speculated);
    if (observers.data != nullptr) observers(h, slot) = 0;
  }
};

/// Calls visit(count, pointers...) for each array of a layer that is in use, in the order in which they are stored. All
/// layers have the sizes of the first; queries are visited in their first rows.
template <class Visit, class T, class... More>
void visit_arrays(index_t window, const Visit& visit, session_layer<T>& first, More&... more) {
  const index_t head_dim = first.key.extent(2);
  const index_t kv_heads = first.key.extent(0);
  for (index_t h = 0; h < kv_heads; ++h) {
    const index_t length = first.lengths(0, h);
    visit(length, first.positions[h].data, more.positions[h].data...);
    visit(length * head_dim, first.key[h].data, more.key[h].data...);
    visit(length * head_dim, first.value[h].data, more.value[h].data...);
    if (first.observers.data != nullptr) visit(length, first.observers[h].data, more.observers[h].data...);
  }
  for (index_t h = 0; h < first.running.extent(0) && first.running.data != nullptr; ++h) {
    const index_t length = first.lengths(0, h * kv_heads / first.running.extent(0));
    visit(length, first.running[h].data, more.running[h].data...);
  }
  for (index_t token = first.seen - std::min(window, first.seen); token < first.seen; ++token) {
    const index_t row = first.query_row(token);
    for (index_t h = 0; h < first.queries.extent(0); ++h) {
      visit(head_dim, first.queries[h][row].data, more.queries[h][row].data...);
    }
  }
}

/// Copies a layer to one of the same sizes, but for its projection.
template <class T>
void copy_layer(index_t window, session_layer<T>& from, session_layer<T>& to) noexcept {
  to.seen = from.seen;
  to.since_eviction = from.since_eviction;
  to.evictions = from.evictions;
  std::copy_n(from.lengths.data, from.lengths.extent(1), to.lengths.data);
  visit_arrays(
      window, [](index_t count, const auto* source, auto* target) { std::copy_n(source, count, target); }, from, to);
  for (index_t token = to.seen - std::min(window, to.seen); token < to.seen; ++token) to.repeat_query(token);
}

}  // namespace detail

}  // namespace restkv
