// SPDX-License-Identifier: Apache-2.0
/// @file
/// From a configuration to a policy of the library, run on one backend. Included by one source a backend.
#pragma once

#include "command.hpp"
#include "selection.hpp"

#include <restkv/runtime_parts.hpp>
#include <restkv/select.hpp>

#include <vector>

namespace restkv::cli {

[[nodiscard]] inline any_linear_temporal linear_temporal_of(const configuration& c) {
  switch (c.temporal) {
    case temporal_kind::sum: return {sum{}};
    case temporal_kind::ema: return {ema{.alpha = c.alpha}};
    case temporal_kind::last: return {last{}};
    case temporal_kind::mean:
    case temporal_kind::max: break;
  }
  return {mean{}};
}

[[nodiscard]] inline any_spatial spatial_of(const configuration& c) {
  switch (c.spatial) {
    case spatial_kind::avgpool: return {average_pool{.width = c.kernel}};
    case spatial_kind::maxpool: return {max_pool{.width = c.kernel}};
    case spatial_kind::adaptive:
      return {adaptive_window{.min_width = c.kernel, .scale = c.scale, .shift_rule = c.shift_rule}};
    case spatial_kind::none: break;
  }
  return {no_pool{}};
}

[[nodiscard]] inline any_budget budget_of(const configuration& c) {
  switch (c.allocation) {
    case allocation_kind::pyramid: return {pyramid{.budget = c.size(), .beta = c.beta}};
    case allocation_kind::adakv: return {ada_kv{.budget = c.size(), .floor = c.floor, .normalise = c.normalize}};
    case allocation_kind::uniform: break;
  }
  return {uniform{c.size()}};
}

template <tensor_backend Backend, token_score Score, temporal_smoother Temporal>
selection run_parts(Backend& backend, const configuration& c, const Score& score, const Temporal& temporal,
                    const layer_view<float>& layer, const std::string& where, inspection what = inspection::scores) {
  using real = typename Backend::score_type;
  const eviction_policy<Score, Temporal, any_spatial, any_budget> policy{
      .score = score,
      .window = c.window,
      .temporal = temporal,
      .spatial = spatial_of(c),
      .group = c.group,
      .budget = budget_of(c),
      .protect = {.sink = c.n_sink, .recent = c.recent}};
  const problem_shape shape = shape_of(layer, c.layer_index, c.layer_count);
  plan<std::remove_const_t<decltype(policy)>> plan;
  require(make_plan(backend, policy, shape, plan), where);

  selection result;
  result.heads = plan.heads;
  result.past = make_score_request(policy, shape).past_of(shape.tokens);
  result.drift.resize(static_cast<std::size_t>(plan.heads));
  const auto elements = static_cast<std::size_t>(what == inspection::scores ? plan.heads * shape.tokens : 0);
  std::vector<real> scores(elements);
  std::vector<real> smoothed(elements);
  const selection_details<real> details{{scores.data(), {1, plan.heads, shape.tokens}},
                                        {smoothed.data(), {1, plan.heads, shape.tokens}},
                                        {result.drift.data(), {1, plan.heads}}};
  std::vector<std::byte> memory(plan.workspace_bytes);
  kept_tokens kept;
  require(select(backend, plan, layer, workspace(memory), kept, what == inspection::scores ? &details : nullptr),
          where);

  for (index_t h = 0; h < plan.heads; ++h) {
    result.lengths.push_back(kept.lengths(0, h));
    result.positions.insert(result.positions.end(), kept.positions.data + h * kept.capacity(),
                            kept.positions.data + (h + 1) * kept.capacity());
    if (what == inspection::kept_only) continue;
    const auto row = [&](const std::vector<real>& all) { return all.begin() + h * shape.tokens; };
    result.score.insert(result.score.end(), row(scores), row(scores) + result.past);
    result.smoothed.insert(result.smoothed.end(), row(smoothed), row(smoothed) + result.past);
  }
  return result;
}

template <tensor_backend Backend, token_score Score>
selection run_score(Backend& backend, const configuration& c, const Score& score, const layer_view<float>& layer,
                    const std::string& where, inspection what = inspection::scores) {
  if (c.temporal == temporal_kind::max) return run_parts(backend, c, score, maximum{}, layer, where, what);
  return run_parts(backend, c, score, linear_temporal_of(c), layer, where, what);
}

[[nodiscard]] inline rest_kv rest_kv_of(const configuration& c) {
  return {.order = c.order,
          .metric_of_distance = c.use_wo ? metric::projection : metric::identity,
          .tau = c.use_wo ? c.tau : 1.0f,  // without W_O the release does not apply it
          .normalised = c.use_norm};
}

template <tensor_backend Backend>
selection run_policy(Backend& backend, const configuration& c, const layer_view<float>& layer, const std::string& where,
                     inspection what = inspection::scores) {
  switch (c.method) {
    case method_kind::snapkv:
    case method_kind::adakv: return run_score(backend, c, snap_kv{}, layer, where, what);
    case method_kind::streamingllm: return run_parts(backend, c, streaming_llm{}, mean{}, layer, where, what);
    case method_kind::random: return run_parts(backend, c, random_score{.seed = c.seed}, mean{}, layer, where, what);
    case method_kind::restkv:
    case method_kind::caote:
    case method_kind::set_error: break;
  }
  return run_score(backend, c, rest_kv_of(c), layer, where, what);
}

}  // namespace restkv::cli
