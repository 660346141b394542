// SPDX-License-Identifier: Apache-2.0
/// @file
/// One kept set for all layers and heads, as llama.cpp's cache has it: a cell holds a token of all of them.
#pragma once

#include "observed_cache.hpp"

#include <restkv/policy.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/score/given_scores.hpp>
#include <restkv/select.hpp>

#include <vector>

/// Tokens to keep, ascending: the best `budget` by the mean over all layers and KV heads of ReST-KV's score (how far an
/// output would move without the token), each head's scores relative to their sum, so that no layer decides alone.
/// Neighbours of an important token are kept with it, since words have several. The first `sink` tokens and the window
/// stay. With `recent` only the newest stay, whatever the scores.
///
/// Throws `restkv::error`.
inline std::vector<restkv::position_t> choose_tokens(const observed_cache& cache, restkv::index_t budget,
                                                     restkv::index_t window, restkv::index_t sink, bool recent) {
  using restkv::index_t;
  const index_t tokens = cache.tokens();
  restkv::reference_backend backend;
  std::vector<float> merged(static_cast<std::size_t>(tokens));
  for (index_t l = 0; l < cache.layers() && !recent; ++l) {
    const restkv::layer_view<float> layer = cache.view(l);
    const restkv::eviction_policy<restkv::rest_kv, restkv::mean, restkv::max_pool, restkv::uniform> policy{
        .score = {.metric_of_distance = restkv::metric::identity},
        .window = window,
        .spatial = {.width = 7},
        .budget = {budget}};
    const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer));
    std::vector<std::byte> memory(plan.workspace_bytes);
    std::vector<double> score(static_cast<std::size_t>(plan.heads * tokens));
    std::vector<double> smoothed(score.size());
    std::vector<double> drift(static_cast<std::size_t>(plan.heads));
    restkv::selection_details<double> details{.score = {score.data(), {1, plan.heads, tokens}},
                                              .smoothed = {smoothed.data(), {1, plan.heads, tokens}},
                                              .drift = {drift.data(), {1, plan.heads}}};
    restkv::kept_tokens kept;
    restkv::throw_if_failed(restkv::select(backend, plan, layer, restkv::workspace(memory), kept, &details));
    const index_t past = tokens - window;  // the window's own tokens are kept and have no score
    for (index_t h = 0; h < plan.heads; ++h) {
      double sum = 0;
      for (index_t n = 0; n < past; ++n) sum += details.smoothed(0, h, n);
      for (index_t n = 0; n < past && sum > 0; ++n) {
        merged[static_cast<std::size_t>(n)] += static_cast<float>(details.smoothed(0, h, n) / sum);
      }
    }
  }
  for (index_t n = 0; n < tokens && recent; ++n) merged[static_cast<std::size_t>(n)] = static_cast<float>(n);

  // A layer of one head, of which the scores are known.
  restkv::layer_view<float> layer = cache.view(0);
  layer.query = {};
  layer.key = layer.key.chunk(0).slice(1, 0, 1);
  layer.value = {};
  const restkv::eviction_policy<restkv::given_scores<>, restkv::mean, restkv::no_pool, restkv::uniform> policy{
      .score = {{merged.data(), {1, 1, tokens}}},
      .group = restkv::group_reduce::mean,
      .budget = {budget},
      .protect = {.sink = sink, .recent = window}};
  const auto plan = restkv::make_plan(backend, policy, restkv::problem_shape{1, 1, 1, layer.key.extent(3), tokens});
  std::vector<std::byte> memory(plan.workspace_bytes);
  const restkv::kept_tokens kept = restkv::select(backend, plan, layer, restkv::workspace(memory));
  const restkv::position_t* const first = &kept.positions(0, 0, 0);
  return {first, first + kept.lengths(0, 0)};
}
