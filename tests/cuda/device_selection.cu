// SPDX-License-Identifier: Apache-2.0
// Selections by the library's own kernels.
#include "cuda/device_selection.cuh"

#include <restkv/backend/cuda/backend.cuh>

namespace restkv_test {

bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

template <class Policy, element T>
selection_outcome<float> select_on_device(const Policy& policy, const layer_view<T>& layer, const device_run& how) {
  selection_outcome<float> outcome;
  outcome.result = run_on<cuda_backend>(policy, layer, how, outcome);
  return outcome;
}

template <class Policy, element T>
status plan_and_select_on_device(const Policy& policy, const problem_shape& shape, const layer_view<T>& host,
                                 double part_of_workspace) {
  cuda_backend backend(nullptr);
  plan<Policy> made;
  RESTKV_RETURN_IF_FAILED(make_plan(backend, policy, shape, made));
  const auto as_device = [](const auto& view) {
    using view_t = std::remove_cvref_t<decltype(view)>;
    return tensor_view<typename view_t::element_type, view_t::rank, memory_space::device>(view.data, view.extents,
                                                                                          view.strides);
  };
  layer_view<T, memory_space::device> layer;
  layer.query = as_device(host.query);
  if (!host.key.missing()) layer.key = as_device(host.key.chunk(0));
  if (!host.value.missing()) layer.value = as_device(host.value.chunk(0));
  layer.projection = as_device(host.projection);
  layer.metric = {as_device(host.metric.gram), as_device(host.metric.factor), as_device(host.metric.spectrum)};
  layer.lengths = host.lengths;
  layer.pad = host.pad;
  layer.head_lengths = host.head_lengths;
  layer.keep_mask = host.keep_mask;
  std::vector<unsigned char> memory(made.workspace_bytes, guard_value);
  device_kept_tokens kept;
  const status outcome = select(
      backend, made, layer,
      workspace(memory.data(), static_cast<std::size_t>(part_of_workspace * static_cast<double>(memory.size()))), kept);
  if (!outcome.ok() && (kept.lengths.data != nullptr || std::count(memory.begin(), memory.end(), guard_value) !=
                                                            static_cast<std::ptrdiff_t>(memory.size()))) {
    return status::error(errc::invalid_argument, "something was written: %s", outcome.message());
  }
  return outcome;
}

// Every element type, and every kind of part of a policy, once: nvcc compiles each for three architectures.
template selection_outcome<float> select_on_device(const before_policy&, const layer_view<float>&, const device_run&);
template selection_outcome<float> select_on_device(const before_policy&, const layer_view<restkv::half>&,
                                                   const device_run&);
template selection_outcome<float> select_on_device(const before_policy&, const layer_view<bfloat16>&,
                                                   const device_run&);
template selection_outcome<float> select_on_device(const paper_policy&, const layer_view<bfloat16>&, const device_run&);
template selection_outcome<float> select_on_device(const observed_policy&, const layer_view<restkv::half>&,
                                                   const device_run&);
template status plan_and_select_on_device(const before_policy&, const problem_shape&, const layer_view<float>&, double);

}  // namespace restkv_test
