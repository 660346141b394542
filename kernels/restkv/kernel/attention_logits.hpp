// SPDX-License-Identifier: Apache-2.0
/// @file
/// The logits of a tile: `Lanes` window queries of one KV head against 64 tokens, on tensor cores where the type has
/// them.
#pragma once

#include <restkv/kernel/attention_problem.hpp>

namespace restkv::kernel {

/// Rows of elements in shared memory, `columns` of them used: strides that fragments can be loaded from without all
/// rows meeting in one bank.
template <element T>
struct staged {
  static constexpr int columns = 128 / static_cast<int>(sizeof(T));
  static constexpr int stride = columns + 16 / static_cast<int>(sizeof(T));
};

/// Copies `columns` channels from `first` of `rows` rows to shared memory [rows, stride]; zeros where a row is null, or
/// beyond `head_dim`. 16 bytes at a time where the rows lie so. row_of(r) is a token_row.
template <class Group, element T, class RowOf>
RESTKV_HD void stage_rows(Group& group, T* to, int rows, int columns, int stride, index_t first, index_t head_dim,
                          const RowOf& row_of) {
  constexpr int step = 16 / static_cast<int>(sizeof(T));
  const int pieces = columns / step;
  group.for_each(rows * pieces, [&](index_t item) {
    const int r = static_cast<int>(item) / pieces;
    const int c = static_cast<int>(item) % pieces * step;
    T* const target = to + r * stride + c;
    const auto row = row_of(r);
    const index_t left = row.exists() ? head_dim - first - c : 0;
    const auto source = left > 0 ? row.from(first + c) : row;
    if constexpr (requires { source.whole(); }) {
      if (left >= step && source.whole()) {
        group.copy_16_bytes(target, source.data);
        return;
      }
    }
    for (int i = 0; i < step; ++i) group.write(target[i], i < left ? source.number(i) : narrow<T>(0.0f));
  });
}

/// A tile of logits, [Lanes, token_tile]. Sums run over the channels in ascending order, 16 at a time.
template <cached T, int Lanes, int Threads>
struct logit_tile {
  using number = number_of<T>;
  static_assert(Lanes % 16 == 0 && (Lanes / 16 * 4) % (Threads / warp_size) == 0);
  static constexpr int stride = token_tile + 4;  ///< of a lane's logits

  /// Staging of queries and keys; free for other uses between two calls.
  struct operands {
    alignas(32) number queries[Lanes * staged<number>::stride];
    alignas(32) number keys[token_tile * staged<number>::stride];
    position_t seen[Lanes];  ///< tokens that a lane sees
  };

  /// What the tile is about.
  struct place {
    index_t batch;
    index_t kv_head;
    index_t first_lane;  ///< among the lanes of the KV head
    index_t lanes;       ///< at most Lanes
    tile_tokens tokens;
  };

  /// Fills logits [Lanes, stride]; masked_logit where a query does not see the token. Begins and ends with a phase of
  /// its own: logits and operands must be free, and the logits can be read at once.
  template <class Group>
  RESTKV_HD static void compute(Group& group, operands& memory, float* logits, const attention_problem<T>& problem,
                                const head_span& span, const place& at) {
    constexpr int warps = Threads / warp_size;
    constexpr int tiles = Lanes / 16 * (token_tile / 16) / warps;
    const auto queries = static_cast<int>(problem.queries);
    const auto first_lane = static_cast<int>(at.first_lane);
    group.for_each(Lanes, [&](index_t r) {
      const int i = (first_lane + static_cast<int>(r)) % queries;
      group.write(memory.seen[r], r < at.lanes ? static_cast<position_t>(problem.visible(span, i)) : 0);
    });
    auto sums = group.template accumulators<number, tiles>();
    for (index_t first = 0; first < problem.head_dim; first += staged<number>::columns) {
      stage_rows(group, memory.queries, Lanes, staged<number>::columns, staged<number>::stride, first, problem.head_dim,
                 [&](int r) -> token_row<number> {
                   const int i = (first_lane + r) % queries;
                   if (r >= at.lanes || problem.visible(span, i) == 0) return {};
                   const index_t head = at.kv_head * problem.group() + (first_lane + r) / queries;
                   return {problem.query + at.batch * problem.query_strides[0] + head * problem.query_strides[1] +
                               (span.first_row + problem.first_query + i) * problem.query_strides[2],
                           problem.query_strides[3]};
                 });
      stage_rows(group, memory.keys, token_tile, staged<number>::columns, staged<number>::stride, first,
                 problem.head_dim, [&](index_t t) -> token_row<T> {
                   const index_t n = at.tokens[t];
                   if (n >= span.length) return {};
                   return problem.key.row(at.batch, at.kv_head, span.begin + n);
                 });
      group.sync();
      group.for_each_warp([&](int w) {
        for (int k = 0; k < staged<number>::columns; k += 16) {
          unrolled<tiles>([&](auto i) {
            const int tile = w * tiles + i;
            group.template mma_transposed<number>(
                sums(w)[i], memory.queries + tile / 4 * 16 * staged<number>::stride + k, staged<number>::stride,
                memory.keys + tile % 4 * 16 * staged<number>::stride + k, staged<number>::stride);
          });
        }
      });
      group.sync();
    }
    group.for_each_warp([&](int w) {
      unrolled<tiles>([&](auto i) {
        const int tile = w * tiles + i;
        group.template store<number>(sums(w)[i], logits + tile / 4 * 16 * stride + tile % 4 * 16, stride);
      });
    });
    group.sync();
    group.for_each(Lanes * token_tile, [&](index_t item) {
      const auto r = static_cast<int>(item) / token_tile;
      const auto t = static_cast<int>(item) % token_tile;
      const index_t n = at.tokens[t];
      float& cell = logits[r * stride + t];
      const position_t seen = group.read(memory.seen[r]);
      float logit = masked_logit;
      if (n < seen) logit = problem.logit(group.read(cell), at.batch, at.kv_head, first_lane + r, seen - 1, n);
      group.write(cell, logit);
    });
    group.sync();
  }
};

}  // namespace restkv::kernel
