// SPDX-License-Identifier: Apache-2.0
/// @file
/// `model`: what stands in for a model, the queries, keys and values of its layers for tokens that were recorded.
#pragma once

#include <restkv/core/layer.hpp>

#include <cstdint>
#include <vector>

namespace engine {

using restkv::index_t;
using restkv::tensor_view;

/// A token, by its place in the recording. A sequence is a list of them that ascends: keys and queries carry the angle
/// of that place (RoPE), so their relative positions are right, and what a sequence leaves out was never there.
using token = std::int32_t;

/// One attention layer. Views: the memory belongs to whoever made them.
struct model_layer {
  tensor_view<const float, 3> query{};       ///< [query_heads, tokens - first_query, head_dim]
  tensor_view<const float, 3> key{};         ///< [kv_heads, tokens, head_dim]
  tensor_view<const float, 3> value{};       ///< [kv_heads, tokens, head_dim]
  tensor_view<const float, 2> projection{};  ///< W_O, for the verifier; optional
  restkv::output_metric_view metric{};       ///< from W_O, for scores that measure through it; optional
};

/// The layers of a model. An engine computes what this looks up.
struct model {
  std::vector<model_layer> layers;
  index_t first_query = 0;  ///< the first token whose query was recorded

  [[nodiscard]] index_t tokens() const noexcept { return layers.front().key.extent(1); }
  [[nodiscard]] index_t kv_heads() const noexcept { return layers.front().key.extent(0); }
  [[nodiscard]] index_t query_heads() const noexcept { return layers.front().query.extent(0); }
  [[nodiscard]] index_t head_dim() const noexcept { return layers.front().key.extent(2); }

  /// A token's query in one layer and head. [head_dim], dense
  [[nodiscard]] const float* query(index_t layer, index_t head, token n) const noexcept {
    return &layers[static_cast<std::size_t>(layer)].query(head, n - first_query, 0);
  }
};

}  // namespace engine
