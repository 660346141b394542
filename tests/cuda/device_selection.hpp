// SPDX-License-Identifier: Apache-2.0
// A selection on the GPU for tests that are compiled without nvcc: the layer is copied to the device, and what was
// chosen is copied back.
#pragma once

#include "support/selection_outcome.hpp"

#include <restkv/runtime_parts.hpp>

namespace restkv_test {

/// How a selection is run on the device.
struct device_run {
  bool with_details = true;
  bool in_graph = false;  ///< captured in a CUDA graph and replayed twice; the second replay counts
  int streams = 1;        ///< the same selection at once on several streams, each with its workspace; all must agree
};

/// True where a GPU can be used.
[[nodiscard]] bool has_device();

/// The policies that are compiled for the device: every kind of part of a policy is in one of them.
using before_policy = restkv::eviction_policy<restkv::rest_kv, restkv::mean, restkv::average_pool, restkv::ada_kv>;
using paper_policy = restkv::eviction_policy<restkv::rest_kv, restkv::ema, restkv::adaptive_window, restkv::uniform>;
using observed_policy = restkv::eviction_policy<restkv::snap_kv, restkv::maximum, restkv::max_pool, restkv::pyramid>;

/// What `select` says and chooses on the device. A status of `errc::device_failure` where there is none.
template <class Policy, restkv::element T>
[[nodiscard]] selection_outcome<float> select_on_device(const Policy& policy, const restkv::layer_view<T>& layer,
                                                        const device_run& how = {});

/// The same by Thrust's algorithms.
[[nodiscard]] selection_outcome<float> select_by_thrust(const before_policy& policy,
                                                        const restkv::layer_view<restkv::bfloat16>& layer,
                                                        const device_run& how = {});

/// What `make_plan` and `select` say of a layer whose pointers only look like the device's: for input that is refused
/// before anything is launched. The workspace is that part of what was planned.
template <class Policy, restkv::element T>
[[nodiscard]] restkv::status plan_and_select_on_device(const Policy& policy, const restkv::problem_shape& shape,
                                                       const restkv::layer_view<T>& layer,
                                                       double part_of_workspace = 1);

}  // namespace restkv_test
