// SPDX-License-Identifier: Apache-2.0
/// @file
/// `granularity`: what is evicted together.
#pragma once

#include <restkv/core/status.hpp>

#include <algorithm>
#include <limits>
#include <span>

namespace restkv {

/// From the smoothed scores of a unit's tokens to the unit's score.
enum class unit_reduce {
  mean,     ///< of a chunk's tokens (ChunkKV, arXiv 2502.00299, up to a factor)
  maximum,  ///< a unit is as good as its best token
};

/// Tokens of a unit, and whether the heads of a layer keep the same tokens.
///
/// Units tile a sequence from its first token: unit u holds the tokens [u tokens, (u + 1) tokens). A unit is kept or
/// evicted whole, so pages of a paged cache become free. Units with a protected token are kept, and so is the last one
/// where it is not full. Budgets are rounded down to whole units.
///
/// With `shared`, the scores of all heads of a layer are reduced by the policy's group reduction to one row, and every
/// KV head keeps the same tokens (TOVA, arXiv 2401.06104; engines with one block table per sequence).
struct granularity {
  index_t tokens = 1;                           ///< of a unit: 1 token, a chunk, a page
  unit_reduce reduce = unit_reduce::mean;       ///< where a unit has several tokens
  bool shared = false;                          ///< one kept set per layer

  /// Fails on units of less than 1 token.
  [[nodiscard]] status check() const noexcept {
    if (tokens < 1 || tokens > std::numeric_limits<position_t>::max()) {
      return status::error(errc::invalid_argument, "granularity.tokens is %lld, must be within [1, %lld]",
                           static_cast<long long>(tokens),
                           static_cast<long long>(std::numeric_limits<position_t>::max()));
    }
    return {};
  }

  /// A unit's score: NaN where any of its tokens' is.
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(std::span<const Real> scores) const noexcept {
    Real reduced = scores[0];
    for (std::size_t i = 1; i < scores.size(); ++i) {
      const bool larger = scores[i] > reduced || scores[i] != scores[i];
      if (reduce == unit_reduce::maximum) {
        reduced = larger ? scores[i] : reduced;
      } else {
        reduced += scores[i];
      }
    }
    return reduce == unit_reduce::mean ? reduced / static_cast<Real>(scores.size()) : reduced;
  }
};

}  // namespace restkv
