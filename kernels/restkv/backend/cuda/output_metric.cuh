// SPDX-License-Identifier: Apache-2.0
/// @file
/// `device_output_metric`: an output metric in device memory, uploaded once when the model is loaded.
#pragma once

#include <restkv/backend/cuda/device_memory.cuh>
#include <restkv/core/layer.hpp>

namespace restkv {

/// Owns a copy of a metric (`output_metric`, built on the host from W_O) in device memory. Movable. 12 d^2 bytes a head.
class device_output_metric {
 public:
  using view_type = basic_output_metric_view<memory_space::device>;  ///< what a layer is given

  /// Copies the three parts; they must be dense, as `output_metric::view` makes them. Returns when they are there.
  /// Errors: a missing or strided part; out of memory; nothing changes then.
  [[nodiscard]] status assign(const output_metric_view& metric) noexcept {
    device_output_metric made;
    RESTKV_RETURN_IF_FAILED(made.assign_part("gram", metric.gram, made.gram_, made.view_.gram));
    RESTKV_RETURN_IF_FAILED(made.assign_part("factor", metric.factor, made.factor_, made.view_.factor));
    RESTKV_RETURN_IF_FAILED(made.assign_part("spectrum", metric.spectrum, made.spectrum_, made.view_.spectrum));
    *this = std::move(made);
    return {};
  }

  /// For `layer_view::metric`. Valid as long as this lives and is not assigned to.
  [[nodiscard]] const view_type& view() const noexcept { return view_; }

 private:
  template <class T, std::size_t Rank>
  [[nodiscard]] static status assign_part(const char* name, const tensor_view<const T, Rank>& part,
                                          device_buffer<T>& memory,
                                          tensor_view<const T, Rank, memory_space::device>& view) noexcept {
    if (part.data == nullptr) return status::error(errc::missing_input, "the metric has no %s", name);
    if (!part.dense()) {
      return status::error(errc::shape_mismatch, "metric.%s has a stride of %lld on its last axis, must be dense", name,
                           static_cast<long long>(part.strides[Rank - 1]));
    }
    RESTKV_RETURN_IF_FAILED(memory.assign(std::span<const T>(part.data, static_cast<std::size_t>(part.size()))));
    view = tensor_view<const T, Rank, memory_space::device>(memory.data(), part.extents);
    return {};
  }

  device_buffer<double> gram_;
  device_buffer<float> factor_;
  device_buffer<float> spectrum_;
  view_type view_;
};

}  // namespace restkv
