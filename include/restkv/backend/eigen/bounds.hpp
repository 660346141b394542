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

/// The largest factor by which M stretches a vector, rounding included.
template <class Request>
[[nodiscard]] float stretch_of(const head_task<Request>& task, const output_metric_view& metric) noexcept {
  return needs_metric(task.request.score) ? std::sqrt(metric.spectrum(task.head, 0)) * bound_slack : bound_slack;
}

/// Makes the radii of one head those of computed distances, rounding and cancellation included.
template <class Request>
void widen_radii(const head_task<Request>& task, const output_metric_view& metric, const head_states& states) noexcept {
  const index_t cells = task.state() * states.outputs;
  const float* const centre = states.centre + task.state() * states.width;
  const float centre_reach = stretch_of(task, metric) * std::sqrt(dot(centre, centre, states.width));
  for (index_t i = cells; i < cells + states.outputs; ++i) {
    states.radius[i] = bound_slack * states.radius[i] + bound_floor * (centre_reach + states.norm[i]);
  }
}

/// Folds the bounds on the scores of `heads` query heads of one KV head into the rows they belong to. Runs after
/// `map_outputs`; in the order `before` while the softmax is that of these heads.
template <class Request, element T>
void bound_heads(const Request& request, const layer_view<T>& layer, index_t batch, const sequence_span& span,
                 index_t first_head, index_t heads, tile_buffers& buffers, const head_states& states,
                 const tensor_view<float, 3>& out) noexcept {
  using namespace Eigen::internal;
  const bool after = order_of(request.score) == query_order::after;
  const index_t width = states.width;
  const index_t lanes = states.lanes;
  const index_t heads_of_row = request.shape.query_heads / request.heads();
  const auto task_of = [&](index_t head) { return head_task<Request>(request, batch, head, span); };
  for (index_t j = 0; j < heads; ++j) widen_radii(task_of(first_head + j), layer.metric, states);
  const index_t kv_head = task_of(first_head).kv_head();
  const float whole = after ? task_of(first_head).whole() : 1.0f;
  std::fill(buffers.scores, buffers.scores + lanes, 0.0f);
  for_tiles(request.past_of(span.length), [&](index_t tile, index_t first, index_t count) {
    const float_rows values =
        load_tokens(layer.value, batch, kv_head, span.begin + first, count, width, buffers.values);
    const float* const logits = after ? nullptr : buffers.softmax.tile_logits(layer, tile);
    for (index_t head = first_head; head < first_head + heads; ++head) {
      const auto task = task_of(head);
      const index_t cells = task.state() * states.outputs;
      const float* const centre = states.centre + task.state() * width;
      const float* const radius = states.radius + cells;
      const float stretch = stretch_of(task, layer.metric);
      float* const row = &out(batch, head / heads_of_row, 0);
      if (!after) tile_shares<true>(buffers.softmax, logits, head, tile, count, buffers.shares, buffers.odds);
      for (index_t n = 0; n < count; ++n) {
        buffers.folded[n] = squared_distance(values.data + n * values.stride, centre, width);
      }
      for (index_t n = 0; n < count; ++n) {
        const float reach = stretch * std::sqrt(buffers.folded[n]);
        auto f = task.features(first + n);
        float bound = 0;
        if (after) {
          f.attention = states.row[task.state() * states.tokens + first + n];
          f.odds = f.attention / rest_of(task, first + n, whole, states);
          f.distance = radius[0] + reach;
          f.output_norm = states.norm[cells];
          bound = finite_score(request.score(f));
        } else {
          const packet added = pset1<packet>(reach);
          for (index_t lane = 0; lane < lanes; lane += packet_size) {
            pstoreu(buffers.cross + lane, padd(ploadu<packet>(radius + lane), added));
          }
          bound = score_of_lanes(task, f,
                                 {.shares = buffers.shares + n * lanes,
                                  .odds = buffers.odds + n * lanes,
                                  .distances = buffers.cross,
                                  .norms = states.norm + cells},
                                 buffers, lanes);
        }
        row[first + n] = group_fold(request.group, row[first + n], bound, head % heads_of_row == 0);
      }
    }
  });
}

/// In place of bounds that are not numbers, the largest float: those tokens are scored.
inline void bound_unknown(index_t past, float* row) noexcept {
  constexpr float most = std::numeric_limits<float>::max();
  for (index_t n = 0; n < past; ++n) row[n] = row[n] <= most ? row[n] : most;
}

}  // namespace restkv::eigen
