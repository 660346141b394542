// SPDX-License-Identifier: Apache-2.0
/// @file
/// A layer's arrays of Python as a `layer_view`, and `restkv.Metric`.
#pragma once

#include "devices.hpp"

#include <restkv/backend/eigen/output_metric.hpp>
#include <restkv/core/layer.hpp>

#include <optional>
#include <string>
#include <vector>

namespace restkv::cli {
struct configuration;
}

namespace restkv::python {

/// A metric as arrays of a framework at a place.
struct metric_arrays {
  array_place place;
  nb::object gram;
  nb::object factor;
  nb::object spectrum;
};

/// W_O of a layer and what is prepared of it.
struct metric_value {
  array w_o;         ///< in the host's memory
  nb::object given;  ///< wherever it lies
  index_t query_heads = 0;
  index_t head_dim = 0;
  output_metric metric;
  std::vector<metric_arrays> copies;  ///< at the places where it was asked for; with the interpreter's lock
};

/// Arguments that every call with a layer takes.
struct layer_arguments {
  nb::handle query;
  nb::handle key;
  nb::handle value;
  metric_value* metric = nullptr;
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

/// What a configuration reads of a layer.
[[nodiscard]] layer_needs needs_of(const cli::configuration& c);

/// A layer in two steps: the arrays are taken under the interpreter's lock, widened without it.
class layer_input {
 public:
  /// Throws what becomes `restkv.Error`. With `devices` the arrays may lie on a device that there is a library for: all
  /// of them on one.
  layer_input(const layer_arguments& from, const layer_needs& needs, bool devices = false);

  /// Valid as long as this object lives. Throws what becomes `restkv.Error`; without the interpreter's lock.
  [[nodiscard]] layer_view<float> widen(eigen_backend& backend);

  /// What the device's library takes: the arrays themselves, and copies of the metric. Valid as long as this object
  /// lives. With the interpreter's lock.
  [[nodiscard]] device_layer on_device();

  [[nodiscard]] framework from() const noexcept { return key_.from; }
  [[nodiscard]] index_t tokens() const noexcept { return key_.extents[2]; }
  [[nodiscard]] array_place place() const { return array_place(key_); }

 private:
  [[nodiscard]] index_t query_heads() const noexcept;
  [[nodiscard]] index_t head_dim() const noexcept { return key_.extents[3]; }
  void check_metric() const;
  void add_lengths(device_layer& layer) const;

  layer_needs needs_;
  array query_;
  array key_;
  array value_;
  array w_o_;
  nb::object given_w_o_;
  metric_value* metric_;
  metric_value own_;
  array projection_;
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
};

void add_metric(nb::module_& m);

}  // namespace restkv::python
