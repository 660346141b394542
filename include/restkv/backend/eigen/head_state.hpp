// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a request needs, what is kept per query head while it is served, and the memory of a thread.
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
  using score = std::remove_cvref_t<decltype(Request::score)>;
  using temporal = std::remove_cvref_t<decltype(Request::temporal)>;
  static constexpr bool whole_heads = head_score<score>;
  static constexpr feature set = features_of<score>();
  static constexpr bool window = has(set, window_features);
  static constexpr bool output = has(set, output_features);
  static constexpr bool values = has(set, value_features);
  /// Scores from attention alone: ready when the attention is, nothing else is read.
  static constexpr bool local = needs_attention_alone<score>();
  /// Local scores of attention that is averaged over neighbours within each query first.
  static constexpr bool pools = local && pools_attention<score>();
  /// True where the temporal smoother may be a weighted sum; whether it is, `is_linear` says.
  static constexpr bool linear = linear_temporal_smoother<temporal>;
  /// Scores that can be bounded without the distances: see `bound_heads`.
  static constexpr bool boundable = bounded_by_distance<Request>();
};

/// Hidden channels that W_O is applied to at a time.
inline constexpr index_t projection_block = 64;

/// Queries that are observed together where the window is streamed. See `stream_window`.
inline constexpr index_t streamed_queries = 32;

/// True where the window's queries are taken block by block: it may be as long as the prompt.
template <class Request>
[[nodiscard]] constexpr bool streams(const Request& request) noexcept {
  if constexpr (needs_of<Request>::local) {
    return scores_window<typename needs_of<Request>::score>() || request.window > most_window;
  }
  return false;
}

/// Queries of a head that are observed together.
template <class Request>
[[nodiscard]] constexpr index_t queries_at_once(const Request& request) noexcept {
  return std::min({request.window, request.shape.tokens, streams(request) ? streamed_queries : request.window});
}

/// Everything kept per query head between the two halves. Lanes are the window's queries, padded to whole vectors;
/// channels are padded likewise (`width`).
struct head_states {
  index_t lanes = 0;
  index_t width = 0;
  index_t tokens = 0;
  float* queries = nullptr;   ///< scaled, [head][head_dim][lanes]
  float* largest = nullptr;   ///< see window_softmax::largest, [head][lanes]
  float* rest = nullptr;      ///< sum of the others' exponentials, [head][lanes]
  float* scale = nullptr;     ///< see window_softmax::scale, [head][lanes]; order `before`
  index_t* top = nullptr;     ///< token of the largest logit, [head][lanes]
  float* others = nullptr;    ///< sum over n != top of a_n v_n, [head][lanes][width]; order `after`: [head][1][width]
  float* image = nullptr;     ///< M o, transposed for the product with M v: [head][width][lanes]; `after`: [head][width]
  float* image_norm = nullptr;  ///< ||M o||^2, [head][lanes]; `after`: [head][1]
  float* norm = nullptr;        ///< ||M o||, as image_norm
  float* centre = nullptr;      ///< mean of o over the window, [head][width]; only where scores are bounded
  float* radius = nullptr;      ///< not below ||M (o - centre)||, as image_norm; only where scores are bounded
  float* row = nullptr;       ///< smoothed attention, order `after`: [head][tokens]
  float* row_rest = nullptr;  ///< 1 - row without cancellation, where the smoother is not linear: [head][tokens]
  float* mean_image = nullptr;  ///< M applied to the mean of the sequence's values: [head][width]

  /// Rows of outputs a head has: one per query, or a single one for the smoothed attention.
  index_t outputs = 0;

  template <class Request>
  head_states(const Request& request, workspace& space) noexcept
      : lanes(padded_lanes(queries_at_once(request))),
        width(padded_lanes(request.shape.head_dim)),
        tokens(request.shape.tokens) {
    using needs = needs_of<Request>;
    const index_t heads = request.shape.batch * request.shape.query_heads;
    if constexpr (has(needs::set, feature::mean_distance)) mean_image = space.take<float>(heads, width);
    if constexpr (needs::window && !needs::local) {
      const bool after = order_of(request.score) == query_order::after;
      outputs = after ? 1 : lanes;
      queries = space.take<float>(after ? 0 : heads * request.shape.head_dim * lanes);
      largest = space.take<float>(heads, outputs);
      rest = space.take<float>(heads, outputs);
      scale = space.take<float>(after ? 0 : heads * lanes);
      top = space.take<index_t>(heads, outputs);
      if constexpr (needs::output) {
        others = space.take<float>(heads, outputs, width);
        image = space.take<float>(heads, outputs, width);
        image_norm = space.take<float>(heads, outputs);
        norm = space.take<float>(heads, outputs);
      }
      if constexpr (needs::boundable) {
        centre = space.take<float>(heads, width);
        radius = space.take<float>(heads, outputs);
      }
      row = space.take<float>(after ? heads * tokens : 0);
      row_rest = space.take<float>(after && !is_linear(request.temporal) ? heads * tokens : 0);
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
      copy = space.take<float>(request.shape.query_heads, width, width);
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
  float* shares = nullptr;    ///< [tile_tokens, lanes]
  float* odds = nullptr;      ///< [tile_tokens, lanes]
  float* cross = nullptr;     ///< [tile_tokens, lanes]
  float* values = nullptr;    ///< staging, [tile_tokens, width]
  float* keys = nullptr;      ///< staging, [tile_tokens, head_dim]
  float* images = nullptr;    ///< M v, [tile_tokens, width]
  float* vector = nullptr;    ///< [2, width]
  float* weights = nullptr;   ///< temporal weights, [lanes]
  float* scores = nullptr;    ///< [lanes]
  float* folded = nullptr;    ///< [tile_tokens]
  float* logits = nullptr;    ///< [tile_tokens, lanes], where a score asks for them
  float* products = nullptr;  ///< <M o, M v>, [tile_tokens, lanes], likewise
  float* projection = nullptr;       ///< a block of W[h], transposed, [head_dim, projection_block]
  float* projected = nullptr;        ///< its product with the tile's values, [tile_tokens, projection_block]
  float* projected_norm = nullptr;   ///< ||W[h] v||_1, [tile_tokens]
  float* ring = nullptr;      ///< the latest tokens' shares, [attention_pool, lanes], and sums: see `score_pooled`
  float* streamed = nullptr;  ///< running scores of a KV head's query heads, [group, tokens]; see `stream_window`
  float* scratch = nullptr;   ///< of a head score
  float* head_row = nullptr;  ///< one query head's row of a head score, [tokens]
  index_t* tokens = nullptr;  ///< [tile_tokens]

  template <class Request>
  tile_buffers(const Request& request, const head_states& states, index_t kept_logits, workspace& space) noexcept {
    using needs = needs_of<Request>;
    const index_t cells = tile_tokens * states.lanes;
    if constexpr (needs::window) {
      softmax = window_softmax(request.shape.tokens,
                               most_heads_of_block(request.shape.group(), states.lanes) * states.lanes,
                               request.shape.head_dim, kept_logits, space);
      shares = space.take<float>(cells);
      odds = space.take<float>(cells);
      cross = space.take<float>(cells);
      weights = space.take<float>(states.lanes);
      if constexpr (has(needs::set, feature::logit)) logits = space.take<float>(cells);
      if constexpr (has(needs::set, feature::alignment)) products = space.take<float>(cells);
      if constexpr (needs::pools) ring = space.take<float>(2, attention_pool_of(request.score), states.lanes);
      if (streams(request)) streamed = space.take<float>(request.shape.group(), request.shape.tokens);
    }
    if constexpr (has(needs::set, feature::projected_norm_l1)) {
      projection = space.take<float>(request.shape.head_dim, projection_block);
      projected = space.take<float>(tile_tokens, projection_block);
      projected_norm = space.take<float>(tile_tokens);
    }
    if constexpr (needs::whole_heads) {
      scratch = space.take<float>(scratch_size_of(request.score, request.shape));
      head_row = space.take<float>(scores_query_heads<typename needs::score>() ? request.shape.tokens : 0);
    }
    values = space.take<float>(tile_tokens, states.width);
    keys = space.take<float>(tile_tokens, request.shape.head_dim);
    images = space.take<float>(tile_tokens, states.width);
    vector = space.take<float>(2, states.width);
    scores = space.take<float>(std::max({states.lanes, request.shape.group(), index_t{1}}));
    folded = space.take<float>(tile_tokens);
    tokens = space.take<index_t>(tile_tokens);
  }
};

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
    f.head = request.shape.first_query_head() + head;
    f.layer = request.shape.layer;
    return f;
  }

  /// The temporal reduction of one token's values under the window's queries, zero in the padded lanes.
  [[nodiscard]] float reduce(const float* values, const float* weights, index_t lanes) const noexcept {
    if (is_linear(request.temporal)) return dot(values, weights, lanes);
    return request.temporal(std::span<const float>(values, static_cast<std::size_t>(window)));
  }

  /// What a constant 1 is reduced to: 1, but for a linear smoother whose weights add up to something else.
  [[nodiscard]] float whole() const noexcept {
    if (!is_linear(request.temporal)) return 1.0f;
    double sum = 0;
    if constexpr (needs_of<Request>::linear) {
      for (int i = 0; i < static_cast<int>(window); ++i) sum += request.temporal.weight(i, static_cast<int>(window));
    }
    return static_cast<float>(sum);
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

}  // namespace restkv::eigen
