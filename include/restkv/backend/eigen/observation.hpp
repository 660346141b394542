// SPDX-License-Identifier: Apache-2.0
/// @file
/// First half of scoring: what has to be known about every query head before any token can be scored.
#pragma once

#include <restkv/backend/eigen/head_state.hpp>

namespace restkv::eigen {

/// Below this, an exponential is not a normal float, and a share is 0.
inline constexpr float least_exponent = -87.0f;

/// min(exp(logit - largest) scale, 1): the share of attention a of one packet of lanes. Every share of the backend is this
/// expression, so that a token's share has the same bits wherever it is needed.
[[nodiscard]] EIGEN_ALWAYS_INLINE packet share_of(const float* logits, const packet& largest,
                                                  const packet& scale) noexcept {
  using namespace Eigen::internal;
  const packet exponent = psub(ploadu<packet>(logits), largest);
  const packet share = pmin(pmul(pexp(exponent), scale), pset1<packet>(1.0f));
  return pand(share, pcmp_lt(pset1<packet>(least_exponent), exponent));  // pexp never gets to 0
}

/// Shares and, where asked, odds a / (1 - a) of `count` tokens' logits. The odds of a lane's top token are wrong: they
/// cancel, and the caller puts in 1 / rest. All arrays are [count, lanes]; `shares` may be `logits`.
template <bool Odds>
void shares_of(const float* logits, const float* largest, const float* scale, index_t lanes, index_t count,
               float* shares, float* odds) noexcept {
  using namespace Eigen::internal;
  const packet one = pset1<packet>(1.0f);
  for (index_t lane = 0; lane < lanes; lane += packet_size) {
    const packet shift = ploadu<packet>(largest + lane);
    const packet factor = ploadu<packet>(scale + lane);
    for (index_t n = 0; n < count; ++n) {
      const packet share = share_of(logits + n * lanes + lane, shift, factor);
      pstoreu(shares + n * lanes + lane, share);
      if constexpr (Odds) pstoreu(odds + n * lanes + lane, pdiv(share, psub(one, share)));
    }
  }
}

/// Shares and, where asked, odds of a tile of the softmax, each lane's top token included.
template <bool Odds>
void tile_shares(const window_softmax& softmax, index_t tile, index_t count, float* shares, float* odds) noexcept {
  const index_t lanes = softmax.block().lanes;
  shares_of<Odds>(softmax.logits(tile), softmax.largest(), softmax.scale(), lanes, count, shares, odds);
  if constexpr (Odds) {
    for (index_t lane = 0; lane < softmax.block().used(); ++lane) {
      const index_t n = softmax.top()[lane] - tile * tile_tokens;
      if (n >= 0 && n < count) odds[n * lanes + lane] = 1.0f / std::max(softmax.rest()[lane], least_rest);
    }
  }
}

/// One token's score: the score of every query of the window, and their temporal reduction. `shares` to `norms` are
/// [lanes]; those of features that the score does not ask for are not read. Lanes of buffers.scores beyond the window
/// must be 0.
template <class Request>
[[nodiscard]] EIGEN_ALWAYS_INLINE float score_of_lanes(const head_task<Request>& task, const token_features<float>& token,
                                                       const float* shares, const float* odds, const float* distances,
                                                       const float* norms, tile_buffers& buffers,
                                                       index_t lanes) noexcept {
  constexpr feature needs = needs_of<Request>::set;
  // Copies, so that the compiler knows that writing a score does not change them: the loop becomes vector code.
  const auto score = task.request.score;
  const index_t window = task.window;
  float* const scores = buffers.scores;
  for (index_t lane = 0; lane < window; ++lane) {
    token_features<float> f = token;
    f.attention = shares[lane];
    if constexpr (has(needs, feature::odds)) f.odds = odds[lane];
    if constexpr (has(needs, feature::distance)) f.distance = distances[lane];
    if constexpr (has(needs, feature::output_norm)) f.output_norm = norms[lane];
    scores[lane] = score(f);
  }
  const float reduced = task.reduce(scores, buffers.weights, lanes);
  if (reduced == reduced) return finite_score(reduced);
  // Not a number: perhaps for a score that is none or infinite, and has a weight of 0.
  for (index_t lane = 0; lane < window; ++lane) {
    const bool counts = !needs_of<Request>::linear || buffers.weights[lane] != 0.0f;
    scores[lane] = counts ? finite_score(scores[lane]) : 0.0f;
  }
  return finite_score(task.reduce(scores, buffers.weights, lanes));
}

/// 1 - a of one token's smoothed attention a = S(a_i), from the queries' own rests r_i: 1 - S(1 - r) = -S(-r) for every
/// smoother S that does not mind a constant. `shares` are the token's, [lanes]; overwrites buffers.scores up to the window.
template <class Request>
[[nodiscard]] float smoothed_rest(const head_task<Request>& task, index_t token, const float* shares,
                                  tile_buffers& buffers) noexcept {
  for (index_t lane = 0; lane < task.window; ++lane) {
    const float others = buffers.softmax.rest()[lane];
    buffers.scores[lane] =
        buffers.softmax.top()[lane] == token ? -others / (1.0f + others) : shares[lane] - 1.0f;
  }
  return -task.reduce(buffers.scores, buffers.weights, buffers.softmax.block().lanes);
}

/// Scores that need nothing but attention, for one head, straight from the softmax: row[n] for n < past.
template <class Request>
void score_locally(const head_task<Request>& task, tile_buffers& buffers, float* row) noexcept {
  constexpr bool odds = has(needs_of<Request>::set, feature::odds);
  const index_t lanes = buffers.softmax.block().lanes;
  const bool after = order_of(task.request.score) == query_order::after;
  std::fill(buffers.scores, buffers.scores + lanes, 0.0f);
  for (index_t first = 0; first < task.past; first += tile_tokens) {
    const index_t count = std::min(tile_tokens, task.past - first);
    tile_shares<odds>(buffers.softmax, first / tile_tokens, count, buffers.shares, buffers.odds);
    for (index_t n = 0; n < count; ++n) {
      auto f = task.features(first + n);
      if (after) {
        f.attention = task.reduce(buffers.shares + n * lanes, buffers.weights, lanes);
        if constexpr (odds) {
          f.odds = f.attention /
                   std::max(smoothed_rest(task, first + n, buffers.shares + n * lanes, buffers), least_rest);
        }
        row[first + n] = finite_score(task.request.score(f));
        continue;
      }
      row[first + n] = score_of_lanes(task, f, buffers.shares + n * lanes, buffers.odds + n * lanes, nullptr, nullptr,
                                      buffers, lanes);
    }
  }
}

/// Keeps what the second half needs of the softmax: queries, largest logits, rests and tops. Order `before`.
template <class Request>
void keep_softmax(const head_task<Request>& task, const window_softmax& softmax, head_states& states) noexcept {
  const index_t at = task.state() * states.lanes;
  const index_t head_dim = task.request.shape.head_dim;
  std::copy_n(softmax.queries(), head_dim * states.lanes, states.queries + task.state() * head_dim * states.lanes);
  std::copy_n(softmax.largest(), states.lanes, states.largest + at);
  std::copy_n(softmax.rest(), states.lanes, states.rest + at);
  std::copy_n(softmax.scale(), states.lanes, states.scale + at);
  std::copy_n(softmax.top(), states.lanes, states.top + at);
}

/// Order `before`: others[lane] = sum over n != top of a_n v_n, over all tokens the lane sees.
template <class Request, element T>
void outputs_per_query(const head_task<Request>& task, const layer_view<T>& layer, tile_buffers& buffers,
                       head_states& states) noexcept {
  const index_t lanes = states.lanes;
  float* const others = states.others + task.state() * lanes * states.width;
  std::fill(others, others + lanes * states.width, 0.0f);
  for (index_t first = 0; first < task.span.length; first += tile_tokens) {
    const index_t count = std::min(tile_tokens, task.span.length - first);
    tile_shares<false>(buffers.softmax, first / tile_tokens, count, buffers.shares, nullptr);
    for (index_t lane = 0; lane < task.window; ++lane) {
      const index_t n = buffers.softmax.top()[lane] - first;
      if (n >= 0 && n < count) buffers.shares[n * lanes + lane] = 0.0f;
    }
    const float_rows values = load_tokens(layer.value, task.batch, task.kv_head(), task.span.begin + first, count,
                                          states.width, buffers.values);
    multiply<true>({buffers.shares, 1, lanes}, lanes, values.data, values.stride, states.width, count, others,
                   states.width);
  }
}

/// Order `after`: the smoothed attention row over the past, and its top token with 1 - a.
template <class Request>
void smoothed_row(const head_task<Request>& task, tile_buffers& buffers, head_states& states) noexcept {
  const index_t lanes = states.lanes;
  const index_t begin = task.state() * states.tokens;
  float* const row = states.row + begin;
  std::fill(buffers.scores, buffers.scores + lanes, 0.0f);
  for (index_t first = 0; first < task.past; first += tile_tokens) {
    const index_t count = std::min(tile_tokens, task.past - first);
    tile_shares<false>(buffers.softmax, first / tile_tokens, count, buffers.shares, nullptr);
    for (index_t n = 0; n < count; ++n) {
      const float* const shares = buffers.shares + n * lanes;
      row[first + n] = task.reduce(shares, buffers.weights, lanes);
      if constexpr (!needs_of<Request>::linear) {
        states.row_rest[begin + first + n] = smoothed_rest(task, first + n, shares, buffers);
      }
    }
  }
  index_t top = 0;
  for (index_t n = 1; n < task.past; ++n) top = row[n] > row[top] ? n : top;
  float rest = 1.0f;
  if (task.past > 0) {
    shares_of<false>(buffers.softmax.logits(top / tile_tokens) + (top % tile_tokens) * lanes,
                     buffers.softmax.largest(), buffers.softmax.scale(), lanes, 1, buffers.shares, nullptr);
    rest = smoothed_rest(task, top, buffers.shares, buffers);
  }
  states.top[task.state()] = top;
  states.rest[task.state()] = rest;
}

/// 1 - a of a token of the smoothed attention; `whole` is the task's. Only the top token of a linear smoother's row can
/// hold so much that the subtraction loses digits.
template <class Request>
[[nodiscard]] float rest_of(const head_task<Request>& task, index_t token, float whole,
                            const head_states& states) noexcept {
  const index_t cell = task.state();
  const index_t at = cell * states.tokens + token;
  float rest = token == states.top[cell] ? states.rest[cell] : whole - states.row[at];
  if constexpr (!needs_of<Request>::linear) rest = states.row_rest[at];
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
