// SPDX-License-Identifier: Apache-2.0
/// @file
/// `lava`: scores of heads made comparable by the largest value of each.
#pragma once

#include <restkv/rescoring/rescoring.hpp>
#include <restkv/score/value_norm.hpp>

#include <cmath>

namespace restkv {

/// score = s * max over n of ||v_n||_1, n over the tokens that scores are defined for (LAVa, arXiv 2509.09754): an
/// upper bound of what a head's attention s can contribute, so that the heads of a layer may compete. A factor of the
/// whole head: the order inside it stays. The published policy: `snap_kv`, mean over 32 queries, max_pool of 7, the
/// group's maximum, and heads that compete (`ada_kv` with floor 0, or the model's `lava_budget`); the KV head's values
/// are those of all its query heads, so the factor may come after the group's maximum. Values that are not numbers do
/// not count. Cost: one read of the values.
struct lava {
  ///@{
  /// See `rescorer`.
  value_norm<value_size::l1> weight{};

  template <element T, std::floating_point Real>
  void rescore(const head_view<T>&, const rescoring_context<Real>& context, std::span<Real> scores,
               std::span<Real>) const noexcept {
    Real largest = 0;
    for (const Real norm : context.weights) largest = norm > largest && std::isfinite(norm) ? norm : largest;
    for (Real& score : scores) score *= largest;
  }
  ///@}
};

static_assert(rescorer<lava>);

}  // namespace restkv
