// SPDX-License-Identifier: Apache-2.0
/// @file
/// `value_merge`: dropped values are folded into the kept token with the most similar key; keys stay.
#pragma once

#include <restkv/merge/operator.hpp>

#include <algorithm>

namespace restkv {

/// w = max(cos, 0) ||v|| / (||v|| + ||v_r|| + 1e-6), v_r' = (v_r + sum of w v) / (1 + sum of w); keys are not touched,
/// so RoPE is respected by itself. The form of kvpress's MergingPress, after Token Merging (arXiv 2210.09461) and D2O
/// (arXiv 2406.13035); its threshold and fraction are `merge_options::least_similarity` and `merge_options::fraction`.
struct value_merge {
  ///@{
  /// See `merge_operator`.
  static constexpr merge_target target = merge_target::most_similar;
  static constexpr bool merges_keys = false;
  static constexpr bool needs_attention = false;

  template <std::floating_point Real>
  [[nodiscard]] constexpr Real weight(const merge_pair<Real>& pair) const noexcept {
    return std::max(pair.similarity, Real(0)) * pair.dropped_norm /
           (pair.dropped_norm + pair.kept_norm + static_cast<Real>(1e-6));
  }
  template <std::floating_point Real>
  [[nodiscard]] constexpr merge_blend<Real> blend(index_t, Real total) const noexcept {
    return {1 / (1 + total), 1 / (1 + total)};
  }
  ///@}
};

}  // namespace restkv
