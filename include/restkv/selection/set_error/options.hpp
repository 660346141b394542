// SPDX-License-Identifier: Apache-2.0
/// @file
/// `set_error`: what a kept set is refined for, and `set_error_report`: what that did.
#pragma once

#include <restkv/selection/protection.hpp>

#include <limits>
#include <span>

namespace restkv {

/// How a kept set is refined for the error that the whole set makes, instead of the sum of what single deletions make.
///
/// With o_h[r] the output of head h for observed query r, o'_h[r] that of its attention renormalised over the kept
/// tokens, w_r weights that add up to 1 and y[r] = sum_h W[h] o_h[r], the objective is
///
///     sum_r w_r ||sum_h W[h] (o'_h[r] - o_h[r])||^2 / sum_r w_r ||y[r]||^2  +  attention_noise * sum_{n evicted} s_n
///
/// The first part is exact and joint over the heads of the layer, which share no cache but add up behind W_O. The
/// second stands for what the observed queries do not show. Were each evicted token's attention off by an independent
/// relative error of variance `attention_noise`, the expected square of the first part would grow by s_n = sum_r u_r
/// sum_h (a / (1 - a) ||W[h] (o_h[r] - v_n)||)^2 / sum_r w_r ||y[r]||^2 a token. It keeps errors from being made to
/// cancel for exactly these queries. Its weights u_r add up to 1; they may spread over more queries than w_r.
struct set_error {
  /// Observed queries, the last rows of `layer_view::query`; 0: all rows.
  index_t window = 0;
  /// Row i stands at position length - horizon + i mod horizon of the sequence; 0: `window`, one row a position. With
  /// fewer positions than rows, several guesses of the query at a position are observed together.
  index_t horizon = 0;
  /// Weight of each observed query, oldest first; empty: all alike. [window]
  std::span<const float> weights{};
  /// u_r of each observed query, oldest first; empty: `weights`. [window]
  std::span<const float> noise_weights{};
  /// Variance of the relative error of a query's attention to an evicted token; 0: the observed queries are all there
  /// is.
  float attention_noise = 4.0f;
  /// Rounds of exchanges at most. Each looks at every token that takes part once, and at up to 6 sets.
  index_t passes = 32;
  /// Tokens that never leave; those of `layer_view::keep_mask` do not either.
  protection protect{.sink = 0, .recent = 32};

  /// Fails on a parameter outside its range.
  [[nodiscard]] status check() const noexcept {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    if (window < 0 || window > most_rows || horizon < 0 || horizon > most_rows) {
      return status::error(errc::invalid_argument,
                           "set_error has window %lld and horizon %lld, must be within [0, %lld]", ll(window),
                           ll(horizon), ll(most_rows));
    }
    if (!(attention_noise >= 0.0f && attention_noise <= std::numeric_limits<float>::max())) {
      return status::error(errc::invalid_argument, "set_error.attention_noise is %g, must be 0 or above and finite",
                           static_cast<double>(attention_noise));
    }
    if (passes < 0) {
      return status::error(errc::invalid_argument, "set_error.passes is %lld, must be 0 or above", ll(passes));
    }
    for (const auto& all : {weights, noise_weights}) {
      for (const float weight : all) {
        if (weight >= 0.0f && weight <= 1e30f) continue;
        return status::error(errc::invalid_argument, "a weight of set_error is %g, must be within [0, 1e30]",
                             static_cast<double>(weight));
      }
    }
    return protect.check();
  }

  static constexpr index_t most_rows = 4096;  ///< observed queries at most
};

/// What `refine_set_error` did. Sums are over the sequences of a batch that could be refined.
struct set_error_report {
  double before = 0;      ///< objective of the set as it was given
  double after = 0;       ///< objective of the set as it is
  index_t exchanged = 0;  ///< tokens that left; as many entered
  index_t passes = 0;     ///< rounds that were needed
};

}  // namespace restkv
