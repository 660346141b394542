// SPDX-License-Identifier: Apache-2.0
/// @file
/// `protection`: tokens that are never evicted.
#pragma once

#include <restkv/core/status.hpp>

namespace restkv {

/// The first `sink` and the last `recent` tokens of every sequence are kept whatever their score, and count towards
/// the budget. Further positions are protected by the layer's `keep_mask`. A policy that observes a window of queries
/// protects at least that window, because scores are not defined inside it.
struct protection {
  index_t sink = 0;
  index_t recent = 32;

  [[nodiscard]] status check() const noexcept {
    if (sink < 0 || recent < 0) {
      return status::error(errc::invalid_argument, "protection has sink %lld and recent %lld, neither may be negative",
                           static_cast<long long>(sink), static_cast<long long>(recent));
    }
    return {};
  }
};

}  // namespace restkv
