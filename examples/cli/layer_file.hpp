// SPDX-License-Identifier: Apache-2.0
/// @file
/// `layer_file`: one layer's tensors from a safetensors file, checked and widened to float.
#pragma once

#include "configuration.hpp"

#include <restkv/backend/eigen/output_metric.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/interop/safetensors.hpp>

#include <string>
#include <string_view>
#include <vector>

namespace restkv::cli {

/// A tensor of a file and its elements as float: exactly for F16, BF16 and F32, rounded to nearest for F64.
template <std::size_t Rank>
struct float_tensor {
  std::vector<float> elements;
  tensor_view<float, Rank> view;  ///< no data where the file has no such tensor

  [[nodiscard]] bool missing() const noexcept { return view.data == nullptr; }
};

/// The tensors q [query_heads, n, head_dim], k and v [kv_heads, tokens, head_dim] and wo [hidden, query_heads *
/// head_dim] of a file. q holds the last n queries. k and v must be there, q and wo where the policy needs them.
class layer_file {
 public:
  /// Takes the tensors called prefix + "q" and so on. Throws input_error that names `path`, the tensor and both
  /// numbers: missing tensors, whole-number dtypes, another number of axes, shapes that do not fit each other, and
  /// elements that are not finite unless `allow_non_finite`.
  layer_file(const safetensors_file& file, std::string path, std::string prefix, bool allow_non_finite);

  layer_file(const layer_file&) = delete;
  layer_file& operator=(const layer_file&) = delete;

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] index_t query_heads() const noexcept { return query_heads_; }
  [[nodiscard]] index_t kv_heads() const noexcept { return key_.view.extent(0); }
  [[nodiscard]] index_t tokens() const noexcept { return key_.view.extent(1); }
  [[nodiscard]] index_t head_dim() const noexcept { return key_.view.extent(2); }
  [[nodiscard]] bool has(const std::string& name) const noexcept { return file_.find(prefix_ + name) != nullptr; }

  /// The layer; with the metric of W_O where the configuration measures through it. Valid as long as this object.
  /// Throws input_error where the configuration needs a tensor that the file does not have, and for a W_O that is not
  /// finite.
  [[nodiscard]] layer_view<float> view(const configuration& c);

  /// The bytes that a token of one head takes, key and value together, as the file stores them.
  [[nodiscard]] std::size_t bytes_per_token() const noexcept;

  /// Reads a whole-number tensor of the file, BOOL included, as [rows, columns]. Throws input_error as the constructor
  /// does.
  [[nodiscard]] std::vector<std::int32_t> whole_numbers(const std::string& name, index_t rows, index_t columns) const;

 private:
  void check_inputs(const configuration& c) const;
  template <std::size_t Rank>
  void read(std::string_view name, float_tensor<Rank>& out, bool allow_non_finite);

  const safetensors_file& file_;
  std::string path_;
  std::string prefix_;
  index_t query_heads_ = 0;
  float_tensor<3> query_;       // [query_heads, n, head_dim]
  float_tensor<3> key_;         // [kv_heads, tokens, head_dim]
  float_tensor<3> value_;       // [kv_heads, tokens, head_dim]
  float_tensor<2> projection_;  // [hidden, query_heads * head_dim]
  output_metric metric_;
  bool metric_built_ = false;
};

}  // namespace restkv::cli
