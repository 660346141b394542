// SPDX-License-Identifier: Apache-2.0
/// @file
/// The verifier's second pass: outputs of the kept and of the other evicted tokens, and what follows for each query.
#pragma once

#include <restkv/kernel/verified_attention.hpp>

namespace restkv::kernel {

/// G[h] = W[h]^T W[h], [query_heads, head_dim, head_dim]; null: distances are Euclidean only.
struct verified_gram {
  const double* data = nullptr;
  index_t strides[3] = {};

  [[nodiscard]] RESTKV_HD double at(index_t head, index_t r, index_t c) const noexcept {
    return data[head * strides[0] + r * strides[1] + c * strides[2]];
  }
};

/// Per split and lane, sum of e^(s_n - largest) v_n over the kept tokens and over the evicted ones but the top one,
/// each relative to their own largest. A thread owns a channel of all 16 lanes; its two sums a lane lie in registers.
/// Blocks: [.. of verified_attention, channel blocks]; reads every key and value once for each tile of lanes.
template <element T>
struct verify_outputs {
  using tile = exact_tile<T>;
  static constexpr int threads = tile::threads;
  static constexpr int weights_of_token = 2 * tile::vectors;
  struct shared {
    typename tile::operands operands;
    typename verified_block<T>::lane_facts facts;
    verified_masses masses[tile::vectors];
    alignas(16) double weights[tile::rows * weights_of_token];  ///< [tokens, kept then others, lanes]
  };

  verified_attention<T> problem;
  const verified_masses* masses;  ///< [lanes]
  double* parts;                  ///< [lanes, splits, kept then others, head_dim]
  index_t channel_blocks;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const verified_block<T> at(problem, block / channel_blocks);
    const index_t first_channel = block % channel_blocks * threads;
    group.for_each(at.count, [&](index_t r) { group.write(memory.masses[r], masses[at.lane_base + r]); });
    at.begin_lanes(group, memory.facts);
    auto sums = group.template locals<double, tile::pairs>();
    auto outputs = group.template locals<double, weights_of_token>();
    group.for_each_thread([&](int t) {
      for (double& x : outputs(t)) x = 0.0;
    });
    for (index_t first = at.begin; first < at.end; first += token_tile) {
      at.logits(group, memory.operands, memory.facts, sums, first);
      group.for_each_thread([&](int t) {
        const index_t n = first + tile::row_of(t);
        double* const row = memory.weights + tile::row_of(t) * weights_of_token;
        unrolled<tile::pairs>([&](auto i) {
          const int r = tile::first_vector_of(t) + i;
          const bool seen = n < group.read(memory.facts.seen[r]);
          const bool kept = seen && at.keeps(group, memory.facts, r, n);
          const bool evicted = seen && !kept && n != group.read(memory.masses[r].top_token);
          const double logit = sums(t)[i];
          group.write(row[r], kept ? std::exp(logit - group.read(memory.masses[r].kept.largest)) : 0.0);
          group.write(row[tile::vectors + r],
                      evicted ? std::exp(logit - group.read(memory.masses[r].others.largest)) : 0.0);
        });
      });
      group.sync();
      const index_t tokens = std::min<index_t>(at.end - first, token_tile);
      group.for_each_thread([&](int t) {
        const index_t c = first_channel + t;
        if (c >= problem.head_dim) return;
        for (index_t i = 0; i < tokens; ++i) {
          const auto value = widen<double>(at.row_of(problem.value, first + i)[c]);
          const double* const row = memory.weights + i * weights_of_token;
          unrolled<weights_of_token>(
              [&](auto j) { outputs(t)[j] = std::fma(group.read(row[j]), value, outputs(t)[j]); });
        }
      });
      group.sync();
    }
    group.for_each_thread([&](int t) {
      const index_t c = first_channel + t;
      if (c >= problem.head_dim) return;
      unrolled<weights_of_token>([&](auto j) {
        constexpr int lane = j % tile::vectors;
        constexpr int set = j / tile::vectors;
        if (lane >= at.count) return;
        const index_t part = (at.lane_base + lane) * problem.splits + at.split;
        group.write(parts[(part * 2 + set) * problem.head_dim + c], outputs(t)[j]);
      });
    });
  }
};

/// What the later kernels are told of the lanes.
struct verified_rows {
  double* change = nullptr;              ///< o' - o, [lanes, head_dim]
  double* output = nullptr;              ///< o, [lanes, head_dim]
  double* through = nullptr;             ///< G o, [lanes, head_dim]; null without a metric
  double* gram_output_square = nullptr;  ///< o^T G o, [lanes]
  double* other_scale = nullptr;         ///< see split_shares, [lanes]
};

/// The tables of the lanes that `verify_rows` fills in, [lanes].
struct verified_tables {
  double* error;                ///< ||o' - o||
  double* output_norm;          ///< ||o||
  double* predicted;            ///< of the top evicted token alone
  double* mass;                 ///< A_E
  double* projected_error;      ///< ||W (o' - o)|| by the metric; 0 without one
  double* projected_predicted;  ///< of the top evicted token alone, by the metric; 0 without one
};

/// o, o' - o and their norms, and the deletion of the top evicted token. Blocks: [lanes].
template <element T>
struct verify_rows {
  static constexpr int threads = 128;
  struct shared {
    collective_memory<double, threads> collective;
  };

  verified_attention<T> problem;
  const verified_masses* masses;  ///< [lanes]
  const double* parts;            ///< see verify_outputs
  verified_gram gram;
  verified_rows rows;
  verified_tables tables;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t lane) const {
    const index_t d = problem.head_dim;
    const index_t b = lane / problem.queries / problem.query_heads;
    const index_t head = lane / problem.queries % problem.query_heads;
    const index_t kv_head = head / (problem.query_heads / problem.kv_heads);
    const verified_masses of_lane = masses[lane];
    const restkv::detail::split_shares shares(of_lane);
    const position_t begin = problem.spans[b * problem.kv_heads + kv_head].begin;
    double* const change = rows.change + lane * d;
    double* const output = rows.output + lane * d;
    // First the top token's difference, while that is needed.
    double* const through = gram.data != nullptr ? rows.through + lane * d : nullptr;
    auto mine = group.template locals<double, 3>();
    group.for_each_thread([&](int t) {
      for (double& x : mine(t)) x = 0.0;
      for (index_t c = t; c < d; c += threads) {
        double kept = 0;
        double others = 0;
        for (index_t i = 0; i < problem.splits; ++i) {
          const double* const part = parts + (lane * problem.splits + i) * 2 * d;
          kept += part[c];
          others += part[d + c];
        }
        double top = 0;
        if (of_lane.top_token >= 0) {
          top = widen<double>(problem.value.row(b, kv_head, begin + of_lane.top_token)[c]);
        }
        const auto made =
            shares.of(kept / std::max(of_lane.kept.sum, 1.0), top, others / std::max(of_lane.others.sum, 1.0));
        group.write(change[c], made.change);
        group.write(output[c], made.output);
        if (through != nullptr) group.write(through[c], made.top_difference);
        mine(t)[0] = std::fma(made.change, made.change, mine(t)[0]);
        mine(t)[1] = std::fma(made.output, made.output, mine(t)[1]);
        mine(t)[2] = std::fma(made.top_difference, made.top_difference, mine(t)[2]);
      }
    });
    const double error = sum(group, memory, mine, 0);
    const double norm = sum(group, memory, mine, 1);
    const double top_distance = sum(group, memory, mine, 2);
    double projected_error = 0;
    double projected_top = 0;
    if (gram.data != nullptr) {
      projected_error = form(group, memory, head, change, nullptr);
      projected_top = form(group, memory, head, through, nullptr);
      const double square = form(group, memory, head, output, through);
      group.for_each(1, [&](index_t) { group.write(rows.gram_output_square[lane], square); });
    }
    group.for_each(1, [&](index_t) {
      group.write(rows.other_scale[lane], shares.other_scale);
      group.write(tables.error[lane], std::sqrt(error));
      group.write(tables.output_norm[lane], std::sqrt(norm));
      group.write(tables.predicted[lane], shares.top * std::sqrt(top_distance));
      group.write(tables.mass[lane], shares.evicted);
      group.write(tables.projected_error[lane], std::sqrt(projected_error));
      group.write(tables.projected_predicted[lane], shares.top * std::sqrt(projected_top));
    });
  }

 private:
  template <class Group, class Mine>
  [[nodiscard]] RESTKV_HD static double sum(Group& group, shared& memory, Mine& mine, std::size_t i) {
    auto terms = group.template locals<double, 1>();
    group.for_each_thread([&](int t) { terms(t)[0] = mine(t)[i]; });
    return group.reduce(
        terms, [](double a, double b) { return a + b; }, memory.collective);
  }
  /// x^T G x; G x goes to `image` where that is not null. The phase before must have ended.
  template <class Group>
  [[nodiscard]] RESTKV_HD double form(Group& group, shared& memory, index_t head, const double* x,
                                      double* image) const {
    auto mine = group.template locals<double, 1>();
    group.for_each_thread([&](int t) {
      mine(t)[0] = 0.0;
      for (index_t r = t; r < problem.head_dim; r += threads) {
        double row = 0;
        // G is symmetric: its column lies so that the block reads neighbours.
        for (index_t c = 0; c < problem.head_dim; ++c) row = std::fma(gram.at(head, c, r), group.read(x[c]), row);
        mine(t)[0] = std::fma(group.read(x[r]), row, mine(t)[0]);
        if (image != nullptr) group.write(image[r], row);
      }
    });
    const double square = group.reduce(
        mine, [](double a, double b) { return a + b; }, memory.collective);
    return square > 0 ? square : 0.0;
  }
};

}  // namespace restkv::kernel
