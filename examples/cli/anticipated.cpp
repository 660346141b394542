// SPDX-License-Identifier: Apache-2.0
#include "anticipated.hpp"

#include "command.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/cache/compact.hpp>
#include <restkv/merge/fit_values.hpp>
#include <restkv/presets.hpp>
#include <restkv/select.hpp>
#include <restkv/selection/set_error.hpp>
#include <restkv/selection/set_error/anticipation.hpp>
#include <restkv/verify/merged_output_error.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>

namespace restkv::cli {

namespace {

/// Tokens that the head with the most of them keeps.
index_t longest_head(const const_kept_tokens& kept) {
  position_t longest = 0;
  for (index_t h = 0; h < kept.heads(); ++h) longest = std::max(longest, kept.lengths(0, h));
  return longest;
}

/// The same set with room for `room` tokens a head.
owned_kept_tokens with_room(const const_kept_tokens& from, index_t room) {
  owned_kept_tokens made(1, from.heads(), room);
  const kept_tokens to = made.kept();
  for (index_t h = 0; h < from.heads(); ++h) {
    to.lengths(0, h) = from.lengths(0, h);
    std::copy_n(&from.positions(0, h, 0), from.lengths(0, h), &to.positions(0, h, 0));
  }
  return made;
}

/// A compacted cache of its own.
struct dense_cache {
  std::vector<float> keys, values;
  dense_layout<float> key, value;

  dense_cache(const const_kept_tokens& kept, const layer_view<float>& layer)
      : keys(static_cast<std::size_t>(kept.heads() * kept.capacity() * layer.key.extent(3))), values(keys.size()),
        key{{keys.data(), {1, kept.heads(), kept.capacity(), layer.key.extent(3)}}},
        value{{values.data(), {1, kept.heads(), kept.capacity(), layer.key.extent(3)}}} {
    require(compact(kept, layer.key, layer.value, key, value), "");
  }
};

constexpr index_t horizon = 32;
constexpr index_t recent = 8;  // of the prompt, which the last queries alone cannot judge

}  // namespace

refined_selection select_anticipated(const trace_layer& layer, refinement how, index_t budget, double rope_theta,
                                     int threads) {
  if (!(rope_theta > 0)) throw input_error("the trace does not say rope_theta: queries to come cannot be rotated");
  const layer_view<float> prompt = layer.prompt();
  const index_t tokens = prompt.key.extent(2);
  const index_t heads = prompt.key.extent(1);
  eigen_backend backend(threads);
  std::vector<double> frequencies(static_cast<std::size_t>(prompt.key.extent(3) / 2));
  require(rope_frequencies(rope_parameters<>{prompt.key.extent(3), rope_theta}, frequencies), "");
  const bool exchanges = how == refinement::set_error || how == refinement::set_error_fitted;
  group_metric joint;  // once, when a model is loaded
  if (exchanges) require(joint.build(layer.projection, prompt.query.extent(1), prompt.key.extent(3), heads), "");
  const auto begin = std::chrono::steady_clock::now();

  const anticipation guess{.horizon = horizon, .frequencies = frequencies};
  std::vector<std::byte> guess_memory(anticipation_workspace_bytes(guess, prompt));
  anticipated_layer<float> coming;
  require(anticipate(guess, prompt, workspace(guess_memory), coming), "");
  auto policy = presets::lowest_error(budget + horizon);
  policy.protect.recent = horizon + recent;
  owned_selection start;
  require(start.run(backend, policy, coming.layer), "");
  owned_kept_tokens chosen = with_room(start.kept(), longest_head(start.kept()));

  if (exchanges) {
    auto wider = policy;
    wider.budget.budget = 3 * budget + horizon;
    owned_selection run;
    require(run.run(backend, wider, coming.layer), "");
    const owned_kept_tokens candidates = with_room(run.kept(), longest_head(run.kept()));
    // Heads exchange room: each may take what all have.
    chosen = with_room(chosen, std::max(candidates.kept().capacity(), chosen.kept().capacity()));
    const set_error options{.horizon = horizon,
                            .weights = coming.weights,
                            .noise_weights = coming.noise_weights,
                            .protect = {.sink = 0, .recent = horizon + recent}};
    kept_tokens set = chosen.kept();
    std::vector<std::byte> memory(set_error_workspace_bytes(options, coming.layer, candidates, set));
    require(refine_set_error(backend, options, coming.layer, joint.view(), candidates, set, workspace(memory)), "");
  }
  kept_tokens kept = chosen.kept();

  // The copies of the last tokens stand behind the prompt's, so that dropping them leaves the rest where it is.
  const dense_cache cache(kept, coming.layer);
  using merged = merged_cache<dense_layout<float>, dense_layout<float>>;
  if (how == refinement::anticipated_fitted || how == refinement::set_error_fitted) {
    const merged with_copies{kept, cache.key, cache.value, {}};
    std::vector<std::byte> memory(fit_workspace_bytes(with_copies, coming.layer));
    require(fit_values(with_copies, coming.layer, {}, workspace(memory)), "");
  }
  drop_anticipated(kept, tokens);

  refined_selection result;
  result.chosen.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  result.chosen.heads = heads;
  result.chosen.positions.assign(kept.positions.data, kept.positions.data + heads * kept.capacity());
  result.chosen.lengths.assign(kept.lengths.data, kept.lengths.data + heads);
  merged_output_errors errors;
  require(merged_future_error(backend, merged{kept, cache.key, cache.value, {}}, prompt, layer.future(), errors), "");
  result.mean = errors.mean_relative();
  for (index_t i = 0; i < errors.queries(); ++i) {
    const double norm = errors.layer_output_norm()(0, i);
    if (norm > 0) result.worst = std::max(result.worst, errors.layer()(0, i) / norm);
  }
  return result;
}

}  // namespace restkv::cli
