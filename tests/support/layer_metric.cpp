// SPDX-License-Identifier: Apache-2.0
#include "support/layer_metric.hpp"

namespace restkv_test {

restkv::output_metric build_metric(const tensor_view<const float, 2>& projection, index_t query_heads,
                                   index_t head_dim) {
  restkv::output_metric metric;
  restkv::throw_if_failed(metric.build(projection, query_heads, head_dim));
  return metric;
}

}  // namespace restkv_test
