// SPDX-License-Identifier: Apache-2.0
/// @file
/// Sizes and memory of one sequence's exchange of tokens.
#pragma once

#include <restkv/core/workspace.hpp>
#include <restkv/selection/set_error/group_metric.hpp>
#include <restkv/selection/set_error/window.hpp>

#include <algorithm>

namespace restkv::detail {

/// What may happen to a token of the exchange.
enum class exchange_state : std::uint8_t {
  fixed,  ///< kept, and protected
  kept,   ///< kept, and may leave
  out,    ///< may come in
};

/// Sizes of one sequence's exchange.
struct exchange_sizes {
  problem_shape shape{};
  index_t kept_heads = 0;
  index_t hidden = 0;    ///< rows of W_O; query_heads * head_dim without it
  index_t capacity = 0;  ///< most tokens of one head that take part
  observed_rows observed{};

  [[nodiscard]] constexpr index_t group() const noexcept { return shape.query_heads / kept_heads; }
  [[nodiscard]] constexpr index_t pairs() const noexcept { return pairs_of_group(group()); }
  [[nodiscard]] constexpr index_t width() const noexcept { return padded_set_lanes(shape.head_dim); }
};

/// The error of one set, and what it is made of.
struct set_outputs {
  double* mass = nullptr;   ///< attention of the kept tokens, [query_heads, lanes]
  float* output = nullptr;  ///< o', [query_heads, width, lanes]
  float* change = nullptr;  ///< o' - o, [query_heads, width, lanes]
  float* error = nullptr;   ///< sum_h W[h] (o'_h - o_h), [hidden, lanes]
  double window = 0;        ///< sum_r w_r ||error_r||^2 / sum_r w_r ||W o_r||^2
  double total = 0;         ///< the same, and the noise of what is evicted
};

/// A token that may be exchanged, and what that would add to the objective.
struct exchange_entry {
  double gain = 0;
  std::int32_t head = 0;
  std::int32_t index = 0;
};

/// Memory of one sequence's exchange, carved from a workspace by the same code when counting and when running.
struct exchange_memory {
  position_t* tokens;         // [kept_heads, capacity], ascending
  exchange_state* states;     // [kept_heads, capacity]
  exchange_state* trial;      // [kept_heads, capacity]
  index_t* counts;            // [kept_heads]
  index_t* lengths;           // [kept_heads], kept tokens of the trial
  float* values;              // [kept_heads, capacity, width]
  float* squares;             // v^T G[i, k] v, [kept_heads, pairs, capacity]
  float* shares;              // [query_heads, capacity, lanes]
  double* noise;              // [kept_heads, capacity]
  double* gains;              // [kept_heads, capacity]
  double* full;               // o, [query_heads, width, lanes]
  float* pulls;               // W[h]^T error, [query_heads, width, lanes]
  float* pull_products;       // pull . o', [query_heads, lanes]
  float* coefficients;        // [query_heads, lanes]
  float* pair_pulls;          // G[i, k] o'_k + G[k, i] o'_i, [kept_heads, pairs, width, lanes]
  float* pair_squares;        // o'_i^T G[i, k] o'_k, [kept_heads, pairs, lanes]
  float* weights;             // [lanes], of the queries
  float* noise_weights;       // [lanes]
  double* squares_of_rows;    // [hidden]
  exchange_entry* leave;      // [kept_heads * capacity]
  exchange_entry* enter;      // [kept_heads * capacity]
  float* projection_rows;     // [tasks over W_O, set_tile, query_heads * head_dim]
  float* products;            // [query_heads, set_tile, max(lanes, width)] * (group + pairs)
  double* head_sums;          // [query_heads, width, lanes]
  window_buffers* buffers;    // [query_heads]
  set_outputs now;
  set_outputs next;

  exchange_memory(const exchange_sizes& sizes, workspace& space) noexcept {
    const index_t lanes = sizes.observed.lanes;
    const index_t heads = sizes.shape.query_heads;
    const index_t width = sizes.width();
    const index_t entries = sizes.kept_heads * sizes.capacity;
    tokens = space.take<position_t>(entries);
    states = space.take<exchange_state>(entries);
    trial = space.take<exchange_state>(entries);
    counts = space.take<index_t>(sizes.kept_heads);
    lengths = space.take<index_t>(sizes.kept_heads);
    values = space.take<float>(entries, width);
    squares = space.take<float>(entries, sizes.pairs());
    shares = space.take<float>(heads, sizes.capacity, lanes);
    noise = space.take<double>(entries);
    gains = space.take<double>(entries);
    full = space.take<double>(heads, width, lanes);
    pulls = space.take<float>(heads, width, lanes);
    pull_products = space.take<float>(heads, lanes);
    coefficients = space.take<float>(heads, lanes);
    pair_pulls = space.take<float>(sizes.kept_heads, sizes.pairs(), width, lanes);
    pair_squares = space.take<float>(sizes.kept_heads, sizes.pairs(), lanes);
    weights = space.take<float>(lanes);
    noise_weights = space.take<float>(lanes);
    squares_of_rows = space.take<double>(sizes.hidden);
    leave = space.take<exchange_entry>(entries);
    enter = space.take<exchange_entry>(entries);
    // One piece a head for the passes over W_O's columns, and one a block of its rows.
    projection_rows = space.take<float>((sizes.hidden + set_tile - 1) / set_tile * heads * sizes.shape.head_dim +
                                        heads * set_tile * width);
    products =
        space.take<float>(sizes.kept_heads, sizes.group() + sizes.pairs(), set_tile, std::max(lanes, width));
    head_sums = space.take<double>(heads, width, lanes);
    buffers = space.take<window_buffers>(heads);
    for (index_t h = 0; h < heads; ++h) {
      window_buffers made;
      made.queries = space.take<float>(width, lanes);
      made.rows = space.take<float>(set_tile, width);
      made.shares = space.take<float>(set_tile, lanes);
      made.sums = space.take<float>(width, lanes);
      made.largest = space.take<float>(lanes);
      made.total = space.take<double>(lanes);
      if (buffers != nullptr && space.check().ok()) buffers[h] = made;
    }
    for (set_outputs* outputs : {&now, &next}) {
      outputs->mass = space.take<double>(heads, lanes);
      outputs->output = space.take<float>(heads, width, lanes);
      outputs->change = space.take<float>(heads, width, lanes);
      outputs->error = space.take<float>(sizes.hidden, lanes);
    }
  }
};

}  // namespace restkv::detail
