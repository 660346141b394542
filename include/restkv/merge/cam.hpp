// SPDX-License-Identifier: Apache-2.0
/// @file
/// `cam_merge`: CaM's merging by chance, and its expectation.
#pragma once

#include <restkv/merge/operator.hpp>
#include <restkv/score/random.hpp>

#include <algorithm>

namespace restkv {

/// Cache Merging (Zhang et al., CaM, ICML 2024): a dropped value v is added to the next m kept values, each getting v /
/// m, with the probability p = clamp(a / mean of the receivers' a, 0, 1), where a is the mean attention of the
/// observation window. Fewer than m kept tokens behind it share it; none: it stays dropped. Values are added, not
/// averaged; keys are not touched.
///
/// The draw is a pure function of (seed, layer, sequence, head, position), as that of `random_score`: the same on every
/// machine and thread count. `expectation` adds p v / m instead, the mean over all seeds.
struct cam_merge {
  index_t targets = 32;      ///< m
  std::uint64_t seed = 0;    ///< another seed merges other tokens
  index_t layer = 0;         ///< index of the layer, for draws that differ between layers
  bool expectation = false;  ///< no draw

  ///@{
  /// See `merge_operator`.
  static constexpr merge_target target = merge_target::following;
  static constexpr bool merges_keys = false;
  static constexpr bool needs_attention = true;

  template <std::floating_point Real>
  [[nodiscard]] Real weight(const merge_pair<Real>& pair) const noexcept {
    const Real ratio = pair.dropped_attention > pair.kept_attention ? Real(1)
                       : pair.kept_attention > 0 ? std::max(pair.dropped_attention / pair.kept_attention, Real(0))
                                                 : Real(0);
    if (expectation) return ratio;
    token_features<Real> token;
    token.layer = layer;
    token.batch = pair.batch;
    token.head = pair.head;
    token.position = pair.position;
    return random_score{seed}(token) < ratio ? Real(1) : Real(0);
  }
  template <std::floating_point Real>
  [[nodiscard]] constexpr merge_blend<Real> blend(index_t, Real) const noexcept {
    return {1, 1};
  }
  [[nodiscard]] status check() const noexcept {
    if (targets >= 1) return {};
    return status::error(errc::invalid_argument, "cam_merge has %lld targets, at least 1 is needed",
                         static_cast<long long>(targets));
  }
  ///@}
};

}  // namespace restkv
