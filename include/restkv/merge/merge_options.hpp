// SPDX-License-Identifier: Apache-2.0
/// @file
/// `merge_options`: how dropped tokens are merged, and what of it is kept.
#pragma once

#include <restkv/cache/rope.hpp>
#include <restkv/selection/protection.hpp>

#include <cmath>
#include <span>

namespace restkv {

/// What of a merge is kept, judged by the exact error over the observation window.
enum class merge_guard {
  none,   ///< everything: the error may rise, and with the published operators it mostly does
  head,   ///< the merges of a head, all or none
  token,  ///< the merges into each kept token, one after the other, and then as `head`
};

/// How keys of different positions are compared and averaged.
struct rotary_keys {
  /// Radians a position, of each pair (`rope_frequencies`). With them keys are turned back to position 0, compared and
  /// averaged there, and the result is turned to the receiver's position. That equals turning each dropped key to it.
  std::span<const double> frequencies{};
  rotary_pairs pairs = rotary_pairs::half_split;  ///< which channels make a pair
  /// The RoPE positions of the layer's tokens, [batch, kv_heads, tokens]; optional: their indices on the token axis.
  tensor_view<const position_t, 3> positions{};
  /// Keys are compared and averaged as they are: for models without RoPE, and to do as the releases do.
  bool ignore = false;
};

/// How dropped tokens are merged.
struct merge_options {
  index_t window = 32;                     ///< last queries that the guard and attention observe
  merge_guard guard = merge_guard::token;  ///< which merges are kept
  rotary_keys rope{};                      ///< needed by operators that merge keys
  protection protect{.sink = 0, .recent = 0};  ///< kept tokens that receive nothing: the first and last of a sequence
  double least_similarity = -1;            ///< dropped tokens below it stay dropped; `merge_target::most_similar`
  double fraction = 1;                     ///< part of the dropped tokens, the most similar, that is merged; likewise

  /// Fails on a value out of its range.
  [[nodiscard]] status check() const noexcept {
    if (window < 1 || window > 4096) {
      return status::error(errc::invalid_argument, "the observation window is %lld queries, must be within [1, %d]",
                           static_cast<long long>(window), 4096);
    }
    if (!(least_similarity >= -1 && least_similarity <= 1)) {
      return status::error(errc::invalid_argument, "least_similarity is %g, must be within [-1, 1]", least_similarity);
    }
    if (!(fraction > 0 && fraction <= 1)) {
      return status::error(errc::invalid_argument, "fraction is %g, must be above 0 and at most 1", fraction);
    }
    for (const double frequency : rope.frequencies) {
      if (std::isfinite(frequency)) continue;
      return status::error(errc::invalid_argument, "a frequency of %zu is %g, must be finite", rope.frequencies.size(),
                           frequency);
    }
    return protect.check();
  }
};

}  // namespace restkv
