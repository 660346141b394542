// SPDX-License-Identifier: Apache-2.0
/// @file
/// Scores that need of a query nothing but its attention: queries slab by slab, with one running score a token.
///
/// Windows may be as long as the prompt; nothing of the size window * tokens is stored.
#pragma once

#include <restkv/backend/thrust/softmax.cuh>

namespace restkv::on_thrust {

/// weights[kv][lane] of a linear smoother over a whole window. For each (kv, lane).
template <class Temporal>
struct fill_weights {
  Temporal temporal;
  const head_span* spans;
  double* weights;  ///< [batch * kv_heads, lanes]
  index_t lanes;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const auto window = static_cast<int>(spans[item / lanes].window);
    const auto lane = static_cast<int>(item % lanes);
    double weight = 0;
    if constexpr (linear_temporal_smoother<Temporal>) {
      if (lane < window) weight = temporal.weight(lane, window);
    }
    weights[item] = weight;
  }
};

/// The facts of a token that need no tensor.
template <class Problem>
[[nodiscard]] RESTKV_HD token_features<float> place_of(const Problem& p, index_t head, index_t n,
                                                       index_t layer) noexcept {
  token_features<float> f;
  f.position = n;
  f.length = p.span_of(head).length;
  f.batch = head / p.query_heads;
  f.head = head % p.query_heads;
  f.layer = layer;
  return f;
}

/// Folds the scores of one token under the queries of a slab into its running score. For each (head of the slab,
/// token).
template <class Problem, class Score, class Temporal>
struct fold_queries {
  Problem p;
  Score score;
  Temporal temporal;
  lane_slab slab;
  const float* logits;       ///< [rows, tokens]
  const lane_state* states;  ///< [rows]
  const double* weights;     ///< [batch * kv_heads, lanes], of whole windows
  double* running;           ///< [heads, tokens]
  index_t layer;
  bool linear;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t head = slab.first_head + item / p.tokens;
    const index_t n = item % p.tokens;
    const head_span& span = p.span_of(head);
    if (n >= span.past) return;
    double& sum = running[head * p.tokens + n];
    if (slab.first_lane == 0) sum = 0;
    // Queries of the window before the token do not see it.
    const index_t unseen = n - (span.length - span.window) > 0 ? n - (span.length - span.window) : 0;
    const index_t first = unseen > slab.first_lane ? unseen : slab.first_lane;
    const index_t last = slab.first_lane + slab.lanes < span.window ? slab.first_lane + slab.lanes : span.window;
    token_features<float> f = place_of(p, head, n, layer);
    for (index_t lane = first; lane < last; ++lane) {
      const index_t row = item / p.tokens * slab.lanes + lane - slab.first_lane;
      const float logit = logits[row * p.tokens + n];
      const lane_state& state = states[row];
      const double share = state.share(logit, n);
      f.attention = static_cast<float>(share);
      if constexpr (has(Score::needs, feature::odds)) f.odds = static_cast<float>(state.odds(share, n));
      if constexpr (has(Score::needs, feature::logit)) f.logit = logit;
      fold(sum, finite_score(score(f)), lane, unseen, span.window, p.kv_of(head));
    }
  }

 private:
  RESTKV_HD void fold(double& sum, float value, index_t lane, index_t unseen, index_t window,
                      index_t kv) const noexcept {
    if constexpr (linear_temporal_smoother<Temporal>) {
      if (linear) {
        const double weight = unseen == 0
                                  ? weights[kv * p.lanes + lane]
                                  : temporal.weight(static_cast<int>(lane - unseen), static_cast<int>(window - unseen));
        if (weight != 0) sum += weight * static_cast<double>(value);
        return;
      }
    }
    if constexpr (requires { temporal.fold(value, value, true); }) {
      sum = static_cast<double>(temporal.fold(static_cast<float>(sum), value, lane == unseen));
    }
  }
};

/// Bytes of a slab's row.
[[nodiscard]] constexpr index_t bytes_of_streamed_row(index_t tokens) noexcept {
  return lane_memory::bytes_of_row(tokens) + static_cast<index_t>(sizeof(lane_state));
}

/// running[head][n] for all tokens with a score, `rows` queries at a time.
template <class System, class Problem, class Request>
void stream_queries(const instance<System>& system, const Problem& p, const Request& request,
                    const workspace& slab_space, index_t rows, const double* weights, double* running) {
  using score = std::remove_cvref_t<decltype(request.score)>;
  using temporal = std::remove_cvref_t<decltype(request.temporal)>;
  for_slabs(p.heads(), p.lanes, rows, [&](const lane_slab& slab) {
    workspace space = slab_space;
    const lane_memory memory(slab.rows(), p.tokens, space);
    auto* const states = space.take<lane_state>(slab.rows());
    observe(system, p, slab, memory, states, slab.lanes);
    loop(system.policy(), slab.heads * p.tokens,
         fold_queries<Problem, score, temporal>{p, request.score, request.temporal, slab, memory.logits, states,
                                                weights, running, request.shape.layer, is_linear(request.temporal)});
  });
}

}  // namespace restkv::on_thrust
