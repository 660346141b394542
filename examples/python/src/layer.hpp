// SPDX-License-Identifier: Apache-2.0
/// @file
/// A layer's arrays of Python as a `layer_view`, and `restkv.Metric`.
#pragma once

#include "arrays.hpp"

#include <restkv/backend/eigen/output_metric.hpp>
#include <restkv/core/layer.hpp>

#include <optional>
#include <string>
#include <vector>

namespace restkv::python {

/// W_O of a layer and what is prepared of it.
struct metric_value {
  array w_o;
  index_t query_heads = 0;
  index_t head_dim = 0;
  output_metric metric;
};

/// Arguments that every call with a layer takes.
struct layer_arguments {
  nb::handle query;
  nb::handle key;
  nb::handle value;
  const metric_value* metric = nullptr;
  nb::handle w_o;
  nb::handle lengths;
  nb::handle head_lengths;
  nb::handle keep_mask;
  const std::string* pad = nullptr;
};

/// Which of a layer's tensors a call reads.
struct layer_needs {
  bool query = true;
  index_t query_rows = -1;  ///< newest rows; -1: all
  bool key = true;          ///< its elements; its extents are in any case
  bool value = true;
  bool metric = false;      ///< what is prepared of W_O
  bool projection = false;  ///< W_O itself
};

/// A layer in two steps: the arrays are taken under the interpreter's lock, widened without it.
class layer_input {
 public:
  /// Throws what becomes `restkv.Error`.
  layer_input(const layer_arguments& from, const layer_needs& needs);

  /// Valid as long as this object lives. Throws what becomes `restkv.Error`; without the interpreter's lock.
  [[nodiscard]] layer_view<float> widen(eigen_backend& backend);

  [[nodiscard]] framework from() const noexcept { return key_.from; }
  [[nodiscard]] index_t tokens() const noexcept { return key_.extents[2]; }

 private:
  layer_needs needs_;
  array query_;
  array key_;
  array value_;
  array w_o_;
  const metric_value* metric_;
  padding pad_ = padding::left;
  std::vector<std::int32_t> lengths_;
  std::vector<std::int32_t> head_lengths_;
  std::vector<std::uint8_t> keep_mask_;
  std::vector<index_t> lengths_extents_;
  std::vector<index_t> head_lengths_extents_;
  std::vector<index_t> keep_mask_extents_;
  float_tensor<4> query_rows_;
  float_tensor<4> key_rows_;
  float_tensor<4> value_rows_;
  float_tensor<2> w_o_rows_;
  output_metric own_metric_;
};

void add_metric(nb::module_& m);

}  // namespace restkv::python
