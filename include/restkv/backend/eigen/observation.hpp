// SPDX-License-Identifier: Apache-2.0
/// @file
/// First half of scoring: what has to be known about every query head before any token can be scored.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/backend/eigen/packet.hpp>
#include <restkv/backend/eigen/token_tile.hpp>
#include <restkv/backend/eigen/window_softmax.hpp>

#include <cmath>
#include <limits>

namespace restkv::eigen {

/// What a request's features ask of the backend.
template <class Request>
struct needs_of {
  static constexpr feature set = std::remove_cvref_t<decltype(Request::score)>::needs;
  static constexpr bool window = has(set, window_features);
  static constexpr bool output = has(set, feature::distance | feature::output_norm);
  static constexpr bool values = output || has(set, feature::value_norm);
  /// Scores from attention alone: ready when the attention is, nothing else is read.
  static constexpr bool local = window && !values && !has(set, feature::key_norm);
  static constexpr bool linear = linear_temporal_smoother<std::remove_cvref_t<decltype(Request::temporal)>>;
};

/// Everything kept per query head between the two halves. Lanes are the window's queries, padded to whole vectors;
/// channels are padded likewise (`width`).
struct head_states {
  index_t lanes = 0;
  index_t width = 0;
  index_t tokens = 0;
  float* queries = nullptr;   ///< scaled, [head][head_dim][lanes]
  float* largest = nullptr;   ///< largest logit, [head][lanes]
  float* rest = nullptr;      ///< sum of the others' exponentials, [head][lanes]
  index_t* top = nullptr;     ///< token of the largest logit, [head][lanes]
  float* others = nullptr;    ///< sum over n != top of a_n v_n, [head][lanes][width]; order `after`: [head][1][width]
  float* image = nullptr;     ///< M o, transposed for the product with M v: [head][width][lanes]; `after`: [head][width]
  float* image_norm = nullptr;  ///< ||M o||^2, [head][lanes]; `after`: [head][1]
  float* row = nullptr;       ///< smoothed attention, order `after`: [head][tokens]

  /// Rows of outputs a head has: one per query, or a single one for the smoothed attention.
  index_t outputs = 0;

  template <class Request>
  head_states(const Request& request, workspace& space) noexcept
      : lanes(padded_lanes(std::min(request.window, request.shape.tokens))),
        width(padded_lanes(request.shape.head_dim)),
        tokens(request.shape.tokens) {
    using needs = needs_of<Request>;
    if constexpr (needs::window && !needs::local) {
      const bool after = order_of(request.score) == query_order::after;
      const index_t heads = request.shape.batch * request.shape.query_heads;
      outputs = after ? 1 : lanes;
      queries = space.take<float>(after ? 0 : heads * request.shape.head_dim * lanes);
      largest = space.take<float>(heads * outputs);
      rest = space.take<float>(heads * outputs);
      top = space.take<index_t>(heads * outputs);
      if constexpr (needs::output) {
        others = space.take<float>(heads * outputs * width);
        image = space.take<float>(heads * outputs * width);
        image_norm = space.take<float>(heads * outputs);
      }
      row = space.take<float>(after ? heads * tokens : 0);
    }
  }
};

/// The lower triangular factors of a request's metric, ready for `multiply`: element (c, r) of head h at
/// data + h * width * width + c * width + r, zero beyond head_dim. Null for the identity.
struct metric_factors {
  const float* data = nullptr;
  float* copy = nullptr;  // only where the caller's view is not already laid out so
  index_t width = 0;

  template <class Request>
  metric_factors(const Request& request, workspace& space) noexcept : width(padded_lanes(request.shape.head_dim)) {
    if (needs_metric(request.score) && width != request.shape.head_dim) {
      copy = space.take<float>(request.shape.query_heads * width * width);
    }
  }

  template <class Request>
  [[nodiscard]] status prepare(const Request& request, const output_metric_view& metric) noexcept {
    if (!needs_metric(request.score)) return {};
    if (copy == nullptr) {
      if (!metric.factor.dense() || metric.factor.extent(0) != request.shape.query_heads) {
        return status::error(errc::shape_mismatch, "metric.factor must be dense [%lld, %lld, %lld]",
                             static_cast<long long>(request.shape.query_heads), static_cast<long long>(width),
                             static_cast<long long>(width));
      }
      data = metric.factor.data;
      return {};
    }
    for (index_t h = 0; h < request.shape.query_heads; ++h) {
      for (index_t c = 0; c < width; ++c) {
        for (index_t r = 0; r < width; ++r) {
          const bool inside = c < request.shape.head_dim && r < request.shape.head_dim;
          copy[(h * width + c) * width + r] = inside ? metric.factor(h, c, r) : 0.0f;
        }
      }
    }
    data = copy;
    return {};
  }

  /// out[m] = L[h]^T x[m] for `rows` vectors. L is lower triangular, so lane r only needs channels c >= r.
  void apply(index_t head, const float_rows& x, index_t rows, float* out) const noexcept {
    const float* const factor = data + head * width * width;
    constexpr index_t step = tile_vectors * packet_size;
    for (index_t r = 0; r < width; r += step) {
      const index_t lanes = std::min(step, width - r);
      multiply({x.data + r, x.stride, 1}, rows, factor + r * width + r, width, lanes, width - r, out + r, width);
    }
  }
};

/// Per-thread memory of both halves.
struct tile_buffers {
  window_softmax softmax;
  float* shares = nullptr;   ///< [tile_tokens, lanes]
  float* odds = nullptr;     ///< [tile_tokens, lanes]
  float* cross = nullptr;    ///< [tile_tokens, lanes]
  float* values = nullptr;   ///< staging, [tile_tokens, width]
  float* keys = nullptr;     ///< staging, [tile_tokens, head_dim]
  float* images = nullptr;   ///< M v, [tile_tokens, width]
  float* vector = nullptr;   ///< [2, width]
  float* weights = nullptr;  ///< temporal weights, [lanes]
  float* scores = nullptr;   ///< [lanes]
  float* folded = nullptr;   ///< [tile_tokens]
  float* row = nullptr;      ///< one head's scores, [tokens]; only where scores are local and heads are reduced
  index_t* tokens = nullptr;  ///< [tile_tokens]

  template <class Request>
  tile_buffers(const Request& request, const head_states& states, workspace& space) noexcept {
    using needs = needs_of<Request>;
    const index_t cells = tile_tokens * states.lanes;
    if constexpr (needs::window) {
      softmax = window_softmax(request.shape.tokens, states.lanes, request.shape.head_dim, space);
      shares = space.take<float>(cells);
      odds = space.take<float>(cells);
      cross = space.take<float>(cells);
      weights = space.take<float>(states.lanes);
    }
    values = space.take<float>(tile_tokens * states.width);
    keys = space.take<float>(tile_tokens * request.shape.head_dim);
    images = space.take<float>(tile_tokens * states.width);
    vector = space.take<float>(2 * states.width);
    scores = space.take<float>(std::max({states.lanes, request.shape.group(), index_t{1}}));
    folded = space.take<float>(tile_tokens);
    tokens = space.take<index_t>(tile_tokens);
    if (needs::local && request.group != group_reduce::none) row = space.take<float>(request.shape.tokens);
  }
};

/// A score clamped to finite; NaN stays NaN.
[[nodiscard]] EIGEN_ALWAYS_INLINE float finite_score(float score) noexcept {
  constexpr float most = std::numeric_limits<float>::max();
  return score > most ? most : score < -most ? -most : score;
}

/// Smallest 1 - a that enters an odds: keeps odds and odds * distance finite when the other shares underflow.
inline constexpr float least_rest = 1e-30f;

/// One query head of one sequence, and where its state lies.
template <class Request>
struct head_task {
  const Request& request;
  index_t batch;
  index_t head;  ///< query head
  sequence_span span;
  index_t window;  ///< of this sequence
  index_t past;

  head_task(const Request& r, index_t b, index_t h, const sequence_span& s) noexcept
      : request(r), batch(b), head(h), span(s), window(r.window_of(s.length)), past(r.past_of(s.length)) {}
  [[nodiscard]] index_t kv_head() const noexcept { return head / request.shape.group(); }
  [[nodiscard]] index_t state() const noexcept { return batch * request.shape.query_heads + head; }

  [[nodiscard]] token_features<float> features(index_t n) const noexcept {
    token_features<float> f;
    f.position = n;
    f.length = span.length;
    f.batch = batch;
    f.head = head;
    f.layer = request.shape.layer;
    return f;
  }

  /// The temporal reduction of one token's values under the window's queries, zero in the padded lanes.
  [[nodiscard]] float reduce(const float* values, const float* weights, index_t lanes) const noexcept {
    if constexpr (needs_of<Request>::linear) {
      return dot(values, weights, lanes);
    } else {
      return request.temporal(std::span<const float>(values, static_cast<std::size_t>(window)));
    }
  }

  void fill_weights(float* weights, index_t lanes) const noexcept {
    std::fill(weights, weights + lanes, 0.0f);
    if constexpr (needs_of<Request>::linear) {
      for (index_t i = 0; i < window; ++i) {
        weights[i] = static_cast<float>(request.temporal.weight(static_cast<int>(i), static_cast<int>(window)));
      }
    }
  }
};

/// Shares and, where asked, odds of a tile of the softmax: shares = exps * scale, odds = a / (1 - a), with the exact
/// odds of each lane's top token put in.
template <bool Odds>
void tile_shares(const window_softmax& softmax, index_t tile, index_t count, float* shares, float* odds) noexcept {
  using namespace Eigen::internal;
  const index_t lanes = softmax.block().lanes;
  const packet one = pset1<packet>(1.0f);
  for (index_t lane = 0; lane < lanes; lane += packet_size) {
    const packet scale = ploadu<packet>(softmax.scale(tile) + lane);
    const float* const exps = softmax.exps(tile) + lane;
    for (index_t n = 0; n < count; ++n) {
      const packet share = pmul(ploadu<packet>(exps + n * lanes), scale);
      pstoreu(shares + n * lanes + lane, share);
      if constexpr (Odds) pstoreu(odds + n * lanes + lane, pdiv(share, psub(one, share)));
    }
  }
  if constexpr (Odds) {
    for (index_t lane = 0; lane < softmax.block().used(); ++lane) {
      const index_t n = softmax.top()[lane] - tile * tile_tokens;
      if (n >= 0 && n < count) odds[n * lanes + lane] = 1.0f / std::max(softmax.rest()[lane], least_rest);
    }
  }
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
        f.odds = f.attention / std::max(1.0f - f.attention, least_rest);
        row[first + n] = finite_score(task.request.score(f));
        continue;
      }
      for (index_t lane = 0; lane < task.window; ++lane) {
        f.attention = buffers.shares[n * lanes + lane];
        if constexpr (odds) f.odds = buffers.odds[n * lanes + lane];
        buffers.scores[lane] = task.request.score(f);
      }
      row[first + n] = finite_score(task.reduce(buffers.scores, buffers.weights, lanes));
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

/// Order `after`: the smoothed attention row over the past, its top token kept apart, with 1 - a of that token summed
/// from the queries' own rests.
template <class Request>
void smoothed_row(const head_task<Request>& task, tile_buffers& buffers, head_states& states) noexcept {
  const index_t lanes = states.lanes;
  float* const row = states.row + task.state() * states.tokens;
  for (index_t first = 0; first < task.past; first += tile_tokens) {
    const index_t count = std::min(tile_tokens, task.past - first);
    const float* const exps = buffers.softmax.exps(first / tile_tokens);
    const float* const scale = buffers.softmax.scale(first / tile_tokens);
    if constexpr (needs_of<Request>::linear) {
      for (index_t lane = 0; lane < lanes; ++lane) buffers.scores[lane] = scale[lane] * buffers.weights[lane];
      for (index_t n = 0; n < count; ++n) row[first + n] = dot(exps + n * lanes, buffers.scores, lanes);
    } else {
      for (index_t n = 0; n < count; ++n) {
        for (index_t lane = 0; lane < lanes; ++lane) buffers.scores[lane] = exps[n * lanes + lane] * scale[lane];
        row[first + n] = task.reduce(buffers.scores, buffers.weights, lanes);
      }
    }
  }
  index_t top = 0;
  for (index_t n = 1; n < task.past; ++n) top = row[n] > row[top] ? n : top;
  double rest = task.past > 0 ? 1.0 - static_cast<double>(row[top]) : 1.0;
  if constexpr (needs_of<Request>::linear) {
    const index_t tile = top / tile_tokens;
    const float* const exps = buffers.softmax.exps(tile) + (top % tile_tokens) * lanes;
    rest = task.past > 0 ? 0.0 : 1.0;
    for (index_t lane = 0; lane < task.window && task.past > 0; ++lane) {
      const double others = buffers.softmax.rest()[lane];
      const double share = static_cast<double>(exps[lane]) * static_cast<double>(buffers.softmax.scale(tile)[lane]);
      rest += static_cast<double>(buffers.weights[lane]) *
              (buffers.softmax.top()[lane] == top ? others / (1.0 + others) : 1.0 - share);
    }
  } else {
    // A smoother that picks one of the rows (the maximum) takes that row's rest with it.
    for (index_t lane = 0; lane < task.window && task.past > 0; ++lane) {
      const index_t cell = (top % tile_tokens) * lanes + lane;
      const double others = buffers.softmax.rest()[lane];
      if (buffers.softmax.top()[lane] == top &&
          buffers.softmax.exps(top / tile_tokens)[cell] * buffers.softmax.scale(top / tile_tokens)[lane] == row[top]) {
        rest = others / (1.0 + others);
      }
    }
  }
  states.top[task.state()] = top;
  states.rest[task.state()] = static_cast<float>(rest);
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

}  // namespace restkv::eigen
