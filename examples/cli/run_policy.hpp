// SPDX-License-Identifier: Apache-2.0
/// @file
/// From a configuration to a policy of the library, run on one backend. The scores are instantiated in a few sources a
/// backend, which compile side by side.
#pragma once

#include "command.hpp"
#include "policy_parts.hpp"
#include "selection.hpp"
#include "token_scores.hpp"

#include <restkv/rescoring/critical_kv.hpp>
#include <restkv/rescoring/defensive_kv.hpp>
#include <restkv/rescoring/lava.hpp>
#include <restkv/rescoring/r_kv.hpp>
#include <restkv/score/defensive_kv.hpp>
#include <restkv/select.hpp>

#include <fmt/format.h>

#include <chrono>
#include <optional>
#include <vector>

namespace restkv::cli {

/// A configuration on a layer, on one backend.
template <tensor_backend Backend>
class policy_runner {
 public:
  policy_runner(Backend& backend, const configuration& c, const layer_view<float>& layer, const std::string& where,
                inspection what)
      : backend_(backend), c_(c), layer_(layer), where_(where), what_(what) {}

  /// Throws input_error, beginning with `where`.
  [[nodiscard]] selection run() {
    check_rescoring();
    if (c_.over_layers()) {
      throw input_error(fmt::format("{}{}the allocation {} is over the layers of a model: one layer has no share of it",
                                    where_, where_.empty() ? "" : ": ", name_of(c_.allocation)),
                        errc::unsupported);
    }
    switch (group_of(c_.method)) {
      case score_group::attention: return run_attention();
      case score_group::rescored: return run_rescored();
      case score_group::sizes: return run_sizes();
      case score_group::outputs: return run_outputs();
      case score_group::heads: return run_cache();
      case score_group::positions: return run_positions();
      case score_group::deletion: break;
    }
    return run_deletion();
  }

  template <any_score Score, rescorer Rescoring = no_rescoring>
  [[nodiscard]] selection run_score(const Score& score, const Rescoring& rescoring = {});

 private:
  [[nodiscard]] selection run_deletion();
  [[nodiscard]] selection run_attention();
  [[nodiscard]] selection run_rescored();
  [[nodiscard]] selection run_sizes();
  [[nodiscard]] selection run_outputs();
  [[nodiscard]] selection run_cache();
  [[nodiscard]] selection run_positions();

  /// A method brings its rescoring; some others go with it.
  void check_rescoring() const {
    const rescoring_kind kind = c_.rescoring;
    const bool is_caote = kind == rescoring_kind::caote || kind == rescoring_kind::fastcaote;
    bool fits = kind == rescoring_kind::none;
    switch (c_.method) {
      case method_kind::snapkv:
      case method_kind::adakv:
      case method_kind::criticalkv: fits = fits || is_caote || kind == rescoring_kind::criticalkv; break;
      case method_kind::h2o:
      case method_kind::tova: fits = fits || is_caote; break;
      case method_kind::lava: fits = kind == rescoring_kind::lava; break;
      case method_kind::defensivekv: fits = kind == rescoring_kind::defensive; break;
      case method_kind::rkv: fits = kind == rescoring_kind::rkv; break;
      default: break;
    }
    if (fits) return;
    throw input_error(fmt::format("{}{}the rescoring {} does not go with the method {}", where_,
                                  where_.empty() ? "" : ": ", name_of(kind), name_of(c_.method)));
  }

  Backend& backend_;
  const configuration& c_;
  const layer_view<float>& layer_;
  const std::string& where_;
  inspection what_;
};

template <tensor_backend Backend>
template <any_score Score, rescorer Rescoring>
selection policy_runner<Backend>::run_score(const Score& score, const Rescoring& rescoring) {
  using real = typename Backend::score_type;
  auto policy = policy_with(c_, score, c_.window_of(layer_), rescoring);
  std::optional<layer_segments> segments;
  if (c_.spatial == spatial_kind::segments) policy.spatial.choice = segments.emplace(layer_, c_.share, where_).pool();
  const problem_shape shape = shape_of(layer_, c_.layer_index, c_.layer_count);
  plan<decltype(policy)> plan;
  require(make_plan(backend_, policy, shape, plan), where_);

  const bool shows_scores = what_ == inspection::scores;
  selection result;
  result.batch = shape.batch;
  result.heads = plan.heads;
  result.past = make_score_request(policy, shape).past_of(shape.tokens);
  const index_t rows = shape.batch * plan.heads;
  result.drift.resize(static_cast<std::size_t>(rows));
  const auto elements = static_cast<std::size_t>(shows_scores ? rows * shape.tokens : 0);
  std::vector<real> scores(elements);
  std::vector<real> smoothed(elements);
  const selection_details<real> details{{scores.data(), {shape.batch, plan.heads, shape.tokens}},
                                        {smoothed.data(), {shape.batch, plan.heads, shape.tokens}},
                                        {result.drift.data(), {shape.batch, plan.heads}}};
  std::vector<std::byte> memory(plan.workspace_bytes);
  kept_tokens kept;
  const auto begin = std::chrono::steady_clock::now();
  require(select(backend_, plan, layer_, workspace(memory), kept, shows_scores ? &details : nullptr), where_);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();

  result.lengths.assign(kept.lengths.data, kept.lengths.data + rows);
  result.positions.assign(kept.positions.data, kept.positions.data + rows * kept.capacity());
  for (index_t i = 0; shows_scores && i < rows; ++i) {
    const auto row = [&](const std::vector<real>& all) { return all.begin() + i * shape.tokens; };
    result.score.insert(result.score.end(), row(scores), row(scores) + result.past);
    result.smoothed.insert(result.smoothed.end(), row(smoothed), row(smoothed) + result.past);
  }
  return result;
}

template <tensor_backend Backend>
selection policy_runner<Backend>::run_deletion() {
  return run_score(rest_kv_of(c_));
}

template <tensor_backend Backend>
selection policy_runner<Backend>::run_attention() {
  if (c_.rescoring == rescoring_kind::none) {
    return with_attention_score(c_, [&](const auto& score) { return run_score(score); });
  }
  if (c_.rescoring == rescoring_kind::criticalkv) {
    return run_score(snap_kv{}, critical_kv<>{.first_stage = c_.first_stage_ratio, .epsilon = c_.epsilon});
  }
  if (c_.method == method_kind::h2o || c_.method == method_kind::tova) {
    return run_score(observed_attention{}, caote_rescoring_of(c_));
  }
  return run_score(snap_kv{}, caote_rescoring_of(c_));
}

template <tensor_backend Backend>
selection policy_runner<Backend>::run_rescored() {
  if (c_.method == method_kind::lava) return run_score(snap_kv{}, lava{});
  if (c_.method == method_kind::rkv) {
    return run_score(snap_kv{}, r_kv{.lambda = c_.lambda, .weight = {.threshold = c_.threshold, .recent = c_.similar}});
  }
  return run_score(defensive_kv{.attention_pool = c_.attention_pool}, defensive_rescoring<>{.mass = c_.mass});
}

template <tensor_backend Backend>
selection policy_runner<Backend>::run_sizes() {
  return with_size_score(c_, [&](const auto& score) { return run_score(score); });
}

template <tensor_backend Backend>
selection policy_runner<Backend>::run_outputs() {
  return with_output_score(c_, [&](const auto& score) { return run_score(score); });
}

template <tensor_backend Backend>
selection policy_runner<Backend>::run_cache() {
  cache_score memory;
  if (c_.method == method_kind::expectedattention || c_.method == method_kind::capkv) {
    return run_score(query_head_score_of(c_, layer_, memory, where_));
  }
  return run_score(head_score_of(c_, layer_, memory, where_));
}

template <tensor_backend Backend>
selection policy_runner<Backend>::run_positions() {
  return run_score(position_score_of(c_));
}

}  // namespace restkv::cli

/// Says that another source instantiates the scores of a runner. `PREFIX` is `extern` or empty.
#define RESTKV_CLI_ATTENTION_SCORES(PREFIX, BACKEND) \
  PREFIX template restkv::cli::selection restkv::cli::policy_runner<BACKEND>::run_attention();
#define RESTKV_CLI_RESCORED_SCORES(PREFIX, BACKEND) \
  PREFIX template restkv::cli::selection restkv::cli::policy_runner<BACKEND>::run_rescored();
#define RESTKV_CLI_VALUE_SCORES(PREFIX, BACKEND)                                         \
  PREFIX template restkv::cli::selection restkv::cli::policy_runner<BACKEND>::run_sizes(); \
  PREFIX template restkv::cli::selection restkv::cli::policy_runner<BACKEND>::run_outputs();
#define RESTKV_CLI_CACHE_SCORES(PREFIX, BACKEND)                                         \
  PREFIX template restkv::cli::selection restkv::cli::policy_runner<BACKEND>::run_cache(); \
  PREFIX template restkv::cli::selection restkv::cli::policy_runner<BACKEND>::run_positions();
