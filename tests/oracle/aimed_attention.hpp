// SPDX-License-Identifier: Apache-2.0
// Layers in which chosen queries pay a chosen part of their attention to one token.
#pragma once

#include "oracle/deletion_oracle.hpp"

namespace restkv_test::oracle {

/// Gives token n of a head's keys a channel of its own, through which `aim` makes queries see it.
template <class T>
void mark_token(arranged_layer<T>& layer, index_t head, index_t n, index_t channel) {
  const index_t kv_head = head / (layer.sizes.query_heads / layer.sizes.kv_heads);
  for (index_t m = 0; m < layer.sizes.tokens; ++m) {
    layer.key(0, kv_head, m, channel) = layer.element(m == n ? 4.0 : 0.0);
  }
  for (index_t h = 0; h < layer.sizes.query_heads; ++h) {
    for (index_t i = 0; i < layer.sizes.queries; ++i) layer.query(0, h, i, channel) = layer.element(0.0);
  }
}

/// Makes window query i of a head pay all but `rest` of its attention to the token n that was marked with `channel`, as
/// closely as the element type allows. A query that comes before the token does not see it and stays as it is.
template <class T>
void aim(arranged_layer<T>& layer, index_t window, index_t head, index_t i, index_t n, double rest, index_t channel) {
  T& entry = layer.query(0, head, layer.sizes.queries - window + i, channel);
  entry = layer.element(0.0);
  const reals logits = logits_of(problem_of(layer, 0, window, false), head, i);
  const auto at = static_cast<std::size_t>(n);
  if (at >= logits.size()) return;
  real others = 0;
  for (std::size_t m = 0; m < logits.size(); ++m) others += m == at ? 0 : std::exp(logits[m]);
  const real wanted = std::log(others * (1 - static_cast<real>(rest)) / static_cast<real>(rest));
  entry = layer.element(
      static_cast<double>((wanted - logits[at]) * std::sqrt(static_cast<real>(layer.sizes.head_dim)) / 4));
}

}  // namespace restkv_test::oracle
