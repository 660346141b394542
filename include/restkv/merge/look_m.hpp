// SPDX-License-Identifier: Apache-2.0
/// @file
/// The three merges of LOOK-M (arXiv 2406.18139): averaged, pivotal and weighted.
#pragma once

#include <restkv/merge/operator.hpp>

#include <algorithm>

namespace restkv {

/// Averaged merging: r' = (r + sum of x) / (n + 1) over the n dropped tokens x that a kept token r receives, for keys
/// and values (arXiv 2406.18139, section 3.3).
struct average_merge {
  ///@{
  /// See `merge_operator`.
  static constexpr merge_target target = merge_target::most_similar;
  static constexpr bool merges_keys = true;
  static constexpr bool needs_attention = false;

  template <std::floating_point Real>
  [[nodiscard]] constexpr Real weight(const merge_pair<Real>&) const noexcept {
    return 1;
  }
  template <std::floating_point Real>
  [[nodiscard]] constexpr merge_blend<Real> blend(index_t, Real total) const noexcept {
    return {1 / (1 + total), 1 / (1 + total)};
  }
  ///@}
};

/// Pivotal merging: every dropped token x is averaged with its receiver r first, and those means with r:
/// r' = (r + sum of (x + r) / 2) / (n + 1), for keys and values (arXiv 2406.18139, section 3.3, as KVCache-Factory
/// has it). The kept token has at least half of the say.
struct pivot_merge {
  ///@{
  /// See `merge_operator`.
  static constexpr merge_target target = merge_target::most_similar;
  static constexpr bool merges_keys = true;
  static constexpr bool needs_attention = false;

  template <std::floating_point Real>
  [[nodiscard]] constexpr Real weight(const merge_pair<Real>&) const noexcept {
    return 1;
  }
  template <std::floating_point Real>
  [[nodiscard]] constexpr merge_blend<Real> blend(index_t, Real total) const noexcept {
    return {(1 + total / 2) / (1 + total), 1 / (2 * (1 + total))};
  }
  ///@}
};

/// Weighted merging: w = max((cos + 1) / 2, least_weight), r' = (r + sum of w x) / (1 + sum of w), for keys and values
/// (arXiv 2406.18139, section 3.3, with KVCache-Factory's weights).
struct weighted_merge {
  double least_weight = 1e-6;  ///< of a dropped token whose key points away from its receiver's

  ///@{
  /// See `merge_operator`.
  static constexpr merge_target target = merge_target::most_similar;
  static constexpr bool merges_keys = true;
  static constexpr bool needs_attention = false;

  template <std::floating_point Real>
  [[nodiscard]] constexpr Real weight(const merge_pair<Real>& pair) const noexcept {
    return std::max((pair.similarity + 1) / 2, static_cast<Real>(least_weight));
  }
  template <std::floating_point Real>
  [[nodiscard]] constexpr merge_blend<Real> blend(index_t, Real total) const noexcept {
    return {1 / (1 + total), 1 / (1 + total)};
  }
  [[nodiscard]] status check() const noexcept {
    if (least_weight >= 0 && least_weight <= 1) return {};
    return status::error(errc::invalid_argument, "least_weight of weighted_merge is %g, must be within [0, 1]",
                         least_weight);
  }
  ///@}
};

}  // namespace restkv
