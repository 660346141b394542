// SPDX-License-Identifier: Apache-2.0
#include "cuda/quantised_on_device.hpp"

#include "cuda/device_selection.cuh"

#include <restkv/backend/cuda/backend.cuh>
#include <restkv/backend/kernel_quantised.hpp>

namespace restkv_test {

namespace {

/// Codes and parameters in device memory.
class device_cache {
 public:
  [[nodiscard]] status assign(const quantised_view<const float>& host) {
    view_ = {.tokens = host.tokens,
             .channels = host.channels,
             .tokens_per_group = host.tokens_per_group,
             .channels_per_group = host.channels_per_group,
             .format = host.format};
    RESTKV_RETURN_IF_FAILED(copy(host.codes, codes_, view_.codes));
    RESTKV_RETURN_IF_FAILED(copy(host.scale, scale_, view_.scale));
    RESTKV_RETURN_IF_FAILED(copy(host.zero, zero_, view_.zero));
    return copy(host.offset, offset_, view_.offset);
  }
  [[nodiscard]] const quantised_view<const float, memory_space::device>& view() const { return view_; }

 private:
  template <class T>
  [[nodiscard]] static status copy(const tensor_view<const T, 4>& from, device_buffer<T>& memory,
                                   tensor_view<const T, 4, memory_space::device>& to) {
    if (from.data == nullptr) return {};
    RESTKV_RETURN_IF_FAILED(memory.assign(std::span(from.data, static_cast<std::size_t>(from.size()))));
    to = {memory.data(), from.extents};
    return {};
  }

  device_buffer<std::uint8_t> codes_;
  device_buffer<float> scale_, zero_, offset_;
  quantised_view<const float, memory_space::device> view_;
};

template <class Backend>
[[nodiscard]] status run(Backend& backend, const stream& on, const plan<quantised_policy>& made,
                         const layer_view<bfloat16, memory_space::device>& layer, kept_rows& rows) {
  device_buffer<std::byte> memory;
  RESTKV_RETURN_IF_FAILED(memory.allocate(static_cast<index_t>(made.workspace_bytes)));
  device_kept_tokens kept;
  RESTKV_RETURN_IF_FAILED(select(backend, made, layer, workspace(memory.data(), made.workspace_bytes), kept));
  RESTKV_RETURN_IF_FAILED(cuda_status("synchronisation", cudaStreamSynchronize(on.get())));
  std::vector<std::byte> bytes(made.workspace_bytes);
  RESTKV_RETURN_IF_FAILED(memory.copy_to(bytes));
  const auto on_host = [&](const position_t* device) {
    return reinterpret_cast<const position_t*>(bytes.data() +
                                               (reinterpret_cast<const std::byte*>(device) - memory.data()));
  };
  for (index_t row = 0; row < kept.lengths.size(); ++row) {
    const position_t* const first = on_host(kept.positions.data) + row * kept.capacity();
    rows.emplace_back(first, first + on_host(kept.lengths.data)[row]);
  }
  return {};
}

}  // namespace

status select_quantised_on_device(const quantised_policy& policy, const layer_view<bfloat16>& host,
                                  const quantised_view<const float>& host_key,
                                  const quantised_view<const float>& host_value, kept_rows& by_numbers,
                                  kept_rows& by_codes) {
  const stream on;
  RESTKV_RETURN_IF_FAILED(on.check());
  cuda_backend backend(on.get());
  plan<quantised_policy> made;
  RESTKV_RETURN_IF_FAILED(make_plan(backend, policy, shape_of(host), made));
  device_layer<bfloat16> layer;
  device_cache key, value;
  RESTKV_RETURN_IF_FAILED(layer.assign(host));
  RESTKV_RETURN_IF_FAILED(key.assign(host_key));
  RESTKV_RETURN_IF_FAILED(value.assign(host_value));
  RESTKV_RETURN_IF_FAILED(run(backend, on, made, layer.view(), by_numbers));
  quantised_kernel_backend coded(backend, key.view(), value.view());
  return run(coded, on, made, coded.layer(layer.view()), by_codes);
}

}  // namespace restkv_test
