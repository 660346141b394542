// SPDX-License-Identifier: Apache-2.0
// Compiled by nvcc where the build is asked for CUDA (-Dcuda=enabled).
#include "device_selection.cuh"
#include "random_policies.hpp"

#include <restkv/backend/thrust/backend.cuh>

namespace restkv::cli {

template <device_library Library, class Policy>
status plan_on_device(const Policy& policy, const problem_shape& shape, plan<Policy>& made) {
  thrust_backend<thrust_cuda> backend(nullptr);
  return make_plan(backend, policy, shape, made);
}

template <device_library Library, class Policy, element T>
status select_on_device(const plan<Policy>& plan, const layer_view<T>& layer, workspace space, kept_tokens& kept,
                        const selection_details<float>* details) {
  return select_by<thrust_backend<thrust_cuda>, true>(plan, layer, space, kept, details);
}

template status plan_on_device<device_library::thrust>(const standard_policy&, const problem_shape&,
                                                       plan<standard_policy>&);
template status select_on_device<device_library::thrust>(const plan<standard_policy>&, const layer_view<float>&,
                                                         workspace, kept_tokens&, const selection_details<float>*);
template status plan_on_device<device_library::thrust>(const snapkv_policy&, const problem_shape&,
                                                       plan<snapkv_policy>&);
template status select_on_device<device_library::thrust>(const plan<snapkv_policy>&, const layer_view<half>&, workspace,
                                                         kept_tokens&, const selection_details<float>*);
template status plan_on_device<device_library::thrust>(const released_policy&, const problem_shape&,
                                                       plan<released_policy>&);
template status select_on_device<device_library::thrust>(const plan<released_policy>&, const layer_view<bfloat16>&,
                                                         workspace, kept_tokens&, const selection_details<float>*);

}  // namespace restkv::cli
