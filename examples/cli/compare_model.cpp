// SPDX-License-Identifier: Apache-2.0
#include "compare_model.hpp"

#include "command.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/model/cake_budget.hpp>
#include <restkv/model/global_budget.hpp>
#include <restkv/model/lava_budget.hpp>
#include <restkv/model/model_selection.hpp>
#include <restkv/score/given_scores.hpp>
#include <restkv/smoothing/mean_variance.hpp>

#include <algorithm>
#include <chrono>

namespace restkv::cli {

namespace {

/// Takes the layers in; `prepare(index)` comes before each.
template <class Policy, class Budget, class Prepare>
std::vector<selection> run_model(const trace_file& trace, const Policy& policy, const Budget& budget, int threads,
                                 const Prepare& prepare) {
  eigen_backend backend(threads);
  const auto count = static_cast<index_t>(trace.layers().size());
  model_plan<Policy, Budget> plan;
  require(make_model_plan(backend, policy, budget, shape_of(trace.layers().front().prompt(), 0, count), plan), "");
  std::vector<std::byte> state(plan.state_bytes);
  std::vector<std::byte> space(plan.workspace_bytes);
  model_selection<eigen_backend, Policy, Budget> chooser(backend, plan, workspace(state));
  std::vector<selection> layers(trace.layers().size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    layers[i].seconds = prepare(i);
    const auto begin = std::chrono::steady_clock::now();
    require(chooser.add_layer(backend, trace.layers()[i].prompt(), workspace(space)), "");
    layers[i].seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const kept_tokens kept = chooser.kept(static_cast<index_t>(i));
    layers[i].heads = kept.heads();
    for (index_t h = 0; h < kept.heads(); ++h) {
      layers[i].lengths.push_back(kept.lengths(0, h));
      const position_t* const row = &kept.positions(0, h, 0);
      layers[i].positions.insert(layers[i].positions.end(), row, row + kept.capacity());
    }
  }
  return layers;
}

/// Scores that are known already, of one layer after the other.
template <class Budget>
std::vector<selection> run_scored(const trace_file& trace, const configuration& c, const Budget& budget, int threads,
                                  const layer_scorer& score) {
  if (c.rescoring == rescoring_kind::criticalkv) {
    throw input_error("criticalkv chooses within the budgets of heads: layers do not compete by its scores");
  }
  if (c.per_query_head()) throw input_error("budgets over layers are compared with one kept set per KV head");
  const problem_shape& shape = trace.shape();
  const index_t window = c.observes() && !c.scores_window() ? c.window : 0;
  std::vector<float> scores(static_cast<std::size_t>(shape.kv_heads * shape.tokens));
  using given = given_scores<score_rows::kv_heads>;
  const eviction_policy<given, mean, no_pool, uniform> policy{
      .score = {.scores = tensor_view<const float, 3>(scores.data(), {1, shape.kv_heads, shape.tokens})},
      .spatial = {},
      .group = group_reduce::mean,
      .budget = {},
      .protect = {.sink = c.n_sink, .recent = std::max(window, c.protected_recent())},
      .granularity = {.tokens = c.unit, .reduce = c.reduce, .shared = c.shared}};
  return run_model(trace, policy, budget, threads, [&](std::size_t i) {
    const selection layer = score(i);
    std::fill(scores.begin(), scores.end(), 0.0f);  // of tokens that are kept in any case
    for (index_t h = 0; h < layer.heads; ++h) {
      for (index_t n = 0; n < layer.past; ++n) {
        scores[static_cast<std::size_t>(h * shape.tokens + n)] =
            static_cast<float>(layer.smoothed[static_cast<std::size_t>(h * layer.past + n)]);
      }
    }
    return layer.seconds;
  });
}

}  // namespace

std::vector<selection> select_over_layers(const trace_file& trace, const configuration& c, int threads,
                                          const layer_scorer& score) {
  if (c.allocation == allocation_kind::global) {
    return run_scored(trace, c, global_budget{.budget = c.size()}, threads, score);
  }
  if (c.allocation == allocation_kind::lava) {
    return run_scored(trace, c, lava_budget{.budget = c.size()}, threads, score);
  }
  if (c.method != method_kind::snapkv || c.group != group_reduce::mean) {
    throw input_error("cake shares the budget by the attention of its own policy, snapkv with the group's mean");
  }
  const eviction_policy<snap_kv, mean_variance, average_pool, uniform> policy{
      .score = {},
      .window = c.window,
      .temporal = {},
      .spatial = {.width = 5},
      .group = group_reduce::mean,
      .budget = {},
      .protect = {.sink = c.n_sink, .recent = c.recent}};
  return run_model(trace, policy, cake_budget{.budget = c.size()}, threads, [](std::size_t) { return 0.0; });
}

}  // namespace restkv::cli
