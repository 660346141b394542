// SPDX-License-Identifier: Apache-2.0
/// @file
/// First half of scoring: what has to be known about every query head before any token can be scored.
#pragma once

#include <restkv/backend/eigen/head_state.hpp>

namespace restkv::eigen {

/// min(exp(logit - largest) scale, 1): the share of attention a of one packet of lanes. Every share of the backend is this
/// expression, so that a token's share has the same bits wherever it is needed.
[[nodiscard]] EIGEN_ALWAYS_INLINE packet share_of(const float* logits, const packet& largest,
                                                  const packet& scale) noexcept {
  using namespace Eigen::internal;
  const packet exponent = psub(ploadu<packet>(logits), largest);
  return pmin(pmul(exponential(exponent), scale), pset1<packet>(1.0f));
}

/// Shares and, where asked, odds a / (1 - a) of `count` tokens' logits, row n at logits + n * logit_stride. The odds of a
/// lane's top token are wrong: they cancel, and the caller puts in 1 / rest. shares and odds are [count, lanes]; `shares` may
/// be `logits` where their rows lie alike.
template <bool Odds>
void shares_of(const float* logits, index_t logit_stride, const float* largest, const float* scale, index_t lanes,
               index_t count, float* shares, float* odds) noexcept {
  using namespace Eigen::internal;
  const packet one = pset1<packet>(1.0f);
  for (index_t lane = 0; lane < lanes; lane += packet_size) {
    const packet shift = ploadu<packet>(largest + lane);
    const packet factor = ploadu<packet>(scale + lane);
    for (index_t n = 0; n < count; ++n) {
      const packet share = share_of(logits + n * logit_stride + lane, shift, factor);
      pstoreu(shares + n * lanes + lane, share);
      if constexpr (Odds) pstoreu(odds + n * lanes + lane, pdiv(share, psub(one, share)));
    }
  }
}

/// Shares and, where asked, odds of the first `count` tokens of a tile for one head of the softmax's block, each lane's
/// top token included. `logits` is the whole block's tile.
template <bool Odds>
void tile_shares(const window_softmax& softmax, const float* logits, index_t head, index_t tile, index_t count,
                 float* shares, float* odds) noexcept {
  const lane_block& block = softmax.block();
  const index_t at = block.lane_of(head);
  shares_of<Odds>(logits + at, block.lanes(), softmax.largest() + at, softmax.scale() + at, block.stride, count, shares,
                  odds);
  if constexpr (Odds) {
    for (index_t lane = 0; lane < block.window; ++lane) {
      const index_t n = softmax.top()[at + lane] - tile * tile_tokens;
      if (n >= 0 && n < count) {
        odds[n * block.stride + lane] = 1.0f / std::max(softmax.rest()[at + lane], least_rest);
      }
    }
  }
}

/// Calls body(tile, first, count) for the tiles of the first `tokens` tokens of a sequence.
template <class Body>
void for_tiles(index_t tokens, const Body& body) noexcept {
  for (index_t first = 0; first < tokens; first += tile_tokens) {
    body(first / tile_tokens, first, std::min(tile_tokens, tokens - first));
  }
}

/// One token's features under each query, [lanes]; those that the score does not ask for are not read.
struct lane_features {
  const float* shares = nullptr;
  const float* odds = nullptr;
  const float* distances = nullptr;
  const float* norms = nullptr;
  const float* logits = nullptr;
  const float* alignments = nullptr;
};

/// The scores of one token under the queries [first, end), into `scores` [lanes].
template <class Request>
EIGEN_ALWAYS_INLINE void score_lanes(const head_task<Request>& task, const token_features<float>& token,
                                     const lane_features& lanes, index_t first, index_t end, float* scores) noexcept {
  constexpr feature needs = needs_of<Request>::set;
  // A copy, so that the compiler knows that writing a score does not change it: the loop becomes vector code.
  const auto score = task.request.score;
  const lane_features at = lanes;
  for (index_t lane = first; lane < end; ++lane) {
    token_features<float> f = token;
    f.attention = at.shares[lane];
    if constexpr (has(needs, feature::odds)) f.odds = at.odds[lane];
    if constexpr (has(needs, feature::distance)) f.distance = at.distances[lane];
    if constexpr (has(needs, feature::output_norm)) f.output_norm = at.norms[lane];
    if constexpr (has(needs, feature::logit)) f.logit = at.logits[lane];
    if constexpr (has(needs, feature::alignment)) f.alignment = at.alignments[lane];
    scores[lane] = score(f);
  }
}

/// One token's score: the score of every query of the window, and their temporal reduction. Lanes of buffers.scores
/// beyond the window must be 0.
template <class Request>
[[nodiscard]] EIGEN_ALWAYS_INLINE float score_of_lanes(const head_task<Request>& task, const token_features<float>& token,
                                                       const lane_features& features, tile_buffers& buffers,
                                                       index_t lanes) noexcept {
  const index_t window = task.window;
  float* const scores = buffers.scores;
  score_lanes(task, token, features, 0, window, scores);
  const float reduced = task.reduce(scores, buffers.weights, lanes);
  if (reduced == reduced) return finite_score(reduced);
  // Not a number: perhaps for a score that is none or infinite, and has a weight of 0.
  for (index_t lane = 0; lane < window; ++lane) {
    const bool counts = !is_linear(task.request.temporal) || buffers.weights[lane] != 0.0f;
    scores[lane] = counts ? finite_score(scores[lane]) : 0.0f;
  }
  return finite_score(task.reduce(scores, buffers.weights, lanes));
}

/// 1 - a of one token's smoothed attention a = S(a_i), from the queries' own rests r_i: 1 - S(1 - r) = -S(-r) for every
/// smoother S that does not mind a constant. `shares` are the token's, [lanes]; overwrites buffers.scores up to the window.
template <class Request>
[[nodiscard]] float smoothed_rest(const head_task<Request>& task, index_t token, const float* shares,
                                  tile_buffers& buffers) noexcept {
  const index_t at = buffers.softmax.block().lane_of(task.head);
  for (index_t lane = 0; lane < task.window; ++lane) {
    const float others = buffers.softmax.rest()[at + lane];
    buffers.scores[lane] =
        buffers.softmax.top()[at + lane] == token ? -others / (1.0f + others) : shares[lane] - 1.0f;
  }
  return -task.reduce(buffers.scores, buffers.weights, buffers.softmax.block().stride);
}

/// Scores that need nothing but attention, for the heads of the softmax's block, folded into the rows they belong to.
template <class Request, element T>
void score_locally(const Request& request, const layer_view<T>& layer, index_t batch, const sequence_span& span,
                   tile_buffers& buffers, const tensor_view<float, 3>& out) noexcept {
  constexpr bool odds = has(needs_of<Request>::set, feature::odds);
  const lane_block& block = buffers.softmax.block();
  const index_t lanes = block.stride;
  const index_t heads_of_row = request.shape.query_heads / request.heads();
  const bool after = order_of(request.score) == query_order::after;
  std::fill(buffers.scores, buffers.scores + lanes, 0.0f);
  for_tiles(request.past_of(span.length), [&](index_t tile, index_t first, index_t count) {
    const float* const logits = buffers.softmax.tile_logits(layer, tile);
    for (index_t head = block.first_head; head < block.first_head + block.heads; ++head) {
      const head_task<Request> task(request, batch, head, span);
      float* const row = &out(batch, head / heads_of_row, 0);
      tile_shares<odds>(buffers.softmax, logits, head, tile, count, buffers.shares, buffers.odds);
      for (index_t n = 0; n < count; ++n) {
        const float* const shares = buffers.shares + n * lanes;
        auto f = task.features(first + n);
        float score = 0;
        if (after) {
          f.attention = task.reduce(shares, buffers.weights, lanes);
          if constexpr (odds) {
            f.odds = f.attention / std::max(smoothed_rest(task, first + n, shares, buffers), least_rest);
          }
          score = finite_score(request.score(f));
        } else {
          const lane_features features{.shares = shares,
                                       .odds = buffers.odds + n * lanes,
                                       .logits = logits + n * block.lanes() + block.lane_of(head)};
          score = score_of_lanes(task, f, features, buffers, lanes);
        }
        row[first + n] = group_fold(request.group, row[first + n], score, head % heads_of_row == 0);
      }
    }
  });
}

/// Keeps what the second half needs of the softmax: queries, largest logits, rests and tops. Order `before`.
template <class Request>
void keep_softmax(const head_task<Request>& task, const window_softmax& softmax, head_states& states) noexcept {
  const index_t lanes = states.lanes;
  const index_t from = softmax.block().lane_of(task.head);
  const index_t to = task.state() * lanes;
  const index_t head_dim = task.request.shape.head_dim;
  std::copy_n(softmax.queries() + from * head_dim, head_dim * lanes, states.queries + to * head_dim);
  std::copy_n(softmax.largest() + from, lanes, states.largest + to);
  std::copy_n(softmax.rest() + from, lanes, states.rest + to);
  std::copy_n(softmax.scale() + from, lanes, states.scale + to);
  std::copy_n(softmax.top() + from, lanes, states.top + to);
}

/// Order `before`, the heads of the softmax's block: others[lane] = sum over n != top of a_n v_n, over all tokens the lane
/// sees.
template <class Request, element T>
void outputs_per_query(const Request& request, const layer_view<T>& layer, index_t batch, const sequence_span& span,
                       tile_buffers& buffers, head_states& states) noexcept {
  const lane_block& block = buffers.softmax.block();
  const index_t lanes = states.lanes;
  const head_task<Request> first_task(request, batch, block.first_head, span);
  float* const others = states.others + first_task.state() * lanes * states.width;  // [heads, lanes, width]
  std::fill(others, others + block.lanes() * states.width, 0.0f);
  for_tiles(span.length, [&](index_t tile, index_t first, index_t count) {
    const float* const logits = buffers.softmax.tile_logits(layer, tile);
    const float_rows values =
        load_tokens(layer.value, batch, first_task.kv_head(), span.begin + first, count, states.width, buffers.values);
    for (index_t j = 0; j < block.heads; ++j) {
      const index_t head = block.first_head + j;
      tile_shares<false>(buffers.softmax, logits, head, tile, count, buffers.shares, nullptr);
      for (index_t lane = 0; lane < block.window; ++lane) {
        const index_t n = buffers.softmax.top()[block.lane_of(head) + lane] - first;
        if (n >= 0 && n < count) buffers.shares[n * lanes + lane] = 0.0f;
      }
      multiply<true>({buffers.shares, 1, lanes}, lanes, values.data, values.stride, states.width, count,
                     others + j * lanes * states.width, states.width);
    }
  });
}

/// Order `after`, the heads of the softmax's block: the smoothed attention rows over the past, and their top tokens with
/// 1 - a.
template <class Request, element T>
void smoothed_rows(const Request& request, const layer_view<T>& layer, index_t batch, const sequence_span& span,
                   tile_buffers& buffers, head_states& states) noexcept {
  const lane_block& block = buffers.softmax.block();
  const index_t lanes = states.lanes;
  const index_t past = request.past_of(span.length);
  std::fill(buffers.scores, buffers.scores + lanes, 0.0f);
  for_tiles(past, [&](index_t tile, index_t first, index_t count) {
    const float* const logits = buffers.softmax.tile_logits(layer, tile);
    for (index_t head = block.first_head; head < block.first_head + block.heads; ++head) {
      const head_task<Request> task(request, batch, head, span);
      const index_t at = task.state() * states.tokens + first;
      tile_shares<false>(buffers.softmax, logits, head, tile, count, buffers.shares, nullptr);
      for (index_t n = 0; n < count; ++n) {
        const float* const shares = buffers.shares + n * lanes;
        states.row[at + n] = task.reduce(shares, buffers.weights, lanes);
        if (states.row_rest != nullptr) {
          states.row_rest[at + n] = smoothed_rest(task, first + n, shares, buffers);
        }
      }
    }
  });
  for (index_t head = block.first_head; head < block.first_head + block.heads; ++head) {
    const head_task<Request> task(request, batch, head, span);
    const float* const row = states.row + task.state() * states.tokens;
    index_t top = 0;
    for (index_t n = 1; n < past; ++n) top = row[n] > row[top] ? n : top;
    const index_t tile = top / tile_tokens;
    const index_t count = top % tile_tokens + 1;
    tile_shares<false>(buffers.softmax, buffers.softmax.tile_logits(layer, tile), head, tile, count, buffers.shares,
                       nullptr);
    states.top[task.state()] = top;
    states.rest[task.state()] = smoothed_rest(task, top, buffers.shares + (count - 1) * lanes, buffers);
  }
}

/// 1 - a of a token of the smoothed attention; `whole` is the task's. Only the top token of a linear smoother's row can
/// hold so much that the subtraction loses digits.
template <class Request>
[[nodiscard]] float rest_of(const head_task<Request>& task, index_t token, float whole,
                            const head_states& states) noexcept {
  const index_t cell = task.state();
  const index_t at = cell * states.tokens + token;
  float rest = token == states.top[cell] ? states.rest[cell] : whole - states.row[at];
  if (states.row_rest != nullptr) rest = states.row_rest[at];
  return std::max(rest, least_rest);
}

/// Order `after`, all query heads of a KV head at once: others = sum over past n != top of a_n v_n.
template <class Request, element T>
void outputs_of_rows(const Request& request, const layer_view<T>& layer, index_t batch, index_t kv_head,
                     const sequence_span& span, tile_buffers& buffers, head_states& states) noexcept {
  const index_t group = request.shape.group();
  const index_t state = batch * request.shape.query_heads + kv_head * group;
  const index_t past = request.past_of(span.length);
  float* const rows = states.row + state * states.tokens;
  float* const others = states.others + state * states.width;
  std::fill(others, others + group * states.width, 0.0f);
  for (index_t first = 0; first < past; first += tile_tokens) {
    const index_t count = std::min(tile_tokens, past - first);
    const float_rows values =
        load_tokens(layer.value, batch, kv_head, span.begin + first, count, states.width, buffers.values);
    // The top tokens' weights are 0 during the product and put back after it.
    const auto without_tops = [&](auto&& body) {
      for (index_t j = 0; j < group; ++j) {
        const index_t top = states.top[state + j];
        if (top >= first && top < first + count) body(rows[j * states.tokens + top], buffers.scores[j]);
      }
    };
    without_tops([](float& weight, float& saved) {
      saved = weight;
      weight = 0.0f;
    });
    multiply<true>({rows + first, states.tokens, 1}, group, values.data, values.stride, states.width, count, others,
                   states.width);
    without_tops([](float& weight, const float& saved) { weight = saved; });
  }
}

/// The mean of a KV head's values through the metric of each query head of its group, M v. `first` is the group's first.
template <class Request, element T>
void map_mean_values(const head_task<Request>& first, const layer_view<T>& layer, const metric_factors& factors,
                     tile_buffers& buffers, head_states& states) noexcept {
  const index_t width = states.width;
  float* const mean = buffers.vector;
  float* const tile_sum = buffers.vector + width;
  std::fill_n(mean, width, 0.0f);
  for_tiles(first.span.length, [&](index_t, index_t token, index_t count) {
    const float_rows values =
        load_tokens(layer.value, first.batch, first.kv_head(), first.span.begin + token, count, width, buffers.values);
    std::fill_n(tile_sum, width, 0.0f);
    for (index_t n = 0; n < count; ++n) {
      for (index_t c = 0; c < width; ++c) tile_sum[c] += values.data[n * values.stride + c];
    }
    for (index_t c = 0; c < width; ++c) mean[c] += tile_sum[c] / static_cast<float>(first.span.length);
  });
  for (index_t j = 0; j < first.request.shape.group(); ++j) {
    float* const image = states.mean_image + (first.state() + j) * width;
    if (needs_metric(first.request.score)) {
      factors.apply(first.head + j, {mean, width}, 1, image);
    } else {
      std::copy_n(mean, width, image);
    }
  }
}

/// Ends the first half for one head: the outputs through the metric, M o with M = L^T or the identity, laid out for the
/// product with M v; their norms; and, where scores are bounded, a ball around them.
template <class Request, element T>
void map_outputs(const head_task<Request>& task, const layer_view<T>& layer, const metric_factors& factors,
                 tile_buffers& buffers, head_states& states) noexcept {
  const index_t width = states.width;
  const index_t outputs = states.outputs;
  const bool after = order_of(task.request.score) == query_order::after;
  const bool metric = needs_metric(task.request.score);
  const index_t used = after ? 1 : task.window;
  const index_t cells = task.state() * outputs;
  float* const target = states.image + cells * width;  // [width, outputs]
  // o of output i, to `row`. Tokens of a tile are behind each other, so a tile's staging holds as many rows.
  const auto whole_output = [&](index_t i, float* row) {
    const index_t cell = cells + i;
    const index_t top = states.top[cell];
    const float share = after ? states.row[task.state() * states.tokens + top] : 1.0f / (1.0f + states.rest[cell]);
    const float_rows value =
        load_tokens(layer.value, task.batch, task.kv_head(), task.span.begin + top, 1, width, buffers.vector);
    for (index_t c = 0; c < width; ++c) row[c] = states.others[cell * width + c] + share * value.data[c];
  };
  const auto map_rows = [&](index_t count) {
    if (!metric) return static_cast<const float*>(buffers.values);
    factors.apply(task.head, {buffers.values, width}, count, buffers.images);
    return static_cast<const float*>(buffers.images);
  };
  for (index_t first = 0; first < used; first += tile_tokens) {
    const index_t count = std::min(tile_tokens, used - first);
    for (index_t i = 0; i < count; ++i) whole_output(first + i, buffers.values + i * width);
    const float* const images = map_rows(count);
    for (index_t i = 0; i < count; ++i) {
      const float* const image = images + i * width;
      states.image_norm[cells + first + i] = dot(image, image, width);
      for (index_t c = 0; c < width; ++c) target[c * outputs + first + i] = image[c];
    }
  }
  // Padded lanes: a zero image keeps their products finite.
  for (index_t i = used; i < outputs; ++i) {
    states.image_norm[cells + i] = 0.0f;
    for (index_t c = 0; c < width; ++c) target[c * outputs + i] = 0.0f;
  }
  for (index_t i = 0; i < outputs; ++i) states.norm[cells + i] = std::sqrt(states.image_norm[cells + i]);

  if constexpr (needs_of<Request>::boundable) {
    float* const centre = states.centre + task.state() * width;
    std::fill(centre, centre + width, 0.0f);
    for (index_t i = 0; i < used; ++i) {
      whole_output(i, buffers.values);
      for (index_t c = 0; c < width; ++c) centre[c] += buffers.values[c] / static_cast<float>(used);
    }
    std::fill(states.radius + cells, states.radius + cells + outputs, 0.0f);
    for (index_t first = 0; first < used; first += tile_tokens) {
      const index_t count = std::min(tile_tokens, used - first);
      for (index_t i = 0; i < count; ++i) {
        float* const row = buffers.values + i * width;
        whole_output(first + i, row);
        for (index_t c = 0; c < width; ++c) row[c] -= centre[c];
      }
      const float* const images = map_rows(count);
      for (index_t i = 0; i < count; ++i) {
        states.radius[cells + first + i] = std::sqrt(dot(images + i * width, images + i * width, width));
      }
    }
  }
}

}  // namespace restkv::eigen
