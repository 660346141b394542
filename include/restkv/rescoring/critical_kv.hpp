// SPDX-License-Identifier: Apache-2.0
/// @file
/// `critical_kv`: the best tokens by the score itself, the others by the score times the size of their value.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/rescoring/rescoring.hpp>
#include <restkv/score/value_norm.hpp>
#include <restkv/selection/top_k.hpp>

#include <cmath>
#include <limits>

namespace restkv {

/// Two stages over any score (CriticalKV, arXiv 2502.03805). Of the B tokens that a head keeps, protected ones included,
/// the first floor(first_stage B) are chosen by the score s, the protected tokens being the best of all; the others by
///
///     (s + epsilon) * ||W[h] v||,   the mean over the query heads of the row
///
/// The paper's norm is l1 over the hidden channels, which needs W_O itself and hidden * d multiply-adds a token and query
/// head: `critical_kv<value_size::projected_l1>`. The l2 norm needs the metric and d^2.
///
/// Runs after the budget, so heads compete by s. Cost of a row besides the weights: a selection of the first stage, in
/// place. Tokens of the first stage get the largest finite score; ties there go to the smaller position.
template <value_size Size = value_size::projected_l1>
struct critical_kv {
  float first_stage = 0.5f;   ///< part of the budget that the score alone decides, in [0, 1]
  float epsilon = 1e-4f;      ///< added to the score in the second stage, >= 0
  value_norm<Size> weight{};  ///< the size of the value

  ///@{
  /// See `rescorer`.
  static constexpr bool after_budget = true;

  template <element T, std::floating_point Real>
  void rescore(const head_view<T>&, const rescoring_context<Real>& context, std::span<Real> scores,
               std::span<Real>) const noexcept {
    const auto whole = static_cast<double>(context.keep + context.protected_tokens);
    const index_t first = static_cast<index_t>(std::floor(whole * static_cast<double>(first_stage))) -
                          context.protected_tokens;
    const auto length = static_cast<index_t>(scores.size());
    const auto key_of = [&](index_t n) { return context.may_evict(n) ? order_key(scores[static_cast<std::size_t>(n)])
                                                                     : order_key_t<Real>{excluded_key}; };
    const auto pivot = find_pivot<order_key_t<Real>>(1, length, [&](index_t, index_t n) { return key_of(n); }, first);
    index_t equal_left = pivot.equal;
    for (index_t n = 0; n < length; ++n) {
      const auto i = static_cast<std::size_t>(n);
      const order_key_t<Real> key = key_of(n);
      const bool in_first = key != excluded_key && (key > pivot.key || (key == pivot.key && equal_left-- > 0));
      scores[i] = in_first ? std::numeric_limits<Real>::max() : (scores[i] + static_cast<Real>(epsilon)) * context.weights[i];
    }
  }
  ///@}

  /// Fails on a first stage outside [0, 1] and on a negative epsilon.
  [[nodiscard]] status check() const noexcept {
    if (!(first_stage >= 0.0f && first_stage <= 1.0f)) {
      return status::error(errc::invalid_argument, "critical_kv.first_stage is %g, must be within [0, 1]",
                           double{first_stage});
    }
    if (!(epsilon >= 0.0f)) {
      return status::error(errc::invalid_argument, "critical_kv.epsilon is %g, must not be negative", double{epsilon});
    }
    return {};
  }
};

}  // namespace restkv
