// SPDX-License-Identifier: Apache-2.0
/// @file
/// `selector`: a policy, planned once for every layer, as the engine calls it.
#pragma once

#include <restkv/select.hpp>

#include <algorithm>
#include <cstddef>
#include <vector>

namespace engine {

/// Which tokens a layer of one sequence keeps. The engine does not know more of a policy than this.
class selector {
 public:
  virtual ~selector() = default;
  /// What a layer keeps; valid until the next call.
  [[nodiscard]] virtual restkv::const_kept_tokens select(const restkv::layer_view<float>& view,
                                                         restkv::index_t layer) = 0;
  /// The last queries of a sequence that it looks at.
  [[nodiscard]] virtual restkv::index_t window() const noexcept = 0;
};

/// A policy on a backend. Plans are per layer, since budgets may depend on depth; the layers take turns in one
/// workspace.
template <class Backend, class Policy>
class policy_selector final : public selector {
 public:
  /// shape: of the longest sequence, with the number of layers. Throws `restkv::error` for a policy that does not fit.
  policy_selector(Backend& backend, const Policy& policy, restkv::problem_shape shape) : backend_(backend) {
    std::size_t bytes = 0;
    for (shape.layer = 0; shape.layer < shape.layers; ++shape.layer) {
      plans_.push_back(restkv::make_plan(backend, policy, shape));
      bytes = std::max(bytes, plans_.back().workspace_bytes);
    }
    memory_.resize(bytes);
  }

  [[nodiscard]] restkv::const_kept_tokens select(const restkv::layer_view<float>& view,
                                                 restkv::index_t layer) override {
    return restkv::select(backend_, plans_[static_cast<std::size_t>(layer)], view, restkv::workspace(memory_));
  }
  [[nodiscard]] restkv::index_t window() const noexcept override { return plans_.front().policy.window; }

 private:
  Backend& backend_;
  std::vector<restkv::plan<Policy>> plans_;  // [layers]
  std::vector<std::byte> memory_;
};

}  // namespace engine
