// SPDX-License-Identifier: Apache-2.0
/// @file
/// What W_O makes of the heads' changes and outputs, for the verifier, and the sums that end it.
#pragma once

#include <restkv/kernel/exact_tile.hpp>

namespace restkv::kernel {

/// The squares of W[h] change_h, of sum_h W[h] change_h and of sum_h W[h] output_h, over 64 hidden channels and for 8
/// queries. Blocks: [batch, query tiles, hidden tiles]; reads W_O once for each 8 queries.
template <element T>
struct verify_projection {
  using tile = exact_tile<T>;
  static constexpr int threads = tile::threads;
  static constexpr int queries_at_once = tile::vectors / 2;  ///< vectors: their changes, then their outputs
  static constexpr int stride = tile::rows + 1;
  static_assert(queries_at_once == tile::pairs, "a thread has changes, or outputs");
  struct shared {
    typename tile::operands operands;
    double squares[tile::vectors * stride];
  };

  const T* projection;  ///< W_O, [hidden, query_heads * head_dim]
  index_t strides[2];
  const double* change;  ///< [batch, query_heads, queries, head_dim]
  const double* output;  ///< likewise
  double* head_parts;    ///< [batch, query_heads, queries, hidden tiles]
  double* row_parts;     ///< [batch, queries, hidden tiles, change then output]
  index_t hidden;
  index_t query_heads;
  index_t queries;
  index_t head_dim;

  [[nodiscard]] RESTKV_HD static constexpr index_t tiles(index_t hidden) noexcept {
    return (hidden + tile::rows - 1) / tile::rows;
  }
  [[nodiscard]] RESTKV_HD index_t query_tiles() const noexcept {
    return (queries + queries_at_once - 1) / queries_at_once;
  }
  [[nodiscard]] index_t blocks(index_t batch) const noexcept { return batch * query_tiles() * tiles(hidden); }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t hidden_tile = block % tiles(hidden);
    const index_t first_query = block / tiles(hidden) % query_tiles() * queries_at_once;
    const index_t b = block / tiles(hidden) / query_tiles();
    const index_t count = std::min<index_t>(queries - first_query, queries_at_once);
    auto sums = group.template locals<double, tile::pairs>();
    auto joint = group.template locals<double, tile::pairs>();
    group.for_each_thread([&](int t) {
      for (double& x : joint(t)) x = 0.0;
    });
    const auto lane_of = [&](index_t h, index_t query) {
      return (b * query_heads + h) * queries + first_query + query;
    };
    for (index_t h = 0; h < query_heads; ++h) {
      tile::sum(
          group, memory.operands, sums, head_dim,
          [&](int r, index_t c) -> double {
            const int query = r % queries_at_once;
            if (query >= count) return 0.0;
            return (r < queries_at_once ? change : output)[lane_of(h, query) * head_dim + c];
          },
          [&](int t) -> token_row<T> {
            const index_t row = hidden_tile * tile::rows + t;
            if (row >= hidden) return {};
            return {projection + row * strides[0] + h * head_dim * strides[1], strides[1]};
          },
          dot_step{});
      group.for_each_thread([&](int t) { unrolled<tile::pairs>([&](auto i) { joint(t)[i] += sums(t)[i]; }); });
      square(group, memory, sums);
      group.for_each(count, [&](index_t query) {
        group.write(head_parts[lane_of(h, query) * tiles(hidden) + hidden_tile], sum(group, memory, query));
      });
      group.sync();
    }
    square(group, memory, joint);
    group.for_each(2 * count, [&](index_t item) {
      const index_t query = item / 2;
      const index_t what = item % 2;
      const index_t part = (b * queries + first_query + query) * tiles(hidden) + hidden_tile;
      group.write(row_parts[part * 2 + what], sum(group, memory, what * queries_at_once + query));
    });
  }

 private:
  template <class Group, class Sums>
  RESTKV_HD static void square(Group& group, shared& memory, Sums& sums) {
    group.for_each_thread([&](int t) {
      double* const column = memory.squares + tile::first_vector_of(t) * stride + tile::row_of(t);
      unrolled<tile::pairs>([&](auto i) { group.write(column[i * stride], sums(t)[i] * sums(t)[i]); });
    });
    group.sync();
  }
  /// Over the hidden channels of a vector.
  template <class Group>
  [[nodiscard]] RESTKV_HD static double sum(Group& group, const shared& memory, index_t vector) {
    double all = 0;
    for (int t = 0; t < tile::rows; ++t) all += group.read(memory.squares[vector * stride + t]);
    return all;
  }
};

/// The tables' last step for a head: parts of its sums in ascending order. For `for_each`: item i is lane i.
struct finish_lanes {
  const double* deletions;  ///< [lanes, splits, Euclidean then projected]
  index_t splits;
  const double* squares;  ///< ||W change||^2 over tiles of W_O's rows, [lanes, hidden_tiles]; null without W_O
  index_t hidden_tiles;
  double* predicted;  ///< [lanes], begun with the top evicted token
  double* projected_predicted;
  double* projected_error;

  RESTKV_HD void operator()(index_t lane) const noexcept {
    double sum = predicted[lane];
    double projected = projected_predicted[lane];
    for (index_t i = 0; i < splits; ++i) {
      sum += deletions[(lane * splits + i) * 2];
      projected += deletions[(lane * splits + i) * 2 + 1];
    }
    predicted[lane] = sum;
    projected_predicted[lane] = projected;
    if (squares == nullptr) return;
    double square = 0;
    for (index_t i = 0; i < hidden_tiles; ++i) square += squares[lane * hidden_tiles + i];
    projected_error[lane] = std::sqrt(square);
  }
};

/// The layer's row of a query. For `for_each`: item i is query i % queries of sequence i / queries.
struct finish_queries {
  const double* row_squares;  ///< [batch, queries, hidden_tiles, change then output]; null without W_O
  index_t hidden_tiles;
  const double* error;        ///< of the heads, [batch, query_heads, queries]
  const double* output_norm;  ///< likewise
  const double* predicted;    ///< likewise, through W_O where that is known
  index_t query_heads;
  index_t queries;
  double* layer_error;  ///< [batch, queries]
  double* layer_norm;
  double* layer_predicted;

  RESTKV_HD void operator()(index_t row) const noexcept {
    double change = 0;
    double output = 0;
    double sum = 0;
    for (index_t h = 0; h < query_heads; ++h) {
      const index_t lane = (row / queries * query_heads + h) * queries + row % queries;
      sum += predicted[lane];
      if (row_squares != nullptr) continue;
      change = std::fma(error[lane], error[lane], change);
      output = std::fma(output_norm[lane], output_norm[lane], output);
    }
    for (index_t i = 0; i < hidden_tiles && row_squares != nullptr; ++i) {
      change += row_squares[(row * hidden_tiles + i) * 2];
      output += row_squares[(row * hidden_tiles + i) * 2 + 1];
    }
    layer_error[row] = std::sqrt(change);
    layer_norm[row] = std::sqrt(output);
    layer_predicted[row] = sum;
  }
};

}  // namespace restkv::kernel
