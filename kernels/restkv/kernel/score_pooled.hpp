// SPDX-License-Identifier: Apache-2.0
/// @file
/// Scores of attention that was averaged over neighbouring tokens within each query.
#pragma once

#include <restkv/kernel/score_stream.hpp>

namespace restkv::kernel {

/// What a lane's attention over the past adds up to, and what the means over `width` neighbours add up to: a token near
/// an end of the past is in fewer of them.
struct pool_sum {
  double whole = 0;
  double in_means = 0;
};

/// The sums of one split. Blocks: [batch, query_heads, splits].
template <cached T>
struct pool_sums {
  static constexpr int threads = 128;
  static constexpr int lanes = 32;
  using tile = logit_tile<T, lanes, threads>;
  struct shared {
    typename tile::operands operands;
    alignas(32) float logits[lanes * tile::stride];
  };

  attention_problem<T> problem;
  const lane_softmax* softmax;
  pool_sum* parts;  ///< [batch * kv_heads * lanes, splits]
  index_t width;

  [[nodiscard]] index_t blocks() const noexcept { return problem.batch * problem.query_heads * problem.splits; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const head_block<T> at(problem, block, problem.splits);
    const index_t begin = at.part * problem.split_tokens;
    const index_t end = begin + problem.split_tokens < at.past ? begin + problem.split_tokens : at.past;
    const index_t lane_base = problem.first_lane(at.b, at.kv_head) + at.head_lane;
    for (index_t lane = 0; lane < problem.queries; lane += lanes) {
      const index_t here = problem.queries - lane < lanes ? problem.queries - lane : lanes;
      auto sums = group.template locals<double, 2>();
      group.for_each_thread([&](int t) { sums(t)[0] = sums(t)[1] = 0.0; });
      for (index_t first = begin; first < end; first += token_tile) {
        tile::compute(group, memory.operands, memory.logits, problem, at.span,
                      {at.b, at.kv_head, at.head_lane + lane, here, first});
        group.for_each_thread([&](int t) {
          if (t >= here) return;
          const lane_softmax state = softmax[lane_base + lane + t];
          for (index_t n = first; n < first + token_tile && n < end; ++n) {
            const index_t low = n > width / 2 ? n - width / 2 : 0;
            const index_t high = n + width / 2 < at.past - 1 ? n + width / 2 : at.past - 1;
            const auto share =
                static_cast<double>(state.share(group.read(memory.logits[t * tile::stride + n - first])));
            sums(t)[0] += share;
            sums(t)[1] += share * static_cast<double>(high - low + 1);
          }
        });
        group.sync();
      }
      group.for_each_thread([&](int t) {
        if (t < here) {
          group.write(parts[(lane_base + lane + t) * problem.splits + at.part], pool_sum{sums(t)[0], sums(t)[1]});
        }
      });
    }
  }
};

/// One query head's scores of a tile of tokens: the shares of a query become the mean over `width` neighbours of the
/// past, scaled back to their sum. Each mean is a sum of its own terms, so that a large share leaves no trace in means
/// that do not contain it. Blocks: [batch, query_heads, tiles].
template <class Request, cached T>
struct score_pooled {
  using needs = needs_of<Request>;
  static constexpr int threads = 128;
  static constexpr int lanes = 32;
  static constexpr index_t most_width = 2 * token_tile + 1;
  using tile = logit_tile<T, lanes, threads>;
  using columns = temporal_columns<typename needs::temporal, threads, 1024>;
  struct shared {
    typename tile::operands operands;
    alignas(32) float shares[3][lanes * tile::stride];  ///< the tile before, the tile, the tile behind
    typename columns::shared columns_memory;
    float scale[lanes];
  };

  score_inputs<Request, T> in;
  const pool_sum* parts;  ///< [batch * kv_heads * lanes, splits]
  float* running;         ///< [batch * query_heads, row_stride]
  index_t row_stride;
  index_t width;

  [[nodiscard]] index_t blocks() const noexcept { return in.problem.batch * in.problem.query_heads * in.row_tiles; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const attention_problem<T>& problem = in.problem;
    const head_block<T> at(problem, block, in.row_tiles);
    const index_t first = at.part * token_tile;
    const index_t past = at.past;
    if (first >= past) return;
    const index_t count = past - first < token_tile ? past - first : token_tile;
    const index_t lane_base = problem.first_lane(at.b, at.kv_head) + at.head_lane;
    const index_t at_once = columns::tokens_at_once(in.linear, problem.queries);
    for (index_t from = 0; from < count; from += at_once) {
      const index_t to = from + at_once < count ? from + at_once : count;
      columns::begin(group, memory.columns_memory);
      for (index_t lane = 0; lane < problem.queries; lane += lanes) {
        const index_t here = problem.queries - lane < lanes ? problem.queries - lane : lanes;
        group.for_each(here, [&](index_t i) {
          pool_sum all;
          for (index_t s = 0; s < problem.splits && s * problem.split_tokens < past; ++s) {
            const pool_sum part = parts[(lane_base + lane + i) * problem.splits + s];
            all.whole += part.whole;
            all.in_means += part.in_means;
          }
          group.write(memory.scale[i], all.in_means > 0 ? static_cast<float>(all.whole / all.in_means) : 0.0f);
        });
        for (int part = 0; part < 3; ++part) {
          const index_t begin = first + (part - 1) * token_tile;
          if (begin < 0 || begin >= past) continue;
          tile::compute(group, memory.operands, memory.shares[part], problem, at.span,
                        {at.b, at.kv_head, at.head_lane + lane, here, begin});
          group.for_each(lanes * token_tile, [&](index_t item) {
            const index_t r = item / token_tile;
            if (r >= here) return;
            float& cell = memory.shares[part][r * tile::stride + item % token_tile];
            group.write(cell, in.softmax[lane_base + lane + r].share(group.read(cell)));
          });
        }
        group.sync();
        group.for_each(token_tile, [&](index_t t) {
          if (t < from || t >= to) return;
          const index_t n = first + t;
          const index_t low = n > width / 2 ? n - width / 2 : 0;
          const index_t high = n + width / 2 < past - 1 ? n + width / 2 : past - 1;
          token_features<float> f = problem.features(at.span, at.b, at.head, n);
          columns::add(group, memory.columns_memory, in.linear, in.weights, problem.queries, t, from, lane, here,
                       [&](index_t i) {
                         float sum = 0;
                         for (index_t m = low; m <= high; ++m) {
                           const index_t place = m - first + token_tile;
                           sum += group.read(memory.shares[place / token_tile][i * tile::stride + place % token_tile]);
                         }
                         f.attention = sum * group.read(memory.scale[i]);
                         return in.score(f);
                       });
        });
        group.sync();
      }
      group.for_each(token_tile, [&](index_t t) {
        if (t < from || t >= to) return;
        group.write(running[at.row * row_stride + first + t],
                    columns::finish(group, memory.columns_memory, in.temporal, in.linear, problem.queries, t, from));
      });
      group.sync();
    }
  }
};

}  // namespace restkv::kernel
