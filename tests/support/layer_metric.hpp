// SPDX-License-Identifier: Apache-2.0
// `output_metric` for tests, compiled once: Eigen's decompositions take a compiler several seconds.
#pragma once

#include "support/arranged_layer.hpp"

#include <restkv/backend/eigen/output_metric.hpp>

namespace restkv_test {

/// From W_O [hidden, query_heads * head_dim]; throws `restkv::error`.
[[nodiscard]] restkv::output_metric build_metric(const tensor_view<const float, 2>& projection, index_t query_heads,
                                                 index_t head_dim);

/// The metric of a layer's own W_O, which it then carries. Keep the result as long as the layer is used.
template <restkv::element T>
[[nodiscard]] restkv::output_metric attach_metric(arranged_layer<T>& layer) {
  std::vector<float> weights;
  for (const T weight : layer.projection) weights.push_back(restkv::widen<float>(weight));
  restkv::output_metric metric =
      build_metric({weights.data(), layer.projection_view().extents}, layer.sizes.query_heads, layer.sizes.head_dim);
  layer.metric = metric.view();
  return metric;
}

}  // namespace restkv_test
