// SPDX-License-Identifier: Apache-2.0
// An attention layer for tests whose numbers depend on its sizes and a seed alone, never on where they lie: the same
// layer can be arranged in memory in several ways, cut into chunks or padded, and changed in place.
#pragma once

#include "support/random.hpp"

#include <restkv/core/layer.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace restkv_test {

using restkv::tensor_view;

/// How the tensors of a layer lie in memory, outermost axis first.
enum class memory_order {
  heads_tokens,  ///< [batch, heads, tokens, head_dim], dense
  tokens_heads,  ///< [batch, tokens, heads, head_dim], dense
  padded_rows,   ///< [batch, heads, tokens, head_dim + 3]
  channels,      ///< [batch, heads, head_dim, tokens]: channels are not contiguous
  interleaved,   ///< keys and values in one buffer, [batch, tokens, heads, 2, head_dim]
};

struct layer_sizes {
  index_t batch = 1;
  index_t query_heads = 4;
  index_t kv_heads = 2;
  index_t head_dim = 16;
  index_t tokens = 64;
  index_t queries = 32;    ///< rows of the query tensor
  index_t hidden = 0;      ///< rows of W_O; 0: the layer has none
  double sharpness = 2.0;  ///< standard deviation of the logits, about
};

/// Owns the memory of a layer. Gaps between rows hold NaN: whoever reads one shows it.
template <restkv::element T>
class arranged_layer {
 public:
  explicit arranged_layer(const layer_sizes& how, unsigned seed = 1, memory_order order = memory_order::heads_tokens)
      : sizes(how) {
    const index_t d = how.head_dim;
    const std::array<index_t, 4> cache{how.batch, how.kv_heads, how.tokens, d};
    const bool together = order == memory_order::interleaved;
    query = arrange({how.batch, how.query_heads, how.queries, d}, together ? memory_order::tokens_heads : order,
                    query_memory_);
    if (together) {
      key_memory_.assign(static_cast<std::size_t>(2 * how.batch * how.kv_heads * how.tokens * d), gap());
      const std::array<index_t, 4> strides{how.tokens * how.kv_heads * 2 * d, 2 * d, how.kv_heads * 2 * d, 1};
      key = {key_memory_.data(), cache, strides};
      value = {key_memory_.data() + d, cache, strides};
    } else {
      key = arrange(cache, order, key_memory_);
      value = arrange(cache, order, value_memory_);
    }
    random_engine random(seed);
    fill(query, random, how.sharpness);
    fill(key, random, 1.0);
    fill(value, random, 1.0);
    const double scale = 1.0 / std::sqrt(static_cast<double>(how.query_heads * d));
    projection.resize(static_cast<std::size_t>(how.hidden * how.query_heads * d));
    for (T& weight : projection) weight = element(normal(random) * scale);
  }

  arranged_layer(const arranged_layer&) = delete;  // views point into the memory, which moves with the object
  arranged_layer& operator=(const arranged_layer&) = delete;
  arranged_layer(arranged_layer&&) noexcept = default;
  arranged_layer& operator=(arranged_layer&&) noexcept = default;
  ~arranged_layer() = default;

  layer_sizes sizes;
  tensor_view<T, 4> query;              ///< [batch, query_heads, queries, head_dim]
  tensor_view<T, 4> key;                ///< [batch, kv_heads, tokens, head_dim]
  tensor_view<T, 4> value;              ///< [batch, kv_heads, tokens, head_dim]
  std::vector<T> projection;            ///< [hidden, query_heads * head_dim]
  restkv::output_metric_view metric{};  ///< see layer_metric.hpp
  std::vector<std::int32_t> lengths;    ///< [batch], or empty
  restkv::padding pad = restkv::padding::left;

  /// A number as an element; through float, so that double layers hold the same numbers.
  [[nodiscard]] static T element(double number) { return restkv::narrow<T>(static_cast<float>(number)); }

  [[nodiscard]] tensor_view<const T, 2> projection_view() const {
    return {projection.empty() ? nullptr : projection.data(), {sizes.hidden, sizes.query_heads * sizes.head_dim}};
  }

  /// What a policy is given. Valid as long as this object lives and is not changed in size.
  [[nodiscard]] restkv::layer_view<T> view() const {
    restkv::layer_view<T> layer;
    layer.query = query;
    layer.key = key;
    layer.value = value;
    layer.projection = projection_view();
    layer.metric = metric;
    if (!lengths.empty()) layer.lengths = {lengths.data(), {sizes.batch}};
    layer.pad = pad;
    return layer;
  }

  /// Makes sequence b's last lengths[b] tokens (left padding) or first ones (right padding) the real ones, and
  /// overwrites the rest of keys and values with NaN.
  void pad_to(std::vector<std::int32_t> sequence_lengths, restkv::padding side) {
    lengths = std::move(sequence_lengths);
    pad = side;
    for (index_t b = 0; b < sizes.batch; ++b) {
      const restkv::sequence_span span = restkv::sequence(view(), b, 0);
      for (index_t n = 0; n < sizes.tokens; ++n) {
        if (n >= span.begin && n < span.begin + span.length) continue;
        for (index_t h = 0; h < sizes.kv_heads; ++h) {
          for (index_t c = 0; c < sizes.head_dim; ++c) key(b, h, n, c) = value(b, h, n, c) = gap();
        }
      }
    }
  }

 private:
  [[nodiscard]] static T gap() { return element(std::numeric_limits<double>::quiet_NaN()); }

  [[nodiscard]] static tensor_view<T, 4> arrange(const std::array<index_t, 4>& extents, memory_order order,
                                                 std::vector<T>& memory) {
    const auto [batch, heads, tokens, d] = extents;
    const index_t row = order == memory_order::padded_rows ? d + 3 : d;
    memory.assign(static_cast<std::size_t>(batch * heads * tokens * row), gap());
    std::array<index_t, 4> strides{heads * tokens * row, tokens * row, row, 1};
    if (order == memory_order::tokens_heads) strides = {tokens * heads * d, d, heads * d, 1};
    if (order == memory_order::channels) strides = {heads * d * tokens, d * tokens, 1, tokens};
    return {memory.data(), extents, strides};
  }

  static void fill(const tensor_view<T, 4>& tensor, random_engine& random, double scale) {
    for (index_t b = 0; b < tensor.extent(0); ++b) {
      for (index_t h = 0; h < tensor.extent(1); ++h) {
        for (index_t n = 0; n < tensor.extent(2); ++n) {
          for (index_t c = 0; c < tensor.extent(3); ++c) tensor(b, h, n, c) = element(normal(random) * scale);
        }
      }
    }
  }

  std::vector<T> query_memory_;
  std::vector<T> key_memory_;
  std::vector<T> value_memory_;
};

/// A tensor cut into chunks of its token axis before each of `cuts` (ascending; repeats give empty chunks).
template <restkv::element T>
[[nodiscard]] std::vector<tensor_view<const T, 4>> cut_tokens(const tensor_view<T, 4>& whole,
                                                              std::span<const index_t> cuts) {
  std::vector<tensor_view<const T, 4>> chunks;
  index_t begin = 0;
  for (const index_t cut : cuts) {
    chunks.push_back(whole.slice(2, begin, cut - begin));
    begin = cut;
  }
  chunks.push_back(whole.slice(2, begin, whole.extent(2) - begin));
  return chunks;
}

}  // namespace restkv_test
