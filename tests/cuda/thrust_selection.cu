// SPDX-License-Identifier: Apache-2.0
// Selections by Thrust's algorithms.
#include "cuda/device_selection.cuh"

#include <restkv/backend/thrust/backend.cuh>

namespace restkv_test {

selection_outcome<float> select_by_thrust(const before_policy& policy, const layer_view<bfloat16>& layer,
                                          const device_run& how) {
  selection_outcome<float> outcome;
  outcome.result = run_on<thrust_backend<thrust_cuda>>(policy, layer, how, outcome);
  return outcome;
}

}  // namespace restkv_test
