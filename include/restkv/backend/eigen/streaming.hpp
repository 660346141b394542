// SPDX-License-Identifier: Apache-2.0
/// @file
/// Windows of any length, up to every query of the prompt: block by block of queries, with one running score a token.
///
/// A block of queries is an observation window at the end of the prefix that its last query sees, so the same softmax
/// serves. Cost: window * length / 2 logits and exponentials a query head; memory: one row a query head and thread.
#pragma once

#include <restkv/backend/eigen/observation.hpp>

namespace restkv::eigen {

/// Folds the scores of one token under the queries [first, end) of a block into its running score. Lane 0 is the
/// `rank`-th of the `count` queries that see the token.
template <class Request>
[[nodiscard]] float fold_lanes(const Request& request, float running, const float* scores, index_t first, index_t end,
                               index_t rank, index_t count) noexcept {
  if constexpr (needs_of<Request>::linear) {
    if (is_linear(request.temporal)) {
      double sum = 0;
      for (index_t lane = first; lane < end; ++lane) {
        const double weight = request.temporal.weight(static_cast<int>(rank + lane), static_cast<int>(count));
        if (weight != 0.0) sum += weight * static_cast<double>(finite_score(scores[lane]));
      }
      return running + static_cast<float>(sum);
    }
  }
  if constexpr (requires { request.temporal.fold(running, running, true); }) {
    for (index_t lane = first; lane < end; ++lane) {
      running = request.temporal.fold(running, finite_score(scores[lane]), rank + lane == 0);
    }
  }
  return running;
}

/// Scores of one KV head's tokens under all queries of the window, folded over queries and then over query heads.
template <class Request, element T>
void stream_window(const Request& request, const layer_view<T>& layer, index_t batch, index_t kv_head,
                   const sequence_span& span, index_t kept_logits, tile_buffers& buffers,
                   const tensor_view<float, 3>& out) noexcept {
  constexpr bool odds = has(needs_of<Request>::set, feature::odds);
  const index_t group = request.shape.group();
  const index_t window = request.window_of(span.length);
  const index_t past = request.past_of(span.length);
  const index_t before = span.length - window;  // tokens that every query of the window sees
  const index_t tokens = request.shape.tokens;
  const index_t stride = padded_lanes(queries_at_once(request));
  std::fill_n(buffers.streamed, group * tokens, 0.0f);
  for (index_t first_query = 0; first_query < window; first_query += streamed_queries) {
    const index_t queries = std::min(streamed_queries, window - first_query);
    const sequence_span seen{span.begin, before + first_query + queries};
    layer_view<T> block_layer = layer;  // whose last queries are those of the block
    block_layer.lengths = {};
    block_layer.head_lengths = {};
    block_layer.query = layer.query.slice(2, first_window_row(layer, batch, window) + first_query, queries);
    const index_t together = heads_of_block(group, stride, seen.length, kept_logits);
    for (index_t first = 0; first < group; first += together) {
      const index_t heads = std::min(together, group - first);
      const index_t first_head = kv_head * group + first;
      buffers.softmax.run(block_layer, batch, {first_head, heads, queries, stride}, seen,
                          head_perturbation(perturbation_of(request.score), request.shape.first_query_head()));
      const lane_block& block = buffers.softmax.block();
      for_tiles(std::min(past, seen.length), [&](index_t tile, index_t first_token, index_t count) {
        const float* const logits = buffers.softmax.tile_logits(block_layer, tile);
        for (index_t head = first_head; head < first_head + heads; ++head) {
          const head_task<Request> task(request, batch, head, span);
          float* const running = buffers.streamed + (head - kv_head * group) * tokens + first_token;
          tile_shares<odds>(buffers.softmax, logits, head, tile, count, buffers.shares, buffers.odds);
          for (index_t n = 0; n < count; ++n) {
            const index_t token = first_token + n;
            const index_t unseen = std::max<index_t>(0, token - before);  // queries of the window before the token
            const index_t lane = std::max<index_t>(0, unseen - first_query);
            const lane_features features{.shares = buffers.shares + n * stride,
                                         .odds = buffers.odds + n * stride,
                                         .logits = logits + n * block.lanes() + block.lane_of(head)};
            score_lanes(task, task.features(token), features, lane, queries, buffers.scores);
            running[n] = fold_lanes(request, running[n], buffers.scores, lane, queries, first_query - unseen,
                                    window - unseen);
          }
        }
      });
    }
  }
  const index_t rows = request.heads() / request.shape.kv_heads;  // of this KV head
  const index_t heads_of_row = group / rows;
  for (index_t r = 0; r < rows; ++r) {
    float* const row = &out(batch, kv_head * rows + r, 0);
    for (index_t n = 0; n < past; ++n) {
      float folded = 0;
      for (index_t j = 0; j < heads_of_row; ++j) {
        folded = group_fold(request.group, folded, buffers.streamed[(r * heads_of_row + j) * tokens + n], j == 0);
      }
      row[n] = finite_score(group_finish(request.group, folded, heads_of_row));
    }
  }
}

}  // namespace restkv::eigen
