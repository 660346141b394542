// SPDX-License-Identifier: Apache-2.0
#include "layers_selection.hpp"

#include "command.hpp"
#include "policy_parts.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/model/cake_budget.hpp>
#include <restkv/model/global_budget.hpp>
#include <restkv/model/lava_budget.hpp>
#include <restkv/model/model_selection.hpp>
#include <restkv/score/given_scores.hpp>
#include <restkv/smoothing/mean_variance.hpp>

#include <fmt/format.h>

#include <algorithm>

namespace restkv::cli {

/// A `model_selection` of some types.
class layers_selection::chooser {
 public:
  virtual ~chooser() = default;
  virtual void add_layer(eigen_backend& backend, const layer_view<float>& layer) = 0;
  [[nodiscard]] virtual index_t layers() const noexcept = 0;
  [[nodiscard]] virtual bool evicted(index_t l) const noexcept = 0;
  [[nodiscard]] virtual kept_tokens kept(index_t l) noexcept = 0;
  [[nodiscard]] virtual kept_tokens cache_slots(index_t l) noexcept = 0;
};

template <class Policy, class Budget>
class layers_selection::chooser_of final : public chooser {
  using plan_type = model_plan<Policy, Budget>;

 public:
  chooser_of(const plan_type& plan, const eigen_backend& backend)
      : workspace_bytes_(plan.workspace_bytes), state_(plan.state_bytes), chosen_(backend, plan, workspace(state_)) {}

  void add_layer(eigen_backend& backend, const layer_view<float>& layer) override {
    std::vector<std::byte> space(workspace_bytes_);
    require(chosen_.add_layer(backend, layer, workspace(space)), "");
  }
  [[nodiscard]] index_t layers() const noexcept override { return chosen_.layers(); }
  [[nodiscard]] bool evicted(index_t l) const noexcept override { return chosen_.evicted(l); }
  [[nodiscard]] kept_tokens kept(index_t l) noexcept override { return chosen_.kept(l); }
  [[nodiscard]] kept_tokens cache_slots(index_t l) noexcept override { return chosen_.cache_slots(l); }

 private:
  std::size_t workspace_bytes_;
  std::vector<std::byte> state_;
  model_selection<eigen_backend, Policy, Budget> chosen_;
};

template <class Policy, class Budget>
void layers_selection::choose_by(const Policy& policy, const Budget& budget, const eigen_backend& backend,
                                 const problem_shape& shape) {
  model_plan<Policy, Budget> plan;
  require(make_model_plan(backend, policy, budget, shape, plan), "");
  chooser_ = std::make_unique<chooser_of<Policy, Budget>>(plan, backend);
}

layers_selection::layers_selection(const configuration& c, const eigen_backend& backend, const problem_shape& shape)
    : c_(c), shape_(shape) {
  c_.layer_count = shape.layers;
  if (c.allocation == allocation_kind::cake) {
    if (c.method != method_kind::snapkv || c.group != group_reduce::mean || c.rescoring != rescoring_kind::none) {
      throw input_error("cake shares the budget by the attention of its own policy, snapkv with the group's mean");
    }
    const eviction_policy<snap_kv, mean_variance, any_spatial, uniform> policy{
        .score = {},
        .window = c.window,
        .temporal = {},
        .spatial = spatial_of(c),
        .group = group_reduce::mean,
        .budget = {},
        .protect = {.sink = c.n_sink, .recent = c.protected_recent()},
        .granularity = {.tokens = c.unit, .reduce = c.reduce, .shared = c.shared}};
    choose_by(policy, cake_budget{.budget = c.size()}, backend, shape);
    return;
  }
  if (c.rescoring == rescoring_kind::criticalkv) {
    throw input_error("criticalkv chooses within the budgets of heads: layers do not compete by its scores");
  }
  if (c.per_query_head()) throw input_error("budgets over layers are for one kept set per KV head");
  scores_.resize(static_cast<std::size_t>(shape.batch * shape.kv_heads * shape.tokens));
  const index_t window = c.observes() && !c.scores_window() ? c.window : 0;
  using given = given_scores<score_rows::kv_heads>;
  const eviction_policy<given, mean, no_pool, uniform> policy{
      .score = {.scores = tensor_view<const float, 3>(scores_.data(), {shape.batch, shape.kv_heads, shape.tokens})},
      .spatial = {},
      .group = group_reduce::mean,
      .budget = {},
      .protect = {.sink = c.n_sink, .recent = std::max(window, c.protected_recent())},
      .granularity = {.tokens = c.unit, .reduce = c.reduce, .shared = c.shared}};
  if (c.allocation == allocation_kind::lava) {
    choose_by(policy, lava_budget{.budget = c.size()}, backend, shape);
  } else {
    choose_by(policy, global_budget{.budget = c.size()}, backend, shape);
  }
}

layers_selection::layers_selection(layers_selection&&) noexcept = default;
layers_selection& layers_selection::operator=(layers_selection&&) noexcept = default;
layers_selection::~layers_selection() = default;

bool layers_selection::takes_scores() const noexcept { return c_.allocation != allocation_kind::cake; }

configuration layers_selection::scoring(index_t l) const {
  configuration c = c_;
  c.allocation = allocation_kind::uniform;
  c.layer_index = l;
  return c;
}

void layers_selection::add_layer(eigen_backend& backend, const layer_view<float>& layer) {
  require(check_layer(layer, shape_, 0, false, false, false), "");
  if (takes_scores()) take_scores(layer, run_eigen(scoring(layers()), layer, backend, ""));
  chooser_->add_layer(backend, layer);
}

void layers_selection::add_layer(eigen_backend& backend, const layer_view<float>& layer, const selection& scored) {
  require(check_layer(layer, shape_, 0, false, false, false), "");
  take_scores(layer, scored);
  chooser_->add_layer(backend, layer);
}

/// Selections have scores from the beginning of each sequence on, `given_scores` reads them where the tokens lie.
void layers_selection::take_scores(const layer_view<float>& layer, const selection& scored) {
  if (scored.batch != shape_.batch || scored.heads != shape_.kv_heads) {
    throw input_error(fmt::format("scores of {} sequences of {} heads for a model of {} of {}", scored.batch,
                                  scored.heads, shape_.batch, shape_.kv_heads),
                      errc::shape_mismatch);
  }
  std::fill(scores_.begin(), scores_.end(), 0.0f);  // of tokens that are kept in any case
  for (index_t row = 0; row < scored.batch * scored.heads; ++row) {
    const auto span = sequence(layer, row / scored.heads, row % scored.heads);
    for (index_t n = 0; n < std::min<index_t>(scored.past, span.length); ++n) {
      scores_[static_cast<std::size_t>(row * shape_.tokens + span.begin + n)] =
          static_cast<float>(scored.smoothed[static_cast<std::size_t>(row * scored.past + n)]);
    }
  }
}

index_t layers_selection::layers() const noexcept { return chooser_->layers(); }
bool layers_selection::evicted(index_t l) const noexcept { return chooser_->evicted(l); }
kept_tokens layers_selection::kept(index_t l) noexcept { return chooser_->kept(l); }
kept_tokens layers_selection::cache_slots(index_t l) noexcept { return chooser_->cache_slots(l); }

}  // namespace restkv::cli
