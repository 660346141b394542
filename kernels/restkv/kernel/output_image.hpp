// SPDX-License-Identifier: Apache-2.0
/// @file
/// Outputs put together from their splits and mapped through the metric: M o, its norm, and what deleting the top token
/// does to it.
#pragma once

#include <restkv/kernel/output_split.hpp>

namespace restkv::kernel {

/// The largest head_dim of a plan.
inline constexpr int most_channels = 4096;

/// The metric in the executor's memory: L[h] with ||W[h] x|| = ||L[h]^T x||, lower triangular. Null: the identity.
struct metric_source {
  const float* factor = nullptr;  ///< [query_heads, head_dim, head_dim]
  index_t strides[3] = {};

  [[nodiscard]] RESTKV_HD float at(index_t head, index_t c, index_t r) const noexcept {
    return factor[head * strides[0] + c * strides[1] + r * strides[2]];
  }
};

/// One block's image of a vector [head_dim] in shared memory: sets a thread's part of it by set(r, (M x)[r]). Sums run
/// over ascending channels.
template <class Group, class Set>
RESTKV_HD void map_vector(Group& group, const metric_source& metric, index_t head, const float* x, index_t head_dim,
                          const Set& set) {
  group.for_each_thread([&](int t) {
    for (index_t r = t; r < head_dim; r += Group::threads) {
      float sum = 0;
      if (metric.factor == nullptr) {
        sum = group.read(x[r]);
      } else {
        // From channel 0, where the factor is 0: a channel that is infinite makes the image no number, as W x would be.
        for (index_t c = 0; c < head_dim; ++c) sum += metric.at(head, c, r) * group.read(x[c]);
      }
      set(t, r, sum);
    }
  });
}

/// Everything about an output that the scores of a head need.
struct output_states {
  float* whole = nullptr;         ///< o, [cells, head_dim]; null where nobody asks for it
  float* image = nullptr;         ///< M o, [cells, head_dim]
  float* norm = nullptr;          ///< ||M o||, [cells]
  float* top_distance = nullptr;  ///< ||M (o - v_top)||, [cells]
};

/// Per cell (a lane; a query head where attention was smoothed first): o = sum of the splits in ascending order + a_top
/// v_top, and o - v_top = the others' part - (1 - a_top) v_top, which does not cancel. Blocks: [cells].
template <cached T>
struct output_image {
  static constexpr int threads = 128;
  struct shared {
    float whole[most_channels];
    float difference[most_channels];
    collective_memory<float, threads> collective;
  };

  attention_problem<T> problem;
  const float* parts;           ///< [cells, splits, head_dim]
  const lane_softmax* softmax;  ///< [cells], order `before`
  const row_top* tops;          ///< [cells], order `after`; otherwise null
  metric_source metric;
  output_states states;

  [[nodiscard]] RESTKV_HD index_t cells_of_head() const noexcept { return tops != nullptr ? 1 : problem.queries; }
  [[nodiscard]] index_t blocks() const noexcept { return problem.batch * problem.query_heads * cells_of_head(); }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t cell) const {
    const index_t head_dim = problem.head_dim;
    const index_t b = cell / cells_of_head() / problem.query_heads;
    const index_t head = cell / cells_of_head() % problem.query_heads;
    const index_t kv_head = head / problem.group();
    const head_span span = problem.span(b, kv_head);
    if (problem.past_of(span) <= 0) return;
    index_t top = -1;
    float share = 0;
    float rest_share = 0;
    if (tops != nullptr) {
      const row_top row = tops[cell];
      top = row.token;
      share = row.share;
      rest_share = row.rest > least_rest ? row.rest : least_rest;
    } else {
      const lane_softmax lane = softmax[cell];
      top = lane.top;
      share = 1.0f / (1.0f + lane.rest);
      rest_share = lane.bounded_rest() / (1.0f + lane.bounded_rest());
    }
    if (top < 0) return;  // no such query
    const auto value = problem.value.row(b, kv_head, span.begin + top);
    auto mine = group.template locals<float, 1>();
    group.for_each_thread([&](int t) {
      mine(t)[0] = 0.0f;
      for (index_t c = t; c < head_dim; c += threads) {
        float others = 0;
        for (index_t i = 0; i < problem.splits; ++i) {
          const index_t begin = i * problem.split_tokens;
          if (begin < (tops != nullptr ? problem.past_of(span) : span.length)) {
            others += parts[(cell * problem.splits + i) * head_dim + c];
          }
        }
        const float v = value[c];
        const float difference = others - rest_share * v;
        group.write(memory.whole[c], others + share * v);
        group.write(memory.difference[c], difference);
        const float size = std::fabs(difference);
        if (size > mine(t)[0] || size != size) mine(t)[0] = size;
      }
    });
    group.sync();
    // Scaled before squaring: the difference may be as small as rest_share, whose square underflows.
    const float largest = group.reduce(
        mine, [](float x, float y) { return x != x || x > y ? x : y; }, memory.collective);
    const bool scaled = largest > 0.0f && largest <= std::numeric_limits<float>::max();
    const float scale = scaled ? largest : 1.0f;
    group.for_each_thread([&](int t) {
      for (index_t c = t; c < head_dim; c += threads) {
        group.write(memory.difference[c], group.read(memory.difference[c]) / scale);
        if (states.whole != nullptr) group.write(states.whole[cell * head_dim + c], group.read(memory.whole[c]));
      }
      mine(t)[0] = 0.0f;
    });
    group.sync();
    map_vector(group, metric, head, memory.whole, head_dim, [&](int t, index_t r, float x) {
      group.write(states.image[cell * head_dim + r], x);
      mine(t)[0] += x * x;
    });
    const auto add = [](float x, float y) { return x + y; };
    const float square = group.reduce(mine, add, memory.collective);
    group.for_each_thread([&](int t) { mine(t)[0] = 0.0f; });
    map_vector(group, metric, head, memory.difference, head_dim, [&](int t, index_t, float x) { mine(t)[0] += x * x; });
    const float difference = group.reduce(mine, add, memory.collective);
    group.for_each(1, [&](index_t) {
      group.write(states.norm[cell], std::sqrt(square));
      float distance = largest;
      if (scaled) distance = std::sqrt(difference) * scale;
      group.write(states.top_distance[cell], finite_distance(distance));
    });
  }
};

/// Per split and KV head, the sum of its values. Blocks: [batch, kv_heads, splits].
template <cached T>
struct value_sum_split {
  static constexpr int threads = 128;
  struct shared {};

  attention_problem<T> problem;
  float* parts;  ///< [batch * kv_heads, splits, head_dim]

  [[nodiscard]] index_t blocks() const noexcept { return problem.batch * problem.kv_heads * problem.splits; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    const index_t split = block % problem.splits;
    const index_t b = block / problem.splits / problem.kv_heads;
    const index_t kv_head = block / problem.splits % problem.kv_heads;
    const head_span span = problem.span(b, kv_head);
    const index_t begin = split * problem.split_tokens;
    const index_t end = begin + problem.split_tokens < span.length ? begin + problem.split_tokens : span.length;
    group.for_each(problem.head_dim, [&](index_t c) {
      float sum = 0;
      for (index_t first = begin; first < end; first += token_tile) {
        float tile_sum = 0;
        const index_t behind = first + token_tile < end ? first + token_tile : end;
        for (index_t n = first; n < behind; ++n) tile_sum += problem.value.row(b, kv_head, span.begin + n)[c];
        sum += tile_sum / static_cast<float>(span.length);
      }
      group.write(parts[block * problem.head_dim + c], sum);
    });
  }
};

/// Per query head, the image of its KV head's mean value. Blocks: [batch, query_heads].
template <cached T>
struct value_mean_image {
  static constexpr int threads = 128;
  struct shared {
    float mean[most_channels];
  };

  attention_problem<T> problem;
  const float* parts;  ///< [batch * kv_heads, splits, head_dim]
  metric_source metric;
  float* image;  ///< [batch * query_heads, head_dim]

  [[nodiscard]] index_t blocks() const noexcept { return problem.batch * problem.query_heads; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t head = block % problem.query_heads;
    const index_t unit = block / problem.group();  // [batch, kv_heads]
    group.for_each(problem.head_dim, [&](index_t c) {
      float sum = 0;
      for (index_t i = 0; i < problem.splits; ++i) sum += parts[(unit * problem.splits + i) * problem.head_dim + c];
      group.write(memory.mean[c], sum);
    });
    group.sync();
    map_vector(group, metric, head, memory.mean, problem.head_dim,
               [&](int, index_t r, float x) { group.write(image[block * problem.head_dim + r], x); });
  }
};

}  // namespace restkv::kernel
