// SPDX-License-Identifier: Apache-2.0
/// @file
/// Order `after`: one score a token and query head from its smoothed attention, then the heads reduced.
#pragma once

#include <restkv/kernel/score_bounds.hpp>

namespace restkv::kernel {

/// The scores of one tile of tokens of one row, or bounds on them. Blocks: [batch, rows, tiles].
template <class Request, cached T, bool Bounds = false>
struct score_smoothed {
  using needs = needs_of<Request>;
  static constexpr int threads = 128;
  using images = value_images<T, threads>;
  static constexpr bool images_needed = needs::image && !Bounds;
  struct shared {
    std::conditional_t<needs::values && !Bounds, typename images::operands, char> products;
    std::conditional_t<Bounds, tile_reach, char> reach;
    alignas(32) float image[needs::chunks ? token_tile * images::stride : 1];
    float squares[token_tile];
    float alignments[token_tile];
    token_facts facts;
  };

  score_inputs<Request, T> in;
  const float* rows;      ///< smoothed attention, [batch * query_heads, row_stride]
  const float* row_rest;  ///< 1 - row, likewise; null where the smoother is linear
  const row_top* tops;    ///< [batch * query_heads]
  index_t row_stride;
  float whole;  ///< what a constant 1 is smoothed to

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const score_place at(in, block);
    if (at.count <= 0) return;
    const attention_problem<T>& problem = in.problem;
    gather_head_facts(group, memory.facts, memory.image, in, at);
    for (index_t j = 0; j < in.heads_of_row; ++j) {
      const index_t head = at.first_head + j;
      const index_t cell = at.batch * problem.query_heads + head;
      if constexpr (needs::projected) {
        gather_projected_norms(group, memory.facts, memory.products, memory.image, in, at, head);
      }
      group.for_each(token_tile, [&](index_t t) {
        group.write(memory.facts.value_squares[t], 0.0f);
        group.write(memory.facts.mean_squares[t], 0.0f);
        group.write(memory.squares[t], 0.0f);
        group.write(memory.alignments[t], 0.0f);
      });
      group.sync();
      if constexpr (Bounds) measure_reach(group, memory.reach, memory.image, in, at, head);
      if constexpr (images_needed) {
        for (index_t first = 0; first < problem.head_dim; first += images::columns) {
          images::map(group, memory.products, memory.image, problem, in.metric, in.factor, at.batch, head, at.span,
                      at.tokens, first);
          add_image_facts<Request>(group, memory.facts, memory.image, in, first, in.mean_of(at.batch, head));
          if constexpr (needs::distance || needs::alignment) {
            group.for_each(token_tile, [&](index_t t) {
              float squares = group.read(memory.squares[t]);
              float alignment = group.read(memory.alignments[t]);
              for (index_t i = 0; i < images::columns && first + i < problem.head_dim; ++i) {
                const float x = group.read(memory.image[t * images::stride + i]);
                const float output = in.outputs.image[cell * problem.head_dim + first + i];
                squares += (x - output) * (x - output);
                alignment += x * output;
              }
              group.write(memory.squares[t], squares);
              group.write(memory.alignments[t], alignment);
            });
          }
          group.sync();
        }
      }
      group.for_each(at.count, [&](index_t t) {
        token_features<float> f = features_of_token(group, memory.facts, in, at, head, t);
        const index_t n = f.position;
        f.attention = rows[cell * row_stride + n];
        // Only the top token of a linear smoother's row can hold so much that the subtraction loses digits.
        const row_top top = tops[cell];
        float rest = n == top.token ? top.rest : whole - f.attention;
        if (row_rest != nullptr) rest = row_rest[cell * row_stride + n];
        if (!(rest > least_rest)) rest = least_rest;
        f.odds = f.attention / rest;
        if constexpr (Bounds) {
          f.distance = n == top.token ? in.outputs.top_distance[cell]
                                      : in.bounds.radius[cell] + group.read(memory.reach.reach[t]);
        } else if constexpr (needs::distance) {
          f.distance = n == top.token ? in.outputs.top_distance[cell] : root(group.read(memory.squares[t]));
        }
        if constexpr (has(needs::set, feature::output_norm)) f.output_norm = in.outputs.norm[cell];
        if constexpr (needs::alignment) f.alignment = group.read(memory.alignments[t]);
        const float score = Bounds ? bound_of(in.score(f), in.bounds.widen) : in.score(f);
        deliver_score<Bounds>(group, memory.facts, in, at, j, t, finite_score(score));
      });
      group.sync();
    }
  }
};

}  // namespace restkv::kernel
