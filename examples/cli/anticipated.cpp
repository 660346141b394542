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

/// A kept set in memory of its own.
struct kept_copy {
  std::vector<position_t> positions;
  std::vector<position_t> lengths;
  kept_tokens kept;

  explicit kept_copy(const const_kept_tokens& from) {
    const index_t heads = from.heads();
    for (index_t h = 0; h < heads; ++h) lengths.push_back(from.lengths(0, h));
    const index_t capacity = *std::max_element(lengths.begin(), lengths.end());
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < capacity; ++i) {
        positions.push_back(i < from.lengths(0, h) ? from.positions(0, h, i) : position_t{0});
      }
    }
    kept = {{positions.data(), {1, heads, capacity}}, {lengths.data(), {1, heads}}};
  }
};

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
  group_metric joint;  // once, when a model is loaded
  require(joint.build(layer.projection, prompt.query.extent(1), prompt.key.extent(3), heads), "");
  const auto begin = std::chrono::steady_clock::now();

  const anticipation guess{.horizon = horizon, .frequencies = frequencies};
  std::vector<std::byte> guess_memory(anticipation_workspace_bytes(guess, prompt));
  anticipated_layer<float> coming;
  require(anticipate(guess, prompt, workspace(guess_memory), coming), "");
  auto policy = presets::lowest_error(budget + horizon);
  policy.protect.recent = horizon + recent;
  owned_selection start;
  require(start.run(backend, policy, coming.layer), "");
  kept_copy kept(start.kept());

  if (how == refinement::set_error || how == refinement::set_error_fitted) {
    auto wider = policy;
    wider.budget.budget = 3 * budget + horizon;
    owned_selection candidates;
    require(candidates.run(backend, wider, coming.layer), "");
    const set_error options{.horizon = horizon,
                            .weights = coming.weights,
                            .noise_weights = coming.noise_weights,
                            .protect = {.sink = 0, .recent = horizon + recent}};
    // Heads exchange room: each may take what all have.
    const kept_copy choice(candidates.kept());
    const index_t room = std::max(choice.kept.capacity(), kept.kept.capacity());
    std::vector<position_t> positions(static_cast<std::size_t>(heads * room));
    for (index_t h = 0; h < heads; ++h) {
      std::copy_n(&kept.kept.positions(0, h, 0), kept.kept.lengths(0, h), positions.begin() + h * room);
    }
    kept.positions = std::move(positions);
    kept.kept.positions = {kept.positions.data(), {1, heads, room}};
    std::vector<std::byte> memory(set_error_workspace_bytes(options, coming.layer, choice.kept, kept.kept));
    require(refine_set_error(backend, options, coming.layer, joint.view(), choice.kept, kept.kept, workspace(memory)),
            "");
  }

  // The copies of the last tokens stand behind the prompt's, so that dropping them leaves the rest where it is.
  const dense_cache cache(kept.kept, coming.layer);
  using merged = merged_cache<dense_layout<float>, dense_layout<float>>;
  if (how == refinement::anticipated_fitted || how == refinement::set_error_fitted) {
    const merged with_copies{kept.kept, cache.key, cache.value, {}};
    std::vector<std::byte> memory(fit_workspace_bytes(with_copies, coming.layer));
    require(fit_values(with_copies, coming.layer, {}, workspace(memory)), "");
  }
  drop_anticipated(kept.kept, tokens);

  refined_selection result;
  result.chosen.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  result.chosen.heads = heads;
  result.chosen.positions = kept.positions;
  result.chosen.lengths = kept.lengths;
  merged_output_errors errors;
  require(merged_future_error(backend, merged{kept.kept, cache.key, cache.value, {}}, prompt, layer.future(), errors), "");
  result.mean = errors.mean_relative();
  for (index_t i = 0; i < errors.queries(); ++i) {
    const double norm = errors.layer_output_norm()(0, i);
    if (norm > 0) result.worst = std::max(result.worst, errors.layer()(0, i) / norm);
  }
  return result;
}

}  // namespace restkv::cli
