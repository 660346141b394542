// SPDX-License-Identifier: Apache-2.0
// Budgets across layers on the GPU for tests that are compiled without nvcc: layers are copied to the device, and what
// they keep is copied back. Scores are those of `hash_scores`, so that a GPU and the CPU have the same.
#pragma once

#include <restkv/model/cake_budget.hpp>
#include <restkv/model/global_budget.hpp>
#include <restkv/model/lava_budget.hpp>
#include <restkv/policy.hpp>
#include <restkv/score/snap_kv.hpp>
#include <restkv/verify/future_error.hpp>

#include <deque>
#include <span>

namespace restkv_test {

using model_policy = restkv::eviction_policy<restkv::snap_kv, restkv::mean, restkv::no_pool, restkv::uniform>;

/// What each layer keeps of a model that is selected on the device, captured in a CUDA graph and replayed twice. A
/// status of `errc::device_failure` where there is no device.
template <class Budget>
[[nodiscard]] restkv::status models_on_device(const model_policy& policy, const Budget& budget,
                                              std::span<const restkv::layer_view<float>> layers,
                                              std::deque<restkv::owned_kept_tokens>& kept);

}  // namespace restkv_test
