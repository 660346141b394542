// SPDX-License-Identifier: Apache-2.0
/// @file
/// `ob_cache`: the second-order change of the output when a key, a value or both are pruned.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// Which part of the cache entry OBCache takes away.
enum class ob_cache_part {
  value,  ///< a^2 ||v||^2
  key,    ///< (a z)^2 ||v - o||^2
  joint,  ///< both, and their cross term 2 a^2 z (||v||^2 - <v, o>)
};

/// score = the part's term, per query of the window, z = q k / sqrt(d) (OBCache, arXiv 2510.07651, an optimal brain
/// damage view of eviction). Published with the temporal smoother `sum`, a window of 16, max pooling over 7 tokens and
/// group_reduce::sum. `joint` may be negative. Cost: as `caote`.
struct ob_cache {
  ob_cache_part part = ob_cache_part::key;  ///< see ob_cache_part

  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention | feature::logit | feature::distance | feature::value_norm |
                                   feature::alignment;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    const Real squared_value = token.value_norm * token.value_norm;
    const Real value = token.attention * token.attention * squared_value;
    const Real key = token.attention * token.logit * token.distance;
    switch (part) {
      case ob_cache_part::value: return value;
      case ob_cache_part::key: return key * key;
      case ob_cache_part::joint: break;
    }
    const Real cross = token.attention * token.attention * token.logit * (squared_value - token.alignment);
    return value + key * key + Real(2) * cross;
  }
  ///@}
};

}  // namespace restkv
