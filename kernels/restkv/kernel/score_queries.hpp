// SPDX-License-Identifier: Apache-2.0
/// @file
/// Order `before`: every query of the window scores every token, then the scores are smoothed and the heads reduced.
#pragma once

#include <restkv/kernel/score_bounds.hpp>

namespace restkv::kernel {

/// The scores of one tile of tokens of one row. Nothing of the size [window, tokens] leaves the block: logits are
/// computed again, and distances are sums of squared differences M v - M o, which do not cancel where v is close to o.
/// With `Bounds`, bounds on the distances stand in for them: no product with M, none with every output.
/// Blocks: [batch, rows, tiles].
template <class Request, cached T, bool Bounds = false>
struct score_queries {
  using needs = needs_of<Request>;
  static constexpr int threads = 128;
  static constexpr int lanes = 32;
  using tile = logit_tile<T, lanes, threads>;
  using images = value_images<T, threads>;
  using columns = temporal_columns<typename needs::temporal, threads>;
  static constexpr bool images_needed = needs::image && !Bounds;
  struct shared {
    union {
      std::conditional_t<needs::window, typename tile::operands, char> operands;
      std::conditional_t<needs::values && !Bounds, typename images::operands, char> products;
    };
    alignas(32) float logits[needs::window ? lanes * tile::stride : 1];
    alignas(32) float image[needs::chunks ? token_tile * images::stride : 1];
    float outputs[needs::output && !Bounds ? lanes * images::stride : 1];
    std::conditional_t<Bounds, tile_reach, char> reach;
    typename columns::shared columns_memory;
    lane_softmax softmax[lanes];
    token_facts facts;
  };

  score_inputs<Request, T> in;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const score_place at(in, block);
    if (at.count <= 0) return;
    gather_head_facts(group, memory.facts, memory.image, in, at);
    for (index_t j = 0; j < in.heads_of_row; ++j) {
      const index_t head = at.first_head + j;
      if constexpr (needs::projected) {
        gather_projected_norms(group, memory.facts, memory.products, memory.image, in, at, head);
      }
      group.for_each(token_tile, [&](index_t t) {
        group.write(memory.facts.value_squares[t], 0.0f);
        group.write(memory.facts.mean_squares[t], 0.0f);
      });
      group.sync();
      if constexpr (needs::window) {
        score_head(group, memory, at, j, head);
      } else {
        if constexpr (needs::image) {
          for (index_t first = 0; first < in.problem.head_dim; first += images::columns) {
            images::map(group, memory.products, memory.image, in.problem, in.metric, in.factor, at.batch, head, at.span,
                        at.tokens, first);
            add_image_facts<Request>(group, memory.facts, memory.image, in, first, in.mean_of(at.batch, head));
            group.sync();
          }
        }
        group.for_each(token_tile, [&](index_t t) {
          const float score = in.score(features_of_token(group, memory.facts, in, at, head, t));
          deliver_score(group, memory.facts, in, at, j, t, finite_score(score));
        });
      }
      group.sync();
    }
  }

 private:
  /// One query head: all queries of the window, 32 at a time, oldest first.
  template <class Group>
  RESTKV_HD void score_head(Group& group, shared& memory, const score_place& at, index_t j, index_t head) const {
    const attention_problem<T>& problem = in.problem;
    const index_t head_lane = head % problem.group() * problem.queries;  // among the KV head's lanes
    const index_t lane_base = problem.first_lane(at.batch, at.kv_head) + head_lane;
    const index_t at_once = columns::tokens_at_once(in.linear, problem.queries);
    if constexpr (Bounds) measure_reach(group, memory.reach, memory.image, in, at, head);
    for (index_t from = 0; from < at.count; from += at_once) {
      const index_t to = from + at_once < at.count ? from + at_once : at.count;
      columns::begin(group, memory.columns_memory);
      for (index_t lane = 0; lane < problem.queries; lane += lanes) {
        const index_t here = problem.queries - lane < lanes ? problem.queries - lane : lanes;
        group.for_each(here, [&](index_t i) { group.write(memory.softmax[i], in.softmax[lane_base + lane + i]); });
        tile::compute(group, memory.operands, memory.logits, problem, at.span,
                      {at.batch, at.kv_head, head_lane + lane, here, at.tokens});
        score_lanes(group, memory, at, head, lane_base + lane, lane, here, from == 0 && lane == 0);
        group.for_each(token_tile, [&](index_t t) {
          if (t < from || t >= to) return;
          columns::add(group, memory.columns_memory, in.linear, in.weights, problem.queries, t, from, lane, here,
                       [&](index_t i) { return group.read(memory.logits[i * tile::stride + t]); });
        });
        group.sync();
      }
      group.for_each(token_tile, [&](index_t t) {
        if (t < from || t >= to) return;
        const float score =
            columns::finish(group, memory.columns_memory, in.temporal, in.linear, problem.queries, t, from);
        deliver_score<Bounds>(group, memory.facts, in, at, j, t, score);
      });
      group.sync();
    }
  }

  /// The tile's logits under `count` lanes become scores, or bounds. `base` is the first lane's state,
  /// `first_query` its place in the window.
  template <class Group>
  RESTKV_HD void score_lanes(Group& group, shared& memory, const score_place& at, index_t head, index_t base,
                             [[maybe_unused]] index_t first_query, index_t count,
                             [[maybe_unused]] bool first_time) const {
    const attention_problem<T>& problem = in.problem;
    static_assert(lanes * token_tile == threads * 16);
    // Thread t: tokens t % 16 + 16 i, lanes t / 16 + 8 k; cell 4 k + i.
    auto squares = group.template locals < float, needs::distance && !Bounds ? 16 : 1 > ();
    auto products = group.template locals < float, needs::alignment ? 16 : 1 > ();
    if constexpr (images_needed) {
      group.for_each_thread([&](int t) {
        for (float& x : squares(t)) x = 0.0f;
        for (float& x : products(t)) x = 0.0f;
      });
      for (index_t first = 0; first < problem.head_dim; first += images::columns) {
        if constexpr (needs::distance || needs::alignment) {
          group.for_each(lanes * images::columns, [&](index_t item) {
            const index_t r = item / images::columns;
            const index_t c = first + item % images::columns;
            const bool inside = r < count && c < problem.head_dim && group.read(memory.softmax[r]).top >= 0;
            group.write(memory.outputs[r * images::stride + item % images::columns],
                        inside ? in.outputs.image[(base + r) * problem.head_dim + c] : 0.0f);
          });
        }
        images::map(group, memory.products, memory.image, problem, in.metric, in.factor, at.batch, head, at.span,
                    at.tokens, first);
        if (first_time)
          add_image_facts<Request>(group, memory.facts, memory.image, in, first, in.mean_of(at.batch, head));
        if constexpr (needs::distance || needs::alignment) {
          group.for_each_thread([&](int t) {
            for (int c = 0; c < images::columns; ++c) {
              float token[4];
              float output[4];
              unrolled<4>([&](auto i) {
                token[i] = group.read(memory.image[(t % 16 + 16 * i) * images::stride + c]);
                output[i] = group.read(memory.outputs[(t / 16 + 8 * i) * images::stride + c]);
              });
              unrolled<16>([&](auto i) {
                if constexpr (needs::distance) {
                  const float difference = token[i % 4] - output[i / 4];
                  squares(t)[i] += difference * difference;
                }
                if constexpr (needs::alignment) products(t)[i] += token[i % 4] * output[i / 4];
              });
            }
          });
        }
        group.sync();
      }
    }
    group.for_each_thread([&](int t) {
      unrolled<4>([&](auto i) {
        const index_t n = t % 16 + 16 * i;
        if (n >= at.count) return;
        token_features<float> f = features_of_token(group, memory.facts, in, at, head, n);
        unrolled<4>([&](auto k) {
          const index_t lane = t / 16 + 8 * k;
          if (lane >= count) return;
          const lane_softmax state = group.read(memory.softmax[lane]);
          float& cell = memory.logits[lane * tile::stride + n];
          const float logit = group.read(cell);
          [[maybe_unused]] const bool is_top = f.position == state.top;
          f.attention = state.share(logit);
          if constexpr (has(needs::set, feature::odds)) {
            f.odds = is_top ? 1.0f / state.bounded_rest() : f.attention / (1.0f - f.attention);
          }
          if constexpr (Bounds) {
            f.distance = is_top ? in.outputs.top_distance[base + lane]
                                : in.bounds.radius[base + lane] + group.read(memory.reach.reach[n]);
          } else if constexpr (needs::distance) {
            f.distance = is_top ? in.outputs.top_distance[base + lane] : root(squares(t)[k * 4 + i]);
          }
          if constexpr (has(needs::set, feature::output_norm)) f.output_norm = in.outputs.norm[base + lane];
          if constexpr (has(needs::set, feature::logit)) f.logit = logit;
          if constexpr (needs::alignment) f.alignment = products(t)[k * 4 + i];
          if constexpr (Bounds) {
            // A query without weight: 0 times a bound that is infinite would be no bound.
            const bool counts = !in.linear || in.weights[first_query + lane] != 0.0f;
            group.write(cell, counts ? bound_of(in.score(f), in.bounds.widen) : 0.0f);
          } else {
            group.write(cell, in.score(f));
          }
        });
      });
    });
    group.sync();
  }
};

}  // namespace restkv::kernel
