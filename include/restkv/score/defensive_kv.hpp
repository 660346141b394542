// SPDX-License-Identifier: Apache-2.0
/// @file
/// `defensive_kv`: each query's attention, spread over neighbours before the worst case is taken.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/score/features.hpp>

namespace restkv {

/// score = a', per query of the window, where a' is the query's attention averaged over `attention_pool` neighbouring tokens
/// and scaled back to its sum over the past. With the temporal smoother `maximum`, group_reduce::max and
/// `defensive_rescoring` this is DefensiveKV (arXiv 2510.13334): what a token may be worth to the least favourable query.
/// Cost: as `snap_kv`, the exponentials twice.
struct defensive_kv {
  int attention_pool = 5;  ///< tokens, odd, at most 129

  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention;
  }
  ///@}

  /// Fails on a width that is even or outside [1, 129].
  [[nodiscard]] status check() const noexcept {
    if (attention_pool < 1 || attention_pool > 129 || attention_pool % 2 == 0) {
      return status::error(errc::invalid_argument, "defensive_kv.attention_pool is %d, must be odd, within [1, 129]",
                           attention_pool);
    }
    return {};
  }
};

}  // namespace restkv
