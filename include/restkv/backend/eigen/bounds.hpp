// SPDX-License-Identifier: Apache-2.0
/// @file
/// Upper bounds on scores that cost no d x d product: what certified pruning starts from.
///
/// With a centre c of the window's outputs and s the largest singular value of M (M = L^T, or the identity),
///
///     ||M (o_i - v_n)|| <= ||M (o_i - c)|| + s ||v_n - c||
///
/// which takes one distance per token and head instead of a product with M and one with every output. A score that
/// grows with the distance, a temporal and a group reduction that grow with each score, and a spatial smoother that
/// grows with each input carry the bound through to the smoothed score.
#pragma once

#include <restkv/backend/eigen/observation.hpp>

namespace restkv::eigen {

/// What the computed distances may exceed their bound by: they are sums of `width` products, rounded, of which at most
/// two digits cancel (see expansion_limit).
inline constexpr float bound_slack = 1.0f + 2e-3f;
inline constexpr float bound_floor = 4e-5f;

/// Folds the bound on the scores of one head into row[n], n < past. Runs after `map_outputs`, while the softmax is the
/// head's own.
template <class Request, element T>
void bound_head(const head_task<Request>& task, const layer_view<T>& layer, bool first_of_group, tile_buffers& buffers,
                const head_states& states, float* row) noexcept {
  using namespace Eigen::internal;
  const bool after = order_of(task.request.score) == query_order::after;
  const index_t width = states.width;
  const index_t lanes = states.lanes;
  const index_t outputs = states.outputs;
  const index_t cells = task.state() * outputs;
  const float* const centre = states.centre + task.state() * width;
  const float stretch =
      needs_metric(task.request.score) ? std::sqrt(layer.metric.spectrum(task.head, 0)) * bound_slack : bound_slack;
  const float centre_norm = std::sqrt(dot(centre, centre, width));
  const float* const smoothed = after ? states.row + task.state() * states.tokens : nullptr;
  const float whole = after ? task.whole() : 1.0f;
  float* const radius = states.radius + cells;
  for (index_t i = 0; i < outputs; ++i) {
    radius[i] = bound_slack * radius[i] + bound_floor * (stretch * centre_norm + states.norm[cells + i]);
  }
  std::fill(buffers.scores, buffers.scores + lanes, 0.0f);
  for (index_t begin = 0; begin < task.past; begin += tile_tokens) {
    const index_t count = std::min(tile_tokens, task.past - begin);
    const float_rows values =
        load_tokens(layer.value, task.batch, task.kv_head(), task.span.begin + begin, count, width, buffers.values);
    if (!after) tile_shares<true>(buffers.softmax, begin / tile_tokens, count, buffers.shares, buffers.odds);
    for (index_t n = 0; n < count; ++n) {
      const float reach = stretch * std::sqrt(squared_distance(values.data + n * values.stride, centre, width));
      auto f = task.features(begin + n);
      float bound = 0;
      if (after) {
        f.attention = smoothed[begin + n];
        f.odds = f.attention / rest_of(task, begin + n, whole, states);
        f.distance = radius[0] + reach;
        f.output_norm = states.norm[cells];
        bound = finite_score(task.request.score(f));
      } else {
        const packet added = pset1<packet>(reach);
        for (index_t lane = 0; lane < lanes; lane += packet_size) {
          pstoreu(buffers.cross + lane, padd(ploadu<packet>(radius + lane), added));
        }
        bound = score_of_lanes(task, f, buffers.shares + n * lanes, buffers.odds + n * lanes, buffers.cross,
                               states.norm + cells, buffers, lanes);
      }
      row[begin + n] = group_fold(task.request.group, row[begin + n], bound, first_of_group);
    }
  }
}

/// Ends a row of bounds: group reduction, and the largest float where a bound is not a number, so that the token is
/// scored.
template <class Request>
void finish_bounds(const Request& request, index_t heads, index_t past, float* row) noexcept {
  constexpr float most = std::numeric_limits<float>::max();
  for (index_t n = 0; n < past; ++n) {
    const float bound = finite_score(group_finish(request.group, row[n], heads));
    row[n] = bound <= most ? bound : most;
  }
}

}  // namespace restkv::eigen
