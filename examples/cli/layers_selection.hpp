// SPDX-License-Identifier: Apache-2.0
/// @file
/// `layers_selection`: a configuration with a budget over the layers of a model, run on layers that come in one by one.
#pragma once

#include "selection.hpp"

#include <memory>

namespace restkv::cli {

/// `model_selection` on eigen_backend, with the policy and the budget chosen at run time. Layers compete by the scores
/// that tokens are ranked by; CAKE's own are computed from the layers.
class layers_selection {
 public:
  /// Begins with no layer of a model whose layers have at most `shape`, shape.layers of them. c.over_layers() holds;
  /// its budget is the mean over all heads. Throws input_error for configurations that do not go with their allocation.
  layers_selection(const configuration& c, const eigen_backend& backend, const problem_shape& shape);
  layers_selection(layers_selection&&) noexcept;
  layers_selection& operator=(layers_selection&&) noexcept;
  ~layers_selection();

  /// Whether layers are ranked by the scores of the configuration; otherwise by the allocation's own.
  [[nodiscard]] bool takes_scores() const noexcept;
  /// What `add_layer` scores layer `l` with: each layer by itself.
  [[nodiscard]] configuration scoring(index_t l) const;

  ///@{
  /// Ranks the next layer and evicts what is beyond the budget, from it and from those before. The scores are computed,
  /// or those of a selection by `scoring`. Neither is needed afterwards. Throws input_error, with nothing changed. The
  /// backend is one like that of the constructor.
  void add_layer(eigen_backend& backend, const layer_view<float>& layer);
  void add_layer(eigen_backend& backend, const layer_view<float>& layer, const selection& scored);
  ///@}

  /// Layers that came in.
  [[nodiscard]] index_t layers() const noexcept;
  ///@{
  /// Of `model_selection`, for layers that came in.
  [[nodiscard]] bool evicted(index_t l) const noexcept;
  [[nodiscard]] kept_tokens kept(index_t l) noexcept;
  [[nodiscard]] kept_tokens cache_slots(index_t l) noexcept;
  ///@}

 private:
  class chooser;
  template <class Policy, class Budget>
  class chooser_of;

  template <class Policy, class Budget>
  void choose_by(const Policy& policy, const Budget& budget, const eigen_backend& backend, const problem_shape& shape);
  void take_scores(const layer_view<float>& layer, const selection& scored);

  configuration c_;
  problem_shape shape_;
  std::vector<float> scores_;  // of the layer that comes in, [batch, kv_heads, tokens]
  std::unique_ptr<chooser> chooser_;
};

}  // namespace restkv::cli
