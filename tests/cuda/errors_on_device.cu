// SPDX-License-Identifier: Apache-2.0
#include "cuda/errors_on_device.hpp"

#include "cuda/device_selection.cuh"

#include <restkv/backend/cuda/backend.cuh>
#include <restkv/backend/kernel_output_error.hpp>

namespace restkv_test {

status errors_on_device(const layer_view<bfloat16>& host, const const_kept_tokens& host_kept, index_t queries,
                        bool in_graph, output_errors& errors) {
  output_error_plan plan;
  RESTKV_RETURN_IF_FAILED(plan_output_error(shape_of(host),
                                            {.queries = queries,
                                             .kept_heads = host_kept.heads(),
                                             .hidden = host.projection.data == nullptr ? 0 : host.projection.extent(0),
                                             .metric = !host.metric.missing()},
                                            plan));
  device_layer<bfloat16> layer;
  RESTKV_RETURN_IF_FAILED(layer.assign(host));
  device_buffer<position_t> positions;
  device_buffer<position_t> lengths;
  const auto values_of = [](const auto& view) { return std::span(view.data, static_cast<std::size_t>(view.size())); };
  RESTKV_RETURN_IF_FAILED(positions.assign(values_of(host_kept.positions)));
  RESTKV_RETURN_IF_FAILED(lengths.assign(values_of(host_kept.lengths)));
  const const_device_kept_tokens kept({positions.data(), host_kept.positions.extents},
                                      {lengths.data(), host_kept.lengths.extents});
  const auto bytes = static_cast<index_t>(plan.workspace_bytes);
  device_buffer<unsigned char> memory;
  RESTKV_RETURN_IF_FAILED(
      memory.assign(std::vector<unsigned char>(static_cast<std::size_t>(bytes + 2 * guard_bytes), guard_value)));
  device_buffer<double> tables;
  RESTKV_RETURN_IF_FAILED(tables.allocate(plan.table_elements()));
  const stream on;
  RESTKV_RETURN_IF_FAILED(on.check());
  cuda_backend backend(on.get());
  const auto enqueue = [&] {
    return output_error(backend, plan, kept, layer.view(),
                        tensor_view<double, 1, memory_space::device>(tables.data(), {plan.table_elements()}),
                        workspace(memory.data() + guard_bytes, plan.workspace_bytes));
  };
  RESTKV_RETURN_IF_FAILED(in_graph ? run_in_graph(on.get(), enqueue) : enqueue());
  RESTKV_RETURN_IF_FAILED(cuda_status("synchronisation", cudaStreamSynchronize(on.get())));
  std::vector<unsigned char> used(static_cast<std::size_t>(memory.size()));
  RESTKV_RETURN_IF_FAILED(memory.copy_to(used));
  for (index_t i = 0; i < guard_bytes; ++i) {
    for (const index_t at : {i, guard_bytes + bytes + i}) {
      if (used[static_cast<std::size_t>(at)] == guard_value) continue;
      return status::error(errc::device_failure, "byte %lld was written, the workspace is [0, %lld)",
                           static_cast<long long>(at - guard_bytes), static_cast<long long>(bytes));
    }
  }
  std::vector<double> copied(static_cast<std::size_t>(tables.size()));
  RESTKV_RETURN_IF_FAILED(tables.copy_to(copied));
  return read_output_errors(plan, host, copied, errors);
}

}  // namespace restkv_test
