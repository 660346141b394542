// SPDX-License-Identifier: Apache-2.0
/// @file
/// `group_reduce`: from the query heads of one KV head to one score per token.
#pragma once

#include <restkv/core/config.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>

namespace restkv {

/// How the scores of the query heads that share a KV head become one. A NaN among them gives NaN.
enum class group_reduce {
  none,  ///< no reduction: one kept set per query head, as the ReST-KV release does; stores each KV head g times
  mean,
  max,
  sum,
  l2,  ///< root of the sum of squares: the joint change of the group's outputs if they were orthogonal
};

/// Folds one query head's score into the group's running value, which starts at 0 (scores are never negative there;
/// for `max` at the first head's score).
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD inline Real group_fold(group_reduce how, Real running, Real score, bool first) noexcept {
  switch (how) {
    case group_reduce::max: return first || score > running || score != score ? score : running;
    case group_reduce::l2: {
      // In double, where no square of a float overflows or underflows.
      if (first) return score;
      const double square = static_cast<double>(running) * static_cast<double>(running);
      return static_cast<Real>(std::sqrt(square + static_cast<double>(score) * static_cast<double>(score)));
    }
    case group_reduce::none:
    case group_reduce::mean:
    case group_reduce::sum: break;
  }
  return first ? score : running + score;
}

/// Turns the folded value into the group's score.
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD inline Real group_finish(group_reduce how, Real folded, index_t heads) noexcept {
  if (how == group_reduce::mean) return folded / static_cast<Real>(heads);
  return folded;
}

}  // namespace restkv
