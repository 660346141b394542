// SPDX-License-Identifier: Apache-2.0
/// @file
/// The temporal reduction of a tile's tokens inside a block: weighted sums as the queries come, or whole columns.
#pragma once

#include <restkv/kernel/attention_problem.hpp>

#include <span>
#include <type_traits>

namespace restkv::kernel {

/// The temporal reduction of the tokens of a tile under one query head.
///
/// A linear smoother takes the queries as they come, oldest first. Another one needs all of a token's values at once:
/// `MostValues` are held, and a tile whose columns do not fit is gone through several times, some tokens at a time.
template <class Temporal, int Threads, int MostValues = 2048>
struct temporal_columns {
  static constexpr bool always_linear = linear_temporal_smoother<Temporal> && !requires(const Temporal& s) {
    s.linear();
  };
  static constexpr int most_values = always_linear ? 1 : MostValues;

  struct shared {
    float values[most_values];
    float sums[token_tile];
    float finite_sums[token_tile];
  };

  /// Tokens of a tile whose columns fit at once.
  [[nodiscard]] static RESTKV_HD index_t tokens_at_once(bool linear, index_t window) noexcept {
    if (always_linear || linear) return token_tile;
    const index_t fit = most_values / window;
    return fit < token_tile ? fit : token_tile;
  }

  /// Nothing is known of any token. Before a phase's end.
  template <class Group>
  RESTKV_HD static void begin(Group& group, shared& memory) {
    group.for_each(token_tile, [&](index_t t) {
      group.write(memory.sums[t], 0.0f);
      group.write(memory.finite_sums[t], 0.0f);
    });
  }

  /// Adds the values of token t of the tile under queries [first, first + count): value_of(i). By the thread of `t`
  /// alone.
  template <class Group, class ValueOf>
  RESTKV_HD static void add(Group& group, shared& memory, bool linear, const float* weights, index_t window, index_t t,
                            index_t first_of_columns, index_t first, index_t count, const ValueOf& value_of) {
    if (always_linear || linear) {
      float sum = group.read(memory.sums[t]);
      float finite_sum = group.read(memory.finite_sums[t]);
      for (index_t i = 0; i < count; ++i) {
        const float weight = weights[first + i];
        const float value = value_of(i);
        sum += weight * value;
        if (weight != 0.0f) finite_sum += weight * finite_score(value);
      }
      group.write(memory.sums[t], sum);
      group.write(memory.finite_sums[t], finite_sum);
      return;
    }
    if constexpr (!always_linear) {
      float* const column = memory.values + (t - first_of_columns) * window;
      for (index_t i = 0; i < count; ++i) group.write(column[first + i], value_of(i));
    }
  }

  /// The reduction of token t, by the thread that added its values.
  template <class Group>
  [[nodiscard]] RESTKV_HD static float finish(Group& group, shared& memory, const Temporal& temporal, bool linear,
                                              index_t window, index_t t, index_t first_of_columns) {
    if (always_linear || linear) {
      // Not a number: perhaps for a value that is none or infinite, and has a weight of 0.
      const float sum = group.read(memory.sums[t]);
      return finite_score(sum == sum ? sum : group.read(memory.finite_sums[t]));
    }
    if constexpr (!always_linear) {
      float* const column = memory.values + (t - first_of_columns) * window;
      const std::span<const float> values(column, static_cast<std::size_t>(window));
      const float reduced = temporal(values);
      if (reduced == reduced) return finite_score(reduced);
      for (index_t i = 0; i < window; ++i) group.write(column[i], finite_score(group.read(column[i])));
      return finite_score(temporal(values));
    }
    return 0;
  }
};

}  // namespace restkv::kernel
