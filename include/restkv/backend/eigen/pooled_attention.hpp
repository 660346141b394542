// SPDX-License-Identifier: Apache-2.0
/// @file
/// Scores of attention that was averaged over neighbouring tokens within each query.
#pragma once

#include <restkv/backend/eigen/observation.hpp>

namespace restkv::eigen {

/// As `score_locally`, for a score with `attention_pool`: the shares of a query become the mean over that many
/// neighbours of the past, scaled back to their sum. Each mean is a sum of its own terms, so that a large share leaves no
/// trace in means that do not contain it. Cost besides: a second pass over the shares, attention_pool additions a share.
template <class Request, element T>
void score_pooled(const Request& request, const layer_view<T>& layer, index_t batch, const sequence_span& span,
                  tile_buffers& buffers, const tensor_view<float, 3>& out) noexcept {
  const lane_block& block = buffers.softmax.block();
  const index_t lanes = block.stride;
  const index_t heads_of_row = request.shape.query_heads / request.heads();
  const index_t past = request.past_of(span.length);
  const index_t width = attention_pool_of(request.score);
  const index_t reach = width / 2;
  float* const ring = buffers.ring;  // row n % width: the shares of token n
  float* const scale = buffers.cross;
  float* const pooled = buffers.cross + lanes;
  static_assert(tile_tokens >= 2);
  std::fill(buffers.scores, buffers.scores + lanes, 0.0f);
  for (index_t head = block.first_head; head < block.first_head + block.heads; ++head) {
    const head_task<Request> task(request, batch, head, span);
    float* const row = &out(batch, head / heads_of_row, 0);
    const auto for_shares = [&](auto&& body) {
      for_tiles(past, [&](index_t tile, index_t first, index_t count) {
        tile_shares<false>(buffers.softmax, buffers.softmax.tile_logits(layer, tile), head, tile, count, buffers.shares,
                           nullptr);
        for (index_t n = 0; n < count; ++n) body(first + n, buffers.shares + n * lanes);
      });
    };
    // What the means of a query add up to: a token near an end of the past is in fewer of them.
    float* const whole = ring;
    float* const in_means = ring + lanes;
    std::fill_n(whole, 2 * lanes, 0.0f);
    for_shares([&](index_t n, const float* shares) {
      const index_t means = std::min(past - 1, n + reach) - std::max<index_t>(0, n - reach) + 1;
      const float part = static_cast<float>(means) / static_cast<float>(width);
      for (index_t lane = 0; lane < lanes; ++lane) {
        whole[lane] += shares[lane];
        in_means[lane] += part * shares[lane];
      }
    });
    for (index_t lane = 0; lane < lanes; ++lane) {
      scale[lane] = in_means[lane] > 0 ? whole[lane] / in_means[lane] / static_cast<float>(width) : 0.0f;
    }
    const auto score_token = [&](index_t n) {
      std::fill_n(pooled, lanes, 0.0f);
      for (index_t m = std::max<index_t>(0, n - reach); m <= std::min(past - 1, n + reach); ++m) {
        const float* const shares = ring + m % width * lanes;
        for (index_t lane = 0; lane < lanes; ++lane) pooled[lane] += shares[lane];
      }
      for (index_t lane = 0; lane < lanes; ++lane) pooled[lane] *= scale[lane];
      const float score = score_of_lanes(task, task.features(n), {.shares = pooled}, buffers, lanes);
      row[n] = group_fold(request.group, row[n], score, head % heads_of_row == 0);
    };
    for_shares([&](index_t n, const float* shares) {
      std::copy_n(shares, lanes, ring + n % width * lanes);
      if (n >= reach) score_token(n - reach);
    });
    for (index_t n = std::max<index_t>(0, past - reach); n < past; ++n) score_token(n);
  }
}

}  // namespace restkv::eigen
