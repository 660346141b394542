// SPDX-License-Identifier: Apache-2.0
/// @file
/// What one attention layer hands over: `layer_view`, its `problem_shape`, and where each sequence lies in the batch.
#pragma once

#include <restkv/core/check_view.hpp>
#include <restkv/core/dtype.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

#include <algorithm>

namespace restkv {

/// Where the real tokens of a sequence shorter than the token axis lie: `left` padding puts them at its end,
/// `right` padding at its beginning.
enum class padding { left, right };

/// The metric in which a change of a head's output is measured, prepared from W_O once, when the model is loaded
/// (`output_metric`). G[h] = W[h]^T W[h] is the Gram matrix of the head's slice of the output projection.
template <memory_space Space>
struct basic_output_metric_view {
  /// G[h], in double. [query_heads, head_dim, head_dim]
  tensor_view<const double, 3, Space> gram{};
  /// The Cholesky factor L[h], lower triangular with L L^T = G, so that ||W x|| = ||L^T x||.
  /// [query_heads, head_dim, head_dim]
  tensor_view<const float, 3, Space> factor{};
  /// lambda_r, descending, never negative. [query_heads, head_dim]
  tensor_view<const float, 2, Space> spectrum{};

  /// True where a layer was given no metric.
  [[nodiscard]] constexpr bool missing() const noexcept { return gram.data == nullptr; }
};

/// A metric in memory of the host, as `output_metric` makes it.
using output_metric_view = basic_output_metric_view<memory_space::host>;

/// One attention layer's problem: views of memory the engine owns. Keys and queries are after RoPE. Lengths and the mask
/// are the host's, wherever the tensors lie: they decide what is launched.
///
/// `query` holds the last `n` queries of each sequence, oldest first, n >= the policy's window. With right padding and
/// n equal to the token axis, row i is the query of token i instead (the engine's whole query tensor).
template <element T, memory_space Space = memory_space::host>
struct layer_view {
  using value_type = T;  ///< of queries, keys and values

  tensor_view<const T, 4, Space> query{};          ///< [batch, query_heads, n, head_dim]
  chunked_tensor_view<const T, Space> key{};       ///< [batch, kv_heads, tokens, head_dim]
  chunked_tensor_view<const T, Space> value{};     ///< [batch, kv_heads, tokens, head_dim]
  tensor_view<const T, 2, Space> projection{};     ///< W_O [hidden, query_heads * head_dim]; optional
  basic_output_metric_view<Space> metric{};        ///< from W_O; needed by scores in the projection metric
  tensor_view<const std::int32_t, 1> lengths{};    ///< [batch]; optional, all tokens where missing
  padding pad = padding::left;                     ///< matters only where lengths are given
  /// [batch, kv_heads]; optional, the tokens of each KV head's cache where they differ: a cache that was compacted with
  /// a budget for each head. Then `lengths` does not act, and `query` always holds the last queries.
  tensor_view<const std::int32_t, 2> head_lengths{};
  tensor_view<const std::uint8_t, 2> keep_mask{};  ///< [batch, tokens]; optional, non-zero = never evicted
};

/// The sizes a plan is made for. A layer may have fewer tokens than `tokens`, never more.
struct problem_shape {
  index_t batch = 1;        ///< sequences
  index_t query_heads = 0;  ///< a multiple of kv_heads
  index_t kv_heads = 0;     ///< heads of the cache
  index_t head_dim = 0;     ///< channels of a head
  index_t tokens = 0;       ///< longest sequence (token axis)
  index_t layer = 0;        ///< index of this layer, for budgets that depend on depth
  index_t layers = 1;       ///< number of layers of the model
  /// Index in the layer of the first KV head, where the others lie elsewhere: random scores and noise depend on it.
  index_t first_kv_head = 0;

  /// Query heads per KV head.
  [[nodiscard]] constexpr index_t group() const noexcept { return kv_heads == 0 ? 0 : query_heads / kv_heads; }
  /// Index in the layer of the first query head.
  [[nodiscard]] constexpr index_t first_query_head() const noexcept { return first_kv_head * group(); }
};

/// The shape of a layer as it stands.
template <element T, memory_space Space>
[[nodiscard]] constexpr problem_shape shape_of(const layer_view<T, Space>& layer, index_t index = 0,
                                               index_t layers = 1) noexcept {
  return {.batch = layer.key.extent(0),
          .query_heads = layer.query.extent(1),
          .kv_heads = layer.key.extent(1),
          .head_dim = layer.key.extent(3),
          .tokens = layer.key.extent(2),
          .layer = index,
          .layers = layers};
}

/// The tokens of one sequence on the token axis: [begin, begin + length).
struct sequence_span {
  index_t begin = 0;   ///< first real token
  index_t length = 0;  ///< real tokens
};

/// Where sequence `batch` lies in the cache of a KV head: by `head_lengths` or `lengths` and by `pad`, the whole token
/// axis without lengths.
template <element T, memory_space Space>
[[nodiscard]] constexpr sequence_span sequence(const layer_view<T, Space>& layer, index_t batch,
                                               index_t kv_head) noexcept {
  const index_t tokens = layer.key.extent(2);
  index_t length = tokens;
  if (layer.head_lengths.data != nullptr) {
    length = layer.head_lengths(batch, kv_head);
  } else if (layer.lengths.data != nullptr) {
    length = layer.lengths(batch);
  }
  return {layer.pad == padding::left ? tokens - length : 0, length};
}

/// Tokens that every KV head of sequence `batch` has.
template <element T, memory_space Space>
[[nodiscard]] constexpr index_t shortest_head(const layer_view<T, Space>& layer, index_t batch) noexcept {
  index_t shortest = sequence(layer, batch, 0).length;
  for (index_t h = 1; h < layer.head_lengths.extent(1); ++h) {
    shortest = std::min<index_t>(shortest, sequence(layer, batch, h).length);
  }
  return shortest;
}

/// The row of `layer.query` that holds the oldest of a sequence's last `window` queries.
template <element T, memory_space Space>
[[nodiscard]] constexpr index_t first_window_row(const layer_view<T, Space>& layer, index_t batch,
                                                 index_t window) noexcept {
  const index_t rows = layer.query.extent(2);
  const bool follows_padding = layer.head_lengths.data == nullptr && layer.lengths.data != nullptr &&
                               layer.pad == padding::right && rows == layer.key.extent(2);
  return (follows_padding ? layer.lengths(batch) : rows) - window;
}

/// The last `window` queries of one sequence and head, oldest first. [window, head_dim]
template <element T, memory_space Space>
[[nodiscard]] constexpr tensor_view<const T, 2, Space> window_queries(const layer_view<T, Space>& layer, index_t batch,
                                                                      index_t head, index_t window) noexcept {
  return layer.query[batch][head].slice(0, first_window_row(layer, batch, window), window);
}

/// Checks that every KV head serves the same number of query heads, at least one.
[[nodiscard]] inline status check_groups(index_t query_heads, index_t kv_heads) noexcept {
  if (kv_heads >= 1 && query_heads >= 1 && query_heads % kv_heads == 0) return {};
  return status::error(errc::shape_mismatch,
                       "query has %lld heads, key has %lld: query heads must be a multiple of kv heads",
                       static_cast<long long>(query_heads), static_cast<long long>(kv_heads));
}

/// Checks that W_O is the view of a tensor, as wide as the query heads.
template <element T, memory_space Space>
[[nodiscard]] status check_projection_width(const tensor_view<const T, 2, Space>& projection, index_t query_heads,
                                            index_t head_dim) noexcept {
  RESTKV_RETURN_IF_FAILED(detail::check_view("W_O", projection));
  const index_t columns = projection.extent(1);
  const index_t needed = detail::saturated_product(query_heads, head_dim);
  if (columns == needed) return {};
  return status::error(errc::shape_mismatch, "W_O has %lld columns, %lld heads of %lld channels need %lld",
                       static_cast<long long>(columns), static_cast<long long>(query_heads),
                       static_cast<long long>(head_dim), static_cast<long long>(needed));
}

/// Checks that the tensors of a layer fit each other and the shape; names the first that does not, with both numbers.
template <element T, memory_space Space>
[[nodiscard]] status check_layer(const layer_view<T, Space>& layer, const problem_shape& shape, index_t window,
                                 bool needs_query, bool needs_value, bool needs_metric) noexcept {
  const auto mismatch = [](const char* tensor, const char* axis, index_t has, index_t want) {
    return status::error(errc::shape_mismatch, "%s has %lld %s, the plan has %lld", tensor, static_cast<long long>(has),
                         axis, static_cast<long long>(want));
  };
  const auto check_cache = [&](const char* name, const chunked_tensor_view<const T, Space>& cache) -> status {
    if (cache.missing()) return status::error(errc::missing_input, "the layer has no %s", name);
    for (index_t i = 0; i < cache.chunks(); ++i) {
      const auto& part = cache.chunk(i);
      if (part.extent(0) != shape.batch) return mismatch(name, "sequences", part.extent(0), shape.batch);
      if (part.extent(1) != shape.kv_heads) return mismatch(name, "heads", part.extent(1), shape.kv_heads);
      if (part.extent(3) != shape.head_dim) return mismatch(name, "channels", part.extent(3), shape.head_dim);
      if (part.extent(2) < 0 || part.extent(2) > shape.tokens) {
        return mismatch(name, "tokens", part.extent(2), shape.tokens);
      }
      RESTKV_RETURN_IF_FAILED(detail::check_view(name, part));
    }
    return {};
  };
  RESTKV_RETURN_IF_FAILED(check_cache("key", layer.key));
  const index_t tokens = layer.key.extent(2);
  if (tokens > shape.tokens) return mismatch("key", "tokens", tokens, shape.tokens);
  if (needs_value) {
    RESTKV_RETURN_IF_FAILED(check_cache("value", layer.value));
    if (layer.value.extent(2) != tokens) {
      return status::error(errc::shape_mismatch, "value has %lld tokens, key has %lld",
                           static_cast<long long>(layer.value.extent(2)), static_cast<long long>(tokens));
    }
  }
  if (layer.lengths.data != nullptr) {
    RESTKV_RETURN_IF_FAILED(detail::check_view("lengths", layer.lengths));
    if (layer.lengths.extent(0) != shape.batch) {
      return mismatch("lengths", "entries", layer.lengths.extent(0), shape.batch);
    }
    for (index_t b = 0; b < shape.batch; ++b) {
      if (layer.lengths(b) < 0 || layer.lengths(b) > tokens) {
        return status::error(errc::invalid_argument, "sequence %lld has length %lld, the token axis holds %lld",
                             static_cast<long long>(b), static_cast<long long>(layer.lengths(b)),
                             static_cast<long long>(tokens));
      }
    }
  }
  if (layer.head_lengths.data != nullptr) {
    RESTKV_RETURN_IF_FAILED(detail::check_view("head_lengths", layer.head_lengths));
    if (layer.head_lengths.extent(0) != shape.batch) {
      return mismatch("head_lengths", "sequences", layer.head_lengths.extent(0), shape.batch);
    }
    if (layer.head_lengths.extent(1) != shape.kv_heads) {
      return mismatch("head_lengths", "heads", layer.head_lengths.extent(1), shape.kv_heads);
    }
    for (index_t b = 0; b < shape.batch; ++b) {
      for (index_t h = 0; h < shape.kv_heads; ++h) {
        if (layer.head_lengths(b, h) >= 0 && layer.head_lengths(b, h) <= tokens) continue;
        return status::error(errc::invalid_argument, "head %lld of sequence %lld has length %lld, the token axis holds %lld",
                             static_cast<long long>(h), static_cast<long long>(b),
                             static_cast<long long>(layer.head_lengths(b, h)), static_cast<long long>(tokens));
      }
    }
  }
  if (needs_query) {
    RESTKV_RETURN_IF_FAILED(detail::check_view("query", layer.query));
    if (layer.query.extent(0) != shape.batch) return mismatch("query", "sequences", layer.query.extent(0), shape.batch);
    if (layer.query.extent(1) != shape.query_heads) {
      return mismatch("query", "heads", layer.query.extent(1), shape.query_heads);
    }
    if (layer.query.extent(3) != shape.head_dim) {
      return mismatch("query", "channels", layer.query.extent(3), shape.head_dim);
    }
    for (index_t b = 0; b < shape.batch; ++b) {
      index_t longest = 0;
      for (index_t h = 0; h < shape.kv_heads; ++h) longest = std::max(longest, sequence(layer, b, h).length);
      const index_t needed = std::min(window, longest);
      if (layer.query.extent(2) < needed) {
        return status::error(errc::shape_mismatch, "query has %lld rows, the observation window needs %lld",
                             static_cast<long long>(layer.query.extent(2)), static_cast<long long>(needed));
      }
    }
  }
  if (needs_metric) {
    if (layer.metric.missing()) {
      return status::error(errc::missing_input,
                           "the score measures distances through W_O: set layer.metric (see output_metric)");
    }
    const auto check_part = [&](const char* name, const auto& part) -> status {
      if (part.data == nullptr) {
        return status::error(errc::missing_input, "%s is missing: a metric has three parts (see output_metric)",
                             name);
      }
      if (part.extent(0) != shape.query_heads) return mismatch(name, "heads", part.extent(0), shape.query_heads);
      for (std::size_t axis = 1; axis < part.rank; ++axis) {
        if (part.extent(axis) != shape.head_dim) return mismatch(name, "channels", part.extent(axis), shape.head_dim);
      }
      return detail::check_view(name, part);
    };
    RESTKV_RETURN_IF_FAILED(check_part("metric.gram", layer.metric.gram));
    RESTKV_RETURN_IF_FAILED(check_part("metric.factor", layer.metric.factor));
    RESTKV_RETURN_IF_FAILED(check_part("metric.spectrum", layer.metric.spectrum));
  }
  if (layer.keep_mask.data != nullptr && layer.head_lengths.data != nullptr) {
    return status::error(errc::invalid_argument,
                         "keep_mask names tokens that all heads have: it does not go with head_lengths");
  }
  if (layer.keep_mask.data != nullptr &&
      (layer.keep_mask.extent(0) != shape.batch || layer.keep_mask.extent(1) != tokens)) {
    return status::error(errc::shape_mismatch, "keep_mask is [%lld, %lld], the layer has %lld sequences of %lld tokens",
                         static_cast<long long>(layer.keep_mask.extent(0)),
                         static_cast<long long>(layer.keep_mask.extent(1)), static_cast<long long>(shape.batch),
                         static_cast<long long>(tokens));
  }
  if (layer.keep_mask.data != nullptr) RESTKV_RETURN_IF_FAILED(detail::check_view("keep_mask", layer.keep_mask));
  return {};
}

/// Checks the output projection of a layer: there, and as wide as its query heads.
template <element T, memory_space Space>
[[nodiscard]] status check_projection(const layer_view<T, Space>& layer, const problem_shape& shape) noexcept {
  if (layer.projection.data == nullptr) {
    return status::error(errc::missing_input, "the score measures W_O v in the hidden channels: set layer.projection");
  }
  return check_projection_width(layer.projection, shape.query_heads, shape.head_dim);
}

}  // namespace restkv
