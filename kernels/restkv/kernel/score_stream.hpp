// SPDX-License-Identifier: Apache-2.0
/// @file
/// Scores of attention alone that the tile-wise kernels do not serve: windows of any length, queries a few at a time,
/// and attention that is averaged over neighbouring tokens.
#pragma once

#include <restkv/kernel/score_token_facts.hpp>

namespace restkv::kernel {

/// Queries of a head that are observed together where the window is streamed.
inline constexpr index_t streamed_queries = 64;

/// True where the window's queries are taken block by block: it may be as long as the prompt.
template <class Request>
[[nodiscard]] constexpr bool streams(const Request& request) noexcept {
  using score = typename needs_of<Request>::score;
  if constexpr (needs_attention_alone<score>()) return scores_window<score>() || request.window > most_window;
  return false;
}

/// True where attention is averaged over neighbouring tokens.
template <class Request>
[[nodiscard]] constexpr bool pools(const Request& request) noexcept {
  using score = typename needs_of<Request>::score;
  if constexpr (needs_attention_alone<score>()) return attention_pool_of(request.score) > 1;
  return false;
}

/// Queries of a head that are observed together.
template <class Request>
[[nodiscard]] constexpr index_t queries_at_once(const Request& request) noexcept {
  const index_t window = std::min(request.window, request.shape.tokens);
  return streams(request) ? std::min(window, streamed_queries) : window;
}

/// True where a request's temporal smoother can take queries one by one inside a kernel.
template <class Request>
[[nodiscard]] constexpr bool streamable() noexcept {
  return needs_attention_alone<typename needs_of<Request>::score>() &&
         streaming_temporal_smoother<typename needs_of<Request>::temporal>;
}

/// One query head's scores of a tile of tokens under the lanes of a problem, folded into running scores: a block of
/// queries of a window that may be as long as the prompt. Token n is scored by the queries that see it. Blocks: [batch,
/// query_heads, tiles].
template <class Request, cached T>
struct score_stream {
  using needs = needs_of<Request>;
  static constexpr int threads = 128;
  static constexpr int lanes = 32;
  using tile = logit_tile<T, lanes, threads>;
  struct shared {
    typename tile::operands operands;
    alignas(32) float logits[lanes * tile::stride];
    lane_softmax softmax[lanes];
  };

  score_inputs<Request, T> in;
  const lane_softmax* softmax;
  float* running;  ///< [batch * query_heads, row_stride]
  index_t row_stride;

  [[nodiscard]] index_t blocks() const noexcept { return in.problem.batch * in.problem.query_heads * in.row_tiles; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const attention_problem<T>& problem = in.problem;
    const head_block<T> at(problem, block, in.row_tiles);
    const index_t first = at.part * token_tile;
    const head_span& span = at.span;
    const index_t window = problem.window_of(span);
    const index_t before = span.length - window;  // tokens that every query of the window sees
    const index_t queries =
        window - problem.first_query < problem.queries ? window - problem.first_query : problem.queries;
    // The newest of the queries sees before + first_query + queries tokens.
    if (first >= at.past || queries <= 0 || first >= before + problem.first_query + queries) return;
    for (index_t lane = 0; lane < queries; lane += lanes) {
      const index_t here = queries - lane < lanes ? queries - lane : lanes;
      group.for_each(here, [&](index_t i) {
        group.write(memory.softmax[i], softmax[problem.first_lane(at.b, at.kv_head) + at.head_lane + lane + i]);
      });
      tile::compute(group, memory.operands, memory.logits, problem, span,
                    {at.b, at.kv_head, at.head_lane + lane, here, first});
      group.for_each(token_tile, [&](index_t t) {
        const index_t n = first + t;
        if (n >= at.past) return;
        const index_t unseen = n > before ? n - before : 0;  // queries of the window before the token
        float& cell = running[at.row * row_stride + n];
        float score = problem.first_query + lane <= unseen ? 0.0f : group.read(cell);
        double sum = 0;
        for (index_t i = 0; i < here; ++i) {
          const index_t query = problem.first_query + lane + i;
          if (query < unseen) continue;
          const lane_softmax state = group.read(memory.softmax[i]);
          token_features<float> f = problem.features(span, at.b, at.head, n);
          f.logit = group.read(memory.logits[i * tile::stride + t]);
          f.attention = state.share(f.logit);
          f.odds = state.top == n ? 1.0f / state.bounded_rest() : f.attention / (1.0f - f.attention);
          const float value = finite_score(in.score(f));
          if (in.linear) {
            if constexpr (linear_temporal_smoother<typename needs::temporal>) {
              const double weight =
                  in.temporal.weight(static_cast<int>(query - unseen), static_cast<int>(window - unseen));
              if (weight != 0.0) sum += weight * static_cast<double>(value);
            }
          } else if constexpr (requires { in.temporal.fold(value, value, true); }) {
            score = in.temporal.fold(score, value, query == unseen);
          }
        }
        if (in.linear) score += static_cast<float>(sum);
        group.write(cell, score);
      });
      group.sync();
    }
  }
};

/// From scores of query heads to rows. Blocks: [batch, rows, tiles].
template <cached T>
struct fold_heads {
  static constexpr int threads = 64;
  struct shared {};

  attention_problem<T> problem;
  const float* scores;  ///< [batch * query_heads, row_stride]
  score_rows out;
  group_reduce reduction;
  index_t heads_of_row;
  index_t row_stride;
  index_t row_tiles;

  [[nodiscard]] index_t blocks() const noexcept {
    return problem.batch * (problem.query_heads / heads_of_row) * row_tiles;
  }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    const index_t row_index = block / row_tiles;  // [batch, rows]
    const index_t rows = problem.query_heads / heads_of_row;
    const index_t first_head = row_index * heads_of_row;  // [batch, query_heads]
    const index_t b = row_index / rows;
    const head_span span = problem.span(b, first_head % problem.query_heads / problem.group());
    group.for_each(token_tile, [&](index_t t) {
      const index_t n = block % row_tiles * token_tile + t;
      if (n >= problem.past_of(span)) return;
      float folded = 0;
      for (index_t j = 0; j < heads_of_row; ++j) {
        folded = group_fold(reduction, folded, scores[(first_head + j) * row_stride + n], j == 0);
      }
      group.write(out.data[b * out.strides[0] + row_index % rows * out.strides[1] + n * out.strides[2]],
                  finite_score(group_finish(reduction, folded, heads_of_row)));
    });
  }
};

}  // namespace restkv::kernel
