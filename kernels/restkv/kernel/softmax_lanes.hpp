// SPDX-License-Identifier: Apache-2.0
/// @file
/// The softmax of every lane in two kernels: over each split of the tokens, then over the splits.
#pragma once

#include <restkv/kernel/attention_logits.hpp>

namespace restkv::kernel {

/// What is known of a lane's logits over some tokens. The largest is kept apart from the others, and those are added up
/// relative to the largest among themselves: neither 1 - a of the top token nor the others' proportions lose digits.
struct softmax_part {
  double sum = 0;  ///< over the others, exp(logit - second)
  float largest = masked_logit;
  float second = masked_logit;  ///< largest of the others
  position_t top = -1;          ///< token of `largest`, the first of equals; -1: none

  /// exp(x - y) of two logits.
  [[nodiscard]] RESTKV_HD static double ratio(float x, float y) noexcept {
    return std::exp(static_cast<double>(x) - static_cast<double>(y));
  }
  /// Adds others: `amount` is their sum relative to `logit`, the largest of them.
  RESTKV_HD void add_others(float logit, double amount) noexcept {
    if (amount <= 0) return;
    if (sum <= 0) {
      second = logit;
      sum = amount;
    } else if (logit <= second) {
      sum += amount * ratio(logit, second);
    } else {
      sum = sum * ratio(second, logit) + amount;
      second = logit;
    }
  }
  /// Makes a token the top one if its logit is larger, or equal and the token earlier; otherwise it is one of the
  /// others.
  RESTKV_HD void offer(float logit, position_t token) noexcept {
    if (token < 0) return;
    if (top < 0) {
      largest = logit;
      top = token;
    } else if (logit > largest || (logit == largest && token < top)) {
      add_others(largest, 1.0);
      largest = logit;
      top = token;
    } else {
      add_others(logit, 1.0);
    }
  }
  /// Both together.
  RESTKV_HD void merge(const softmax_part& other) noexcept {
    offer(other.largest, other.top);
    add_others(other.second, other.sum);
  }
};

/// One split of one KV head's tokens under `Lanes` of its lanes. Two parts a split and lane: its even and its odd
/// tokens. Blocks: [batch, kv_heads, lane tiles, splits]; reads every key once for each lane tile.
template <cached T>
struct softmax_split {
  static constexpr int threads = 128;
  static constexpr int lanes = 64;
  using tile = logit_tile<T, lanes, threads>;
  struct shared {
    typename tile::operands operands;
    alignas(32) float logits[lanes * tile::stride];
  };

  attention_problem<T> problem;
  softmax_part* parts;  ///< [batch * kv_heads * lanes, splits * 2]

  [[nodiscard]] static RESTKV_HD index_t lane_tiles(const attention_problem<T>& problem) noexcept {
    return (problem.lanes() + lanes - 1) / lanes;
  }
  [[nodiscard]] static index_t blocks(const attention_problem<T>& problem) noexcept {
    return problem.batch * problem.kv_heads * lane_tiles(problem) * problem.splits;
  }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t split = block % problem.splits;
    const index_t lane_tile = block / problem.splits % lane_tiles(problem);
    const index_t unit = block / problem.splits / lane_tiles(problem);
    const index_t b = unit / problem.kv_heads;
    const index_t kv_head = unit % problem.kv_heads;
    const head_span span = problem.span(b, kv_head);
    const index_t first_lane = lane_tile * lanes;
    const index_t count = problem.lanes() - first_lane < lanes ? problem.lanes() - first_lane : lanes;
    const index_t begin = split * problem.split_tokens;
    const index_t seen = problem.seen_by_any(span);
    const index_t end = begin + problem.split_tokens < seen ? begin + problem.split_tokens : seen;
    auto part = group.template locals<softmax_part, 1>();
    group.for_each_thread([&](int t) { part(t)[0] = softmax_part{}; });
    for (index_t first = begin; first < end; first += token_tile) {
      tile::compute(group, memory.operands, memory.logits, problem, span, {b, kv_head, first_lane, count, first});
      group.for_each_thread([&](int t) {
        const float* const logits = memory.logits + t / 2 * tile::stride;
        softmax_part here;
        for (int n = t % 2; n < token_tile; n += 2) {
          const float logit = group.read(logits[n]);
          if (logit == masked_logit) continue;
          if (here.top < 0 || logit > here.largest) {
            here.second = here.largest;
            here.largest = logit;
            here.top = static_cast<position_t>(first + n);
          } else if (logit > here.second) {
            here.second = logit;
          }
        }
        if (here.top < 0) return;
        float sum = 0;
        for (int n = t % 2; n < token_tile; n += 2) {
          const float logit = group.read(logits[n]);
          if (logit != masked_logit && first + n != here.top) sum += std::exp(logit - here.second);
        }
        here.sum = static_cast<double>(sum);
        part(t)[0].merge(here);
      });
      group.sync();
    }
    group.for_each_thread([&](int t) {
      if (t / 2 >= count) return;
      const index_t lane = problem.first_lane(b, kv_head) + first_lane + t / 2;
      group.write(parts[(lane * problem.splits + split) * 2 + t % 2], part(t)[0]);
    });
  }
};

/// The parts of each lane in ascending order of the splits. Blocks: of 128 lanes.
struct softmax_combine {
  static constexpr int threads = 128;
  struct shared {};

  const softmax_part* parts;  ///< [lanes, count]
  lane_softmax* softmax;      ///< [lanes]
  index_t lanes;
  index_t count;

  [[nodiscard]] index_t blocks() const noexcept { return (lanes + threads - 1) / threads; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    group.for_each_thread([&](int t) {
      const index_t lane = block * threads + t;
      if (lane >= lanes) return;
      softmax_part all;
      for (index_t i = 0; i < count; ++i) all.merge(group.read(parts[lane * count + i]));
      group.write(softmax[lane], finish(all));
    });
  }

  /// Where all tokens but the top one have less than least_rest together, they get that, in their true proportions.
  [[nodiscard]] RESTKV_HD static lane_softmax finish(const softmax_part& all) noexcept {
    lane_softmax lane;
    lane.top = all.top;
    lane.largest = all.largest;
    lane.second = all.second;
    const double to_largest = all.sum > 0 ? softmax_part::ratio(all.second, all.largest) : 0.0;
    lane.rest = static_cast<float>(all.sum * to_largest);
    lane.scale = 1.0f / (1.0f + lane.rest);
    lane.second_scale = static_cast<float>(to_largest / (1.0 + all.sum * to_largest));
    if (all.sum > 0 && lane.rest < least_rest) {
      lane.largest = all.second;
      lane.rest = least_rest;
      lane.scale = static_cast<float>(static_cast<double>(least_rest) / all.sum);
      lane.second_scale = lane.scale;
    }
    return lane;
  }
};

}  // namespace restkv::kernel
