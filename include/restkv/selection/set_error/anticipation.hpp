// SPDX-License-Identifier: Apache-2.0
/// @file
/// `anticipate`: a layer as the queries after the prompt may see it, made from the prompt alone.
#pragma once

#include <restkv/cache/rope.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/core/workspace.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <span>

namespace restkv {

/// Queries that are repeated over the positions to come: the `count` queries that end `age` before the newest one, the
/// newest last, as often as the horizon asks for.
struct query_block {
  index_t age = 0;         ///< queries between the newest one and the newest of the block
  index_t count = 32;      ///< queries of the block
  float weight = 1;        ///< of each of its rows, for `set_error::weights`
  float noise_weight = 1;  ///< likewise, for `set_error::noise_weights`
};

/// The newest queries in three guesses: the last 16 twice, the 32 before the last 32, and the last 32. The last block
/// is what a policy with a window of 32 sees. The older queries hardly count for the error of the set, and fully for
/// its noise: what comes resembles the newest, and still may ask for what the older ones looked at.
inline constexpr std::array<query_block, 3> default_query_blocks{
    query_block{0, 16, 1.0f, 1.0f}, query_block{32, 32, 0.05f, 1.0f}, query_block{0, 32, 1.0f, 1.0f}};

/// How the queries to come are guessed: those of the prompt's end come again, at the positions behind it.
struct anticipation {
  /// Positions behind the prompt, and tokens that are thought to stand there.
  index_t horizon = 32;
  /// The guesses, each of `horizon` rows, in the order of the rows. Blocks that reach further back than the layer's
  /// queries are left out, but for the last.
  std::span<const query_block> blocks = default_query_blocks;
  /// Of `rope_frequencies`; empty: the model's queries and keys carry no RoPE.
  std::span<const double> frequencies{};
  /// Which channels make a pair.
  rotary_pairs pairing = rotary_pairs::half_split;
};

/// An `anticipate`d layer. A view: its own tensors lie in the workspace.
template <element T>
struct anticipated_layer {
  /// The prompt's tokens followed by `horizon` copies of its last ones; `horizon` rows of queries a block.
  layer_view<T> layer{};
  /// Of each row of `layer.query`. [blocks * horizon]
  std::span<const float> weights{};
  /// The same for `set_error::noise_weights`. [blocks * horizon]
  std::span<const float> noise_weights{};
};

namespace detail {

template <element T>
[[nodiscard]] index_t used_blocks(const anticipation& options, const layer_view<T>& layer) noexcept {
  index_t used = 0;
  for (std::size_t i = 0; i < options.blocks.size(); ++i) {
    const query_block& block = options.blocks[i];
    const bool last = i + 1 == options.blocks.size();
    used += last || block.age + block.count <= layer.query.extent(2) ? 1 : 0;
  }
  return used;
}

/// Memory of an anticipated layer.
template <element T>
struct anticipation_memory {
  T* query;                       // [batch, query_heads, rows, head_dim]
  T* key;                         // [batch, kv_heads, horizon, head_dim]
  T* value;                       // [batch, kv_heads, horizon, head_dim]
  tensor_view<const T, 4>* keys;  // [chunks + 1]
  tensor_view<const T, 4>* values;
  std::int32_t* lengths;       // [batch]
  std::int32_t* head_lengths;  // [batch, kv_heads]
  float* weights;              // [rows]
  float* noise_weights;        // [rows]

  anticipation_memory(const anticipation& options, const layer_view<T>& layer, workspace& space) noexcept {
    const index_t rows = used_blocks(options, layer) * options.horizon;
    const index_t batch = layer.key.extent(0);
    const index_t copies = batch * layer.key.extent(1) * options.horizon * layer.key.extent(3);
    query = space.take<T>(batch, layer.query.extent(1), rows, layer.key.extent(3));
    key = space.take<T>(copies);
    value = space.take<T>(copies);
    keys = space.take<tensor_view<const T, 4>>(layer.key.chunks() + 1);
    values = space.take<tensor_view<const T, 4>>(layer.value.chunks() + 1);
    lengths = space.take<std::int32_t>(layer.lengths.data == nullptr ? 0 : batch);
    head_lengths = space.take<std::int32_t>(layer.head_lengths.data == nullptr ? 0 : batch * layer.key.extent(1));
    weights = space.take<float>(rows);
    noise_weights = space.take<float>(rows);
  }
};

/// A row moved by `shift` positions.
template <element T>
void rotate_row(const tensor_view<const T, 1>& from, const anticipation& options, index_t shift, T* to) noexcept {
  for (index_t c = 0; c < from.extent(0); ++c) to[c] = from(c);
  const rotary_channels channels(options.pairing, options.frequencies.size());
  for (index_t i = 0; i < static_cast<index_t>(options.frequencies.size()); ++i) {
    const double angle = static_cast<double>(shift) * options.frequencies[static_cast<std::size_t>(i)];
    rotate_pair(to[channels.first(i)], to[channels.second(i)], std::cos(angle), std::sin(angle));
  }
}

[[nodiscard]] inline status check_anticipation(const anticipation& options, index_t query_rows,
                                               index_t head_dim) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (options.horizon < 1 || options.horizon > 4096) {
    return status::error(errc::invalid_argument, "anticipation.horizon is %lld, must be within [1, 4096]",
                         ll(options.horizon));
  }
  if (options.blocks.empty() || options.blocks.size() > 64) {
    return status::error(errc::invalid_argument, "anticipation has %zu blocks of queries, must be within [1, 64]",
                         options.blocks.size());
  }
  for (const query_block& block : options.blocks) {
    if (block.age < 0 || block.count < 1 || block.age > 65536 || block.count > 65536 || !(block.weight >= 0.0f) ||
        !(block.weight <= 1e30f) || !(block.noise_weight >= 0.0f) || !(block.noise_weight <= 1e30f)) {
      return status::error(errc::invalid_argument,
                           "a block has age %lld, %lld queries and weights %g and %g: ages are within [0, 65536], "
                           "counts within [1, 65536], weights within [0, 1e30]",
                           ll(block.age), ll(block.count), static_cast<double>(block.weight),
                           static_cast<double>(block.noise_weight));
    }
  }
  const query_block& last = options.blocks.back();
  if (last.age + last.count > query_rows) {
    return status::error(errc::shape_mismatch, "query has %lld rows, the last block of queries needs %lld",
                         ll(query_rows), ll(last.age + last.count));
  }
  if (2 * static_cast<index_t>(options.frequencies.size()) > head_dim) {
    return status::error(errc::shape_mismatch, "frequencies has %zu entries, %lld channels have %lld pairs",
                         options.frequencies.size(), ll(head_dim), ll(head_dim / 2));
  }
  for (const double frequency : options.frequencies) {
    if (!std::isfinite(frequency)) {
      return status::error(errc::invalid_argument, "a frequency is %g, must be finite", frequency);
    }
  }
  return {};
}

}  // namespace detail

/// Bytes that `anticipate` needs for a layer: `horizon` tokens of keys and values, `horizon` queries a block.
template <element T>
[[nodiscard]] std::size_t anticipation_workspace_bytes(const anticipation& options,
                                                       const layer_view<T>& layer) noexcept {
  workspace counting;
  const detail::anticipation_memory<T> memory(options, layer, counting);
  static_cast<void>(memory);
  return counting.required_bytes();
}

/// Makes the layer that policies and `refine_set_error` should look at in order to keep what the queries *after* the
/// prompt need. A score of the prompt's own window keeps what its queries attended to from where they stood; queries to
/// come stand `horizon` tokens further on, which RoPE turns into other logits, and share their attention with the
/// tokens written meanwhile. With p the position of the prompt's last token,
///
///     row i of a block:  the query of age  a(i) = age + (horizon - 1 - i) mod count,  rotated to position  p + 1 + i
///     token p + 1 + j:   key and value of token p + 1 + j - horizon, the key rotated by horizon positions
///
/// The copies stand for the tokens to come, which a cache keeps: count them to the budget and to the protected recent
/// tokens (`select` with budget B + horizon and at least `horizon` recent tokens), and take them away from the kept set
/// afterwards (`drop_anticipated`). For `set_error`, `horizon` is its horizon and `weights` are its weights. The
/// prompt's keep mask is not carried over: protect by position, or pass a mask for the longer axis.
///
/// layer.query holds the last queries; all tensors are after RoPE. Memory for what is new comes from `space`, the rest
/// is referenced. Rotation rounds to the element type. A sequence shorter than the horizon repeats its first token, an
/// empty one gets zeros.
///
/// Errors: parameters outside their ranges; fewer queries than the last block needs; tensors that do not fit; padding
/// on the right with sequences shorter than the axis, behind which nothing can follow (errc::unsupported). Nothing is
/// written to `out` then. Cost: horizon * (blocks * query_heads + kv_heads) rotations of a row.
template <element T>
[[nodiscard]] status anticipate(const anticipation& options, const layer_view<T>& layer, workspace space,
                                anticipated_layer<T>& out) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (layer.key.missing() || layer.value.missing()) {
    return status::error(errc::missing_input, "the layer has no %s", layer.key.missing() ? "key" : "value");
  }
  const problem_shape shape = shape_of(layer);
  RESTKV_RETURN_IF_FAILED(detail::check_anticipation(options, layer.query.extent(2), shape.head_dim));
  const query_block& last = options.blocks.back();
  RESTKV_RETURN_IF_FAILED(check_layer(layer, shape, last.age + last.count, true, true, false));
  constexpr index_t longest = std::numeric_limits<position_t>::max();
  if (shape.tokens > longest - options.horizon) {
    return status::error(errc::invalid_argument, "%lld tokens and %lld to come pass the longest axis, %lld",
                         ll(shape.tokens), ll(options.horizon), ll(longest));
  }
  for (index_t b = 0; b < shape.batch; ++b) {
    for (index_t h = 0; h < shape.kv_heads; ++h) {
      const sequence_span span = sequence(layer, b, h);
      if (span.begin + span.length == shape.tokens) continue;
      return status::error(errc::unsupported,
                           "sequence %lld has %lld of %lld tokens and is padded on the right: tokens to come cannot "
                           "follow it",
                           ll(b), ll(span.length), ll(shape.tokens));
    }
  }
  const detail::anticipation_memory<T> memory(options, layer, space);
  RESTKV_RETURN_IF_FAILED(space.check());
  const index_t horizon = options.horizon;
  const index_t rows = detail::used_blocks(options, layer) * horizon;
  const tensor_view<T, 4> query(memory.query, {shape.batch, shape.query_heads, rows, shape.head_dim});
  const tensor_view<T, 4> key(memory.key, {shape.batch, shape.kv_heads, horizon, shape.head_dim});
  const tensor_view<T, 4> value(memory.value, {shape.batch, shape.kv_heads, horizon, shape.head_dim});
  const index_t observed = layer.query.extent(2);
  index_t first = 0;
  for (std::size_t j = 0; j < options.blocks.size(); ++j) {
    const query_block& block = options.blocks[j];
    if (j + 1 < options.blocks.size() && block.age + block.count > observed) continue;
    for (index_t i = 0; i < horizon; ++i) {
      const index_t age = block.age + (horizon - 1 - i) % block.count;
      memory.weights[first + i] = block.weight;
      memory.noise_weights[first + i] = block.noise_weight;
      for (index_t b = 0; b < shape.batch; ++b) {
        for (index_t h = 0; h < shape.query_heads; ++h) {
          detail::rotate_row(layer.query[b][h][observed - 1 - age], options, age + 1 + i, &query(b, h, first + i, 0));
        }
      }
    }
    first += horizon;
  }
  for (index_t b = 0; b < shape.batch; ++b) {
    for (index_t h = 0; h < shape.kv_heads; ++h) {
      const sequence_span span = sequence(layer, b, h);
      for (index_t j = 0; j < horizon; ++j) {
        if (span.length == 0) {
          std::fill_n(&key(b, h, j, 0), shape.head_dim, narrow<T>(0.0f));
          std::fill_n(&value(b, h, j, 0), shape.head_dim, narrow<T>(0.0f));
          continue;
        }
        const index_t token = std::max(span.begin, shape.tokens + j - horizon);
        detail::rotate_row(layer.key.from_token(token)[b][h][0], options, shape.tokens + j - token, &key(b, h, j, 0));
        const auto from = layer.value.from_token(token)[b][h][0];
        for (index_t c = 0; c < shape.head_dim; ++c) value(b, h, j, c) = from(c);
      }
    }
  }
  for (index_t i = 0; i < layer.key.chunks(); ++i) std::construct_at(memory.keys + i, layer.key.chunk(i));
  std::construct_at(memory.keys + layer.key.chunks(), key);
  for (index_t i = 0; i < layer.value.chunks(); ++i) std::construct_at(memory.values + i, layer.value.chunk(i));
  std::construct_at(memory.values + layer.value.chunks(), value);
  anticipated_layer<T> made{layer,
                            {memory.weights, static_cast<std::size_t>(rows)},
                            {memory.noise_weights, static_cast<std::size_t>(rows)}};
  made.layer.query = query;
  made.layer.key = {memory.keys, layer.key.chunks() + 1};
  made.layer.value = {memory.values, layer.value.chunks() + 1};
  made.layer.keep_mask = {};
  const auto more = static_cast<std::int32_t>(horizon);
  if (layer.lengths.data != nullptr) {
    for (index_t b = 0; b < shape.batch; ++b) memory.lengths[b] = layer.lengths(b) + more;
    made.layer.lengths = {memory.lengths, {shape.batch}};
  }
  if (layer.head_lengths.data != nullptr) {
    for (index_t b = 0; b < shape.batch; ++b) {
      for (index_t h = 0; h < shape.kv_heads; ++h) {
        memory.head_lengths[b * shape.kv_heads + h] = layer.head_lengths(b, h) + more;
      }
    }
    made.layer.head_lengths = {memory.head_lengths, {shape.batch, shape.kv_heads}};
  }
  out = made;
  return {};
}

/// Takes the tokens from position `tokens` on away from a kept set: those that `anticipate` added behind a prompt of
/// `tokens` tokens. Positions ascend, so only lengths change.
inline void drop_anticipated(kept_tokens& kept, index_t tokens) noexcept {
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      position_t& length = kept.lengths(b, h);
      while (length > 0 && kept.positions(b, h, length - 1) >= tokens) --length;
    }
  }
}

}  // namespace restkv
