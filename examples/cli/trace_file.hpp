// SPDX-License-Identifier: Apache-2.0
/// @file
/// `trace_file`: recorded layers of a model, with the queries that came after the prompt.
#pragma once

#include <restkv/backend/eigen/output_metric.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/verify/future_error.hpp>

#include <string>
#include <vector>

namespace restkv::cli {

/// A tensor of a trace and its elements, in float whatever the file holds.
struct trace_tensor {
  std::vector<float> elements;
  tensor_view<const float, 4> view;  ///< [1, heads, tokens, head_dim]
};

/// One layer of a trace: `layers.<index>.` and the names below.
struct trace_layer {
  index_t index = 0;
  trace_tensor query;         ///< q [query_heads, n, head_dim]: the last n queries of the prompt
  trace_tensor key;           ///< k [kv_heads, tokens, head_dim]
  trace_tensor value;         ///< v, as k
  trace_tensor query_future;  ///< q_future [query_heads, future, head_dim]
  trace_tensor key_future;    ///< k_future [kv_heads, future, head_dim]
  trace_tensor value_future;  ///< v_future, as k_future
  std::vector<float> projection_elements;
  tensor_view<const float, 2> projection;  ///< wo [hidden, query_heads * head_dim]
  output_metric metric;

  /// The layer as it was at the end of the prompt. Valid as long as this object lives.
  [[nodiscard]] layer_view<float> prompt() const;
  /// What came after the prompt.
  [[nodiscard]] future_view<float> future() const { return {query_future.view, key_future.view, value_future.view}; }
};

/// A trace file, read whole and checked: every tensor is there, all shapes fit and every element is finite.
class trace_file {
 public:
  /// Reads the layers `wanted`, all of them when it is empty. Throws input_error that names the file, the tensor and
  /// both numbers.
  trace_file(const std::string& path, const std::vector<index_t>& wanted);

  [[nodiscard]] const std::vector<trace_layer>& layers() const noexcept { return layers_; }
  /// Sizes that all layers of a trace share; `layer` and `layers` are not set.
  [[nodiscard]] const problem_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] index_t future() const noexcept { return future_; }
  /// What the file says about itself, by key. Untrusted texts.
  [[nodiscard]] const std::vector<std::pair<std::string, std::string>>& metadata() const noexcept { return metadata_; }

 private:
  std::vector<trace_layer> layers_;
  problem_shape shape_;
  index_t future_ = 0;
  std::vector<std::pair<std::string, std::string>> metadata_;
};

}  // namespace restkv::cli
