// SPDX-License-Identifier: Apache-2.0
/// @file
/// Order `after`: the attention of the window's queries, smoothed to one row a query head.
#pragma once

#include <restkv/kernel/output_split.hpp>
#include <restkv/kernel/temporal_columns.hpp>

namespace restkv::kernel {

/// One query head's smoothed attention over one tile of the past, and the largest of it. 1 - a of the smoothed
/// attention a = S(a_i) comes from the queries' own rests r_i: 1 - S(1 - r) = -S(-r) for every smoother S that does not
/// mind a constant. Blocks: [batch, query_heads, tiles].
template <class Temporal, cached T>
struct attention_rows {
  static constexpr int threads = 128;
  static constexpr int lanes = 32;
  using tile = logit_tile<T, lanes, threads>;
  using columns = temporal_columns<Temporal, threads>;
  struct shared {
    typename tile::operands operands;
    alignas(32) float logits[lanes * tile::stride];
    typename columns::shared shares;
    typename columns::shared rests;
    lane_softmax softmax[lanes];
    float row[token_tile];
    float rest[token_tile];
  };

  attention_problem<T> problem;
  Temporal temporal;
  bool linear;
  const float* weights;         ///< [window], where linear
  const lane_softmax* softmax;  ///< [batch * kv_heads * lanes]
  float* rows;                  ///< [batch * query_heads, row_stride]
  float* row_rest;              ///< likewise, 1 - row; null where linear
  row_top* tops;                ///< [batch * query_heads, tiles]
  index_t row_stride;
  index_t tiles;

  [[nodiscard]] index_t blocks() const noexcept { return problem.batch * problem.query_heads * tiles; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const head_block<T> at(problem, block, tiles);
    const index_t first = at.part * token_tile;
    const index_t past = at.past;
    if (first >= past) return;
    const index_t count = past - first < token_tile ? past - first : token_tile;
    const index_t at_once = columns::tokens_at_once(linear, problem.queries);
    for (index_t from = 0; from < count; from += at_once) {
      const index_t to = from + at_once < count ? from + at_once : count;
      columns::begin(group, memory.shares);
      columns::begin(group, memory.rests);
      for (index_t lane = 0; lane < problem.queries; lane += lanes) {
        const index_t here = problem.queries - lane < lanes ? problem.queries - lane : lanes;
        group.for_each(here, [&](index_t i) {
          group.write(memory.softmax[i], softmax[problem.first_lane(at.b, at.kv_head) + at.head_lane + lane + i]);
        });
        tile::compute(group, memory.operands, memory.logits, problem, at.span,
                      {at.b, at.kv_head, at.head_lane + lane, here, first});
        group.for_each(2 * token_tile, [&](index_t item) {
          const index_t t = item % token_tile;
          if (t < from || t >= to) return;
          const auto share_of = [&](index_t i) {
            return group.read(memory.softmax[i]).share(group.read(memory.logits[i * tile::stride + t]));
          };
          if (item < token_tile) {
            columns::add(group, memory.shares, linear, weights, problem.queries, t, from, lane, here, share_of);
          } else {
            columns::add(group, memory.rests, linear, weights, problem.queries, t, from, lane, here, [&](index_t i) {
              const lane_softmax state = group.read(memory.softmax[i]);
              return state.top == first + t ? -state.rest / (1.0f + state.rest) : share_of(i) - 1.0f;
            });
          }
        });
        group.sync();
      }
      group.for_each(2 * token_tile, [&](index_t item) {
        const index_t t = item % token_tile;
        if (t < from || t >= to) return;
        if (item < token_tile) {
          group.write(memory.row[t], columns::finish(group, memory.shares, temporal, linear, problem.queries, t, from));
        } else {
          group.write(memory.rest[t],
                      -columns::finish(group, memory.rests, temporal, linear, problem.queries, t, from));
        }
      });
      group.sync();
    }
    group.for_each(count, [&](index_t t) {
      group.write(rows[at.row * row_stride + first + t], group.read(memory.row[t]));
      if (row_rest != nullptr) group.write(row_rest[at.row * row_stride + first + t], group.read(memory.rest[t]));
    });
    group.for_each(1, [&](index_t) {
      index_t top = 0;
      for (index_t t = 1; t < count; ++t) top = group.read(memory.row[t]) > group.read(memory.row[top]) ? t : top;
      group.write(tops[block], row_top{group.read(memory.row[top]), group.read(memory.rest[top]),
                                       static_cast<position_t>(first + top)});
    });
  }
};

/// The largest of each row. Blocks: of 128 rows.
template <cached T>
struct row_top_combine {
  static constexpr int threads = 128;
  struct shared {};

  attention_problem<T> problem;
  const row_top* parts;  ///< [batch * query_heads, tiles]
  row_top* tops;         ///< [batch * query_heads]
  index_t tiles;

  [[nodiscard]] index_t rows() const noexcept { return problem.batch * problem.query_heads; }
  [[nodiscard]] index_t blocks() const noexcept { return (rows() + threads - 1) / threads; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    group.for_each_thread([&](int t) {
      const index_t row = block * threads + t;
      if (row >= problem.batch * problem.query_heads) return;
      const head_span span = problem.span(row / problem.query_heads, row % problem.query_heads / problem.group());
      row_top best;
      for (index_t i = 0; i * token_tile < problem.past_of(span); ++i) {
        const row_top part = parts[row * tiles + i];
        if (i == 0 || part.share > best.share) best = part;
      }
      group.write(tops[row], best);
    });
  }
};

}  // namespace restkv::kernel
