// SPDX-License-Identifier: Apache-2.0
/// @file
/// `protection`: tokens that are never evicted.
#pragma once

#include <restkv/core/status.hpp>

#include <limits>

namespace restkv {

/// The first `sink` and the last `recent` tokens of every sequence are kept whatever their score, and count towards
/// the budget. Further positions are protected by the layer's `keep_mask`. A policy that observes a window of queries
/// protects at least that window, because scores are not defined inside it.
struct protection {
  index_t sink = 0;     ///< first tokens
  index_t recent = 32;  ///< last tokens

  /// Fails on a negative number.
  [[nodiscard]] status check() const noexcept {
    constexpr index_t longest = std::numeric_limits<position_t>::max();
    if (sink < 0 || recent < 0 || sink > longest || recent > longest) {
      return status::error(errc::invalid_argument, "protection has sink %lld and recent %lld, must be within [0, %lld]",
                           static_cast<long long>(sink), static_cast<long long>(recent),
                           static_cast<long long>(longest));
    }
    return {};
  }
};

}  // namespace restkv
