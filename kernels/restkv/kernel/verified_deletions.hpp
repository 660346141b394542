// SPDX-License-Identifier: Apache-2.0
/// @file
/// The verifier's third pass: what the deletion of each evicted token alone would cost, added up.
#pragma once

#include <restkv/kernel/verified_outputs.hpp>

namespace restkv::kernel {

/// v^T G[h] v of every token. Blocks: [batch, query_heads, tiles].
template <element T>
struct verify_value_norms {
  using tile = exact_tile<T>;
  static constexpr int threads = tile::threads;
  struct shared {
    typename tile::operands operands;
    double halves[threads];
  };

  verified_attention<T> problem;
  verified_gram gram;
  double* norms;  ///< [batch, query_heads, tiles * token_tile]
  index_t tiles;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t first = block % tiles * token_tile;
    const index_t b = block / tiles / problem.query_heads;
    const index_t head = block / tiles % problem.query_heads;
    const index_t kv_head = head / (problem.query_heads / problem.kv_heads);
    const verified_span span = problem.spans[b * problem.kv_heads + kv_head];
    if (first >= span.length) return;
    const auto row_of = [&](int t) -> token_row<T> {
      if (first + t >= span.length) return {};
      return problem.value.row(b, kv_head, span.begin + first + t);
    };
    auto sums = group.template locals<double, tile::pairs>();
    auto norm = group.template locals<double, 1>();
    group.for_each_thread([&](int t) { norm(t)[0] = 0.0; });
    for (index_t channel = 0; channel < problem.head_dim; channel += tile::vectors) {
      tile::sum(
          group, memory.operands, sums, problem.head_dim,
          [&](int r, index_t c) { return channel + r < problem.head_dim ? gram.at(head, channel + r, c) : 0.0; },
          row_of, dot_step{});
      group.for_each_thread([&](int t) {
        const token_row<T> row = row_of(tile::row_of(t));
        unrolled<tile::pairs>([&](auto i) {
          const index_t c = channel + tile::first_vector_of(t) + i;
          if (row.data != nullptr && c < problem.head_dim) {
            norm(t)[0] = std::fma(widen<double>(row[c]), sums(t)[i], norm(t)[0]);
          }
        });
      });
    }
    group.for_each_thread([&](int t) { group.write(memory.halves[t], norm(t)[0]); });
    group.sync();
    group.for_each(token_tile, [&](index_t t) {
      const double square = group.read(memory.halves[t]) + group.read(memory.halves[token_tile + t]);
      group.write(norms[block * token_tile + t], square > 0 ? square : 0.0);
    });
  }
};

/// Per split and lane, the sum over the evicted tokens but the top one of a/(1-a) ||o - v||, and the same through the
/// metric. Their shares are at most a half: 1 - a loses nothing.
///
/// Through the metric, ||W (o - v)||^2 = o.Go - 2 Go.v + v.Gv takes one product a lane and token instead of a square
/// form; where it would cancel, the difference is formed first, as on the CPU.
template <element T>
struct verify_deletions {
  using tile = exact_tile<T>;
  static constexpr int threads = tile::threads;
  static constexpr int stride = tile::rows + 1;
  struct shared {
    typename tile::operands operands;
    typename verified_block<T>::lane_facts facts;
    verified_masses masses[tile::vectors];
    double terms[tile::vectors * stride];
  };

  verified_attention<T> problem;
  const verified_masses* masses;  ///< [lanes]
  verified_gram gram;
  verified_rows rows;
  const double* value_norms;  ///< [batch, query_heads, tokens_stride]
  index_t tokens_stride;
  double* parts;  ///< [lanes, splits, Euclidean then projected]

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const verified_block<T> at(problem, block);
    const index_t d = problem.head_dim;
    group.for_each(at.count, [&](index_t r) { group.write(memory.masses[r], masses[at.lane_base + r]); });
    at.begin_lanes(group, memory.facts);
    auto sums = group.template locals<double, tile::pairs>();
    auto odds = group.template locals<double, tile::pairs>();
    auto totals = group.template locals<double, 2 * tile::pairs>();
    group.for_each_thread([&](int t) {
      for (double& x : totals(t)) x = 0.0;
    });
    for (index_t first = at.begin; first < at.end; first += token_tile) {
      at.logits(group, memory.operands, memory.facts, sums, first);
      group.for_each_thread([&](int t) {
        const index_t n = first + tile::row_of(t);
        unrolled<tile::pairs>([&](auto i) {
          const int r = tile::first_vector_of(t) + i;
          const bool counts = n < group.read(memory.facts.seen[r]) && !at.keeps(group, memory.facts, r, n) &&
                              n != group.read(memory.masses[r].top_token);
          double attention = 0;
          if (counts) {
            attention =
                std::exp(sums(t)[i] - group.read(memory.masses[r].others.largest)) * rows.other_scale[at.lane_base + r];
          }
          odds(t)[i] = attention / (1.0 - attention);
        });
      });
      const auto value_of = [&](int t) { return at.row_of(problem.value, first + t); };
      tile::sum(
          group, memory.operands, sums, d,
          [&](int r, index_t c) { return r < at.count ? rows.output[(at.lane_base + r) * d + c] : 0.0; }, value_of,
          distance_step{});
      group.for_each_thread([&](int t) {
        unrolled<tile::pairs>(
            [&](auto i) { totals(t)[i] = std::fma(odds(t)[i], std::sqrt(sums(t)[i]), totals(t)[i]); });
      });
      if (gram.data == nullptr) continue;
      tile::sum(
          group, memory.operands, sums, d,
          [&](int r, index_t c) { return r < at.count ? rows.through[(at.lane_base + r) * d + c] : 0.0; }, value_of,
          dot_step{});
      group.for_each_thread([&](int t) {
        unrolled<tile::pairs>([&](auto i) {
          if (odds(t)[i] == 0) return;
          const index_t lane = at.lane_base + tile::first_vector_of(t) + i;
          const index_t head = at.head_of(tile::first_vector_of(t) + i);
          const index_t n = first + tile::row_of(t);
          const double norm = value_norms[(at.b * problem.query_heads + head) * tokens_stride + n];
          double& total = totals(t)[tile::pairs + i];
          total = std::fma(odds(t)[i],
                           std::sqrt(squared_image(lane, head, at.row_of(problem.value, n), norm, sums(t)[i])), total);
        });
      });
    }
    for (int set = 0; set < 2; ++set) {
      group.for_each_thread([&](int t) {
        double* const column = memory.terms + tile::first_vector_of(t) * stride + tile::row_of(t);
        unrolled<tile::pairs>(
            [&](auto i) { group.write(column[i * stride], set == 0 ? totals(t)[i] : totals(t)[tile::pairs + i]); });
      });
      group.sync();
      group.for_each(at.count, [&](index_t r) {
        double sum = 0;
        for (int t = 0; t < tile::rows; ++t) sum += group.read(memory.terms[r * stride + t]);
        group.write(parts[((at.lane_base + r) * problem.splits + at.split) * 2 + set], sum);
      });
      group.sync();
    }
  }

 private:
  /// ||W (o - v)||^2 of a lane and a token; `product` is Go . v, `norm` v . Gv.
  [[nodiscard]] RESTKV_HD double squared_image(index_t lane, index_t head, const token_row<T>& value, double norm,
                                               double product) const noexcept {
    constexpr double cancels = 1e-8;
    const double squares = rows.gram_output_square[lane] + norm;
    const double square = std::fma(-2.0, product, squares);
    if (square >= cancels * squares) return square;
    const double* const output = rows.output + lane * problem.head_dim;
    double formed = 0;
    for (index_t r = 0; r < problem.head_dim; ++r) {
      double row = 0;
      for (index_t c = 0; c < problem.head_dim; ++c) {
        row = std::fma(gram.at(head, c, r), output[c] - widen<double>(value[c]), row);
      }
      formed = std::fma(output[r] - widen<double>(value[r]), row, formed);
    }
    return formed > 0 ? formed : 0.0;
  }
};

}  // namespace restkv::kernel
