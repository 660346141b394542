// SPDX-License-Identifier: Apache-2.0
/// @file
/// What device_selection.hpp promises, for any backend with device memory.
#pragma once

#include "device_selection.hpp"

#include <restkv/backend/cuda/output_metric.cuh>

#include <array>
#include <deque>
#include <vector>

namespace restkv::cli {

/// Copies of host tensors in device memory, with their strides: all bytes that a view can touch. The device's view of
/// each is valid as long as this lives.
class device_copies {
 public:
  template <class T, std::size_t Rank>
  [[nodiscard]] status add(const tensor_view<T, Rank>& host, tensor_view<T, Rank, memory_space::device>& view) {
    view = {nullptr, host.extents, host.strides};
    const byte_range bytes = touched_bytes(host);
    if (bytes.first == bytes.last) return {};
    device_buffer<unsigned char>& memory = memory_.emplace_back();
    RESTKV_RETURN_IF_FAILED(memory.assign({bytes.first, bytes.last}));
    view.data = reinterpret_cast<T*>(memory.data() + (reinterpret_cast<const unsigned char*>(host.data) - bytes.first));
    return {};
  }

 private:
  std::deque<device_buffer<unsigned char>> memory_;
};

/// A layer's tensors on the device: caches chunk by chunk, or joined for a backend that takes one chunk. Lengths and
/// mask stay the host's, as a backend wants them.
template <element T>
class layer_on_device {
 public:
  [[nodiscard]] status assign(const layer_view<T>& host, bool joined) {
    RESTKV_RETURN_IF_FAILED(copies_.add(host.query, view_.query));
    RESTKV_RETURN_IF_FAILED(assign_cache(host.key, joined, keys_, view_.key));
    RESTKV_RETURN_IF_FAILED(assign_cache(host.value, joined, values_, view_.value));
    RESTKV_RETURN_IF_FAILED(copies_.add(host.projection, view_.projection));
    if (!host.metric.missing()) {
      RESTKV_RETURN_IF_FAILED(metric_.assign(host.metric));
      view_.metric = metric_.view();
    }
    view_.lengths = host.lengths;
    view_.pad = host.pad;
    view_.head_lengths = host.head_lengths;
    view_.keep_mask = host.keep_mask;
    return {};
  }
  [[nodiscard]] const layer_view<T, memory_space::device>& view() const { return view_; }

 private:
  using chunk_views = std::vector<tensor_view<const T, 4, memory_space::device>>;

  [[nodiscard]] status assign_cache(const chunked_tensor_view<const T>& host, bool joined, chunk_views& chunks,
                                    chunked_tensor_view<const T, memory_space::device>& view) {
    if (joined && host.chunks() > 1) {
      std::vector<T> dense;
      for (index_t row = 0; row < host.extent(0) * host.extent(1); ++row) {
        for (index_t i = 0; i < host.chunks(); ++i) {
          const auto part = host.chunk(i)[row / host.extent(1)][row % host.extent(1)];
          for (index_t n = 0; n < part.extent(0); ++n) {
            for (index_t c = 0; c < part.extent(1); ++c) dense.push_back(part(n, c));
          }
        }
      }
      const std::array<index_t, 4> extents{host.extent(0), host.extent(1), host.extent(2), host.extent(3)};
      RESTKV_RETURN_IF_FAILED(copies_.add(tensor_view<const T, 4>(dense.data(), extents), chunks.emplace_back()));
    } else {
      for (index_t i = 0; i < host.chunks(); ++i) {
        RESTKV_RETURN_IF_FAILED(copies_.add(host.chunk(i), chunks.emplace_back()));
      }
    }
    view = {chunks.data(), static_cast<index_t>(chunks.size())};
    return {};
  }

  device_copies copies_;
  chunk_views keys_;
  chunk_views values_;
  device_output_metric metric_;
  layer_view<T, memory_space::device> view_;
};

/// `select` of a backend on the default stream, with memory of its own.
template <class Backend, bool JoinsChunks, class Policy, element T>
[[nodiscard]] status select_by(const plan<Policy>& plan, const layer_view<T>& host, workspace space, kept_tokens& kept,
                               const selection_details<float>* details) {
  constexpr memory_space device = memory_space::device;
  const auto copy_back = []<class V, std::size_t Rank>(const tensor_view<V, Rank>& to, const V* from) {
    return cuda_status(
        "copy from the device",
        cudaMemcpy(to.data, from, static_cast<std::size_t>(to.size()) * sizeof(V), cudaMemcpyDeviceToHost));
  };
  layer_on_device<T> layer;
  RESTKV_RETURN_IF_FAILED(layer.assign(host, JoinsChunks));
  // What was used before: who reads what he did not write shows it.
  device_buffer<unsigned char> memory;
  RESTKV_RETURN_IF_FAILED(memory.assign(std::vector<unsigned char>(plan.workspace_bytes, 0xff)));
  device_copies copies;
  selection_details<float, device> seen;
  if (details != nullptr) {
    RESTKV_RETURN_IF_FAILED(copies.add(details->score, seen.score));
    RESTKV_RETURN_IF_FAILED(copies.add(details->smoothed, seen.smoothed));
    RESTKV_RETURN_IF_FAILED(copies.add(details->drift, seen.drift));
  }
  device_kept_tokens chosen;
  Backend backend(nullptr);
  RESTKV_RETURN_IF_FAILED(select(backend, plan, layer.view(), workspace(memory.data(), plan.workspace_bytes), chosen,
                                 details != nullptr ? &seen : nullptr));
  RESTKV_RETURN_IF_FAILED(cuda_status("a selection", cudaDeviceSynchronize()));
  kept.positions = {space.take<position_t>(chosen.positions.size()), chosen.positions.extents};
  kept.lengths = {space.take<position_t>(chosen.lengths.size()), chosen.lengths.extents};
  RESTKV_RETURN_IF_FAILED(space.check());
  RESTKV_RETURN_IF_FAILED(copy_back(kept.positions, chosen.positions.data));
  RESTKV_RETURN_IF_FAILED(copy_back(kept.lengths, chosen.lengths.data));
  if (details == nullptr) return {};
  RESTKV_RETURN_IF_FAILED(copy_back(details->score, seen.score.data));
  RESTKV_RETURN_IF_FAILED(copy_back(details->smoothed, seen.smoothed.data));
  return copy_back(details->drift, seen.drift.data);
}

}  // namespace restkv::cli
