// SPDX-License-Identifier: Apache-2.0
#include "cuda/models_on_device.hpp"

#include "cuda/device_selection.cuh"
#include "kernel/hashing_backend.hpp"

#include <restkv/backend/cuda/backend.cuh>
#include <restkv/model/bulk_model_selection.hpp>

namespace restkv_test {

template <class Budget>
status models_on_device(const model_policy& policy, const Budget& budget, std::span<const layer_view<float>> layers,
                        std::deque<owned_kept_tokens>& kept) {
  const stream on;
  RESTKV_RETURN_IF_FAILED(on.check());
  hashing_backend<kernel::stream_executor> backend(kernel::stream_executor(on.get()), 10);
  const auto count = static_cast<index_t>(layers.size());
  model_plan<model_policy, Budget> plan;
  RESTKV_RETURN_IF_FAILED(make_model_plan(backend, policy, budget, shape_of(layers[0], 0, count), plan));
  std::deque<device_layer<float>> copies(layers.size());
  for (std::size_t l = 0; l < layers.size(); ++l) RESTKV_RETURN_IF_FAILED(copies[l].assign(layers[l]));
  device_buffer<std::byte> state, space;
  RESTKV_RETURN_IF_FAILED(state.allocate(static_cast<index_t>(plan.state_bytes)));
  RESTKV_RETURN_IF_FAILED(space.allocate(static_cast<index_t>(plan.workspace_bytes)));
  const index_t rows = plan.layer.shape.batch * plan.layer.heads;
  device_buffer<position_t> positions, lengths;  // of each layer
  RESTKV_RETURN_IF_FAILED(positions.allocate(count * rows * plan.layer.shape.tokens));
  RESTKV_RETURN_IF_FAILED(lengths.allocate(count * rows));
  model_selection selection(backend, plan, workspace(state.data(), plan.state_bytes));
  const auto copy = [&](position_t* to, const position_t* from, index_t elements) {
    return cuda_status("copy", cudaMemcpyAsync(to, from, static_cast<std::size_t>(elements) * sizeof(position_t),
                                               cudaMemcpyDeviceToDevice, on.get()));
  };
  RESTKV_RETURN_IF_FAILED(run_in_graph(on.get(), [&]() -> status {
    RESTKV_RETURN_IF_FAILED(selection.begin());
    for (const auto& layer : copies) {
      RESTKV_RETURN_IF_FAILED(
          selection.add_layer(backend, layer.view(), workspace(space.data(), plan.workspace_bytes)));
    }
    for (index_t l = 0; l < count; ++l) {
      device_kept_tokens of_layer;
      RESTKV_RETURN_IF_FAILED(selection.kept(backend, l, of_layer));
      const index_t size = of_layer.positions.size();
      RESTKV_RETURN_IF_FAILED(copy(positions.data() + l * size, of_layer.positions.data, size));
      RESTKV_RETURN_IF_FAILED(copy(lengths.data() + l * rows, of_layer.lengths.data, rows));
    }
    return {};
  }));
  RESTKV_RETURN_IF_FAILED(cuda_status("synchronisation", cudaStreamSynchronize(on.get())));
  std::vector<position_t> host_positions(static_cast<std::size_t>(positions.size()));
  std::vector<position_t> host_lengths(static_cast<std::size_t>(lengths.size()));
  RESTKV_RETURN_IF_FAILED(positions.copy_to(host_positions));
  RESTKV_RETURN_IF_FAILED(lengths.copy_to(host_lengths));
  for (index_t l = 0; l < count; ++l) {
    const index_t tokens = plan.layer.shape.tokens;
    const kept_tokens of_layer = kept.emplace_back(plan.layer.shape.batch, plan.layer.heads, tokens).kept();
    std::copy_n(host_positions.begin() + l * rows * tokens, rows * tokens, of_layer.positions.data);
    std::copy_n(host_lengths.begin() + l * rows, rows, of_layer.lengths.data);
  }
  return {};
}

template status models_on_device(const model_policy&, const cake_budget&, std::span<const layer_view<float>>,
                                 std::deque<owned_kept_tokens>&);
template status models_on_device(const model_policy&, const lava_budget&, std::span<const layer_view<float>>,
                                 std::deque<owned_kept_tokens>&);
template status models_on_device(const model_policy&, const global_budget&, std::span<const layer_view<float>>,
                                 std::deque<owned_kept_tokens>&);

}  // namespace restkv_test
