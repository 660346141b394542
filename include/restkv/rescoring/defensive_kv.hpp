// SPDX-License-Identifier: Apache-2.0
/// @file
/// `defensive_rescoring`: a floor under the scores, values' sizes, and the tokens that hold most of the attention.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/rescoring/rescoring.hpp>
#include <restkv/score/value_norm.hpp>
#include <restkv/selection/top_k.hpp>

#include <algorithm>
#include <limits>

namespace restkv {

/// The second half of DefensiveKV (arXiv 2510.13334), over the scores of `defensive_kv`:
///
/// 1. s becomes max(s, mean of s over the row): no token is certain to be worthless.
/// 2. s is multiplied by ||W[h] v||_1, the mean over the query heads, as a share of its sum over the heads of the layer.
/// 3. The tokens with the largest mean attention, as many as hold less than `mass` of all attention together with the
///    window, at most as many as the head keeps, get the largest finite score. (The published code means to count the
///    window's own share and counts that of the tokens before it; here it is the window's.)
///
/// Runs before the budget, so that heads compete with these scores. Ties go to the smaller position. Cost of a row
/// besides the weights and the attention: some 40 passes over the attention.
template <value_size Size = value_size::projected_l1>
struct defensive_rescoring {
  float mass = 0.9f;          ///< part of the attention, in [0, 1]
  value_norm<Size> weight{};  ///< the size of the value

  ///@{
  /// See `rescorer`.
  static constexpr bool weights_are_shares = true;
  static constexpr bool reads_attention = true;

  template <element T, std::floating_point Real>
  void rescore(const head_view<T>&, const rescoring_context<Real>& context, std::span<Real> scores,
               std::span<Real>) const noexcept {
    double sum = 0;
    index_t numbers = 0;
    for (const Real score : scores) {
      if (score != score) continue;
      sum += static_cast<double>(score);
      ++numbers;
    }
    const auto floor = static_cast<Real>(numbers > 0 ? sum / static_cast<double>(numbers) : 0.0);
    for (std::size_t n = 0; n < scores.size(); ++n) {
      scores[n] = (scores[n] < floor ? floor : scores[n]) * context.weights[n];
    }
    const index_t forced = heaviest(context);
    const auto length = static_cast<index_t>(context.attention.size());
    const auto key_at = [&](index_t, index_t n) { return key_of(context, n); };
    const auto pivot = find_pivot<order_key_t<Real>>(1, length, key_at, forced);
    index_t equal_left = pivot.equal;
    for (index_t n = 0; n < length; ++n) {
      const auto key = key_of(context, n);
      if (key == excluded_key) continue;
      if (key > pivot.key || (key == pivot.key && equal_left-- > 0)) {
        scores[static_cast<std::size_t>(n)] = std::numeric_limits<Real>::max();
      }
    }
  }
  ///@}

  /// Fails on a mass outside [0, 1].
  [[nodiscard]] status check() const noexcept {
    if (!(mass >= 0.0f && mass <= 1.0f)) {
      return status::error(errc::invalid_argument, "defensive_rescoring.mass is %g, must be within [0, 1]",
                           double{mass});
    }
    return {};
  }

 private:
  template <std::floating_point Real>
  [[nodiscard]] static order_key_t<Real> key_of(const rescoring_context<Real>& context, index_t n) noexcept {
    return context.may_evict(n) ? order_key(context.attention[static_cast<std::size_t>(n)])
                                : order_key_t<Real>{excluded_key};
  }

  /// How many of the most attended candidates hold less than what is left of `mass` when the window has its share.
  template <std::floating_point Real>
  [[nodiscard]] index_t heaviest(const rescoring_context<Real>& context) const noexcept {
    const auto length = static_cast<index_t>(context.attention.size());
    double past = 0;
    for (const Real attention : context.attention) past += static_cast<double>(attention);
    // As shares of the past: its sum is 1, the window holds 1 - past of all attention.
    const double most = (static_cast<double>(mass) - std::max(0.0, 1.0 - past)) * past;
    index_t low = 0;  // holds less
    index_t high = std::min(context.keep, length) + 1;  // holds too much, or is too many
    while (high - low > 1) {
      const index_t middle = low + (high - low) / 2;
      const auto pivot = find_pivot<order_key_t<Real>>(
          1, length, [&](index_t, index_t n) { return key_of(context, n); }, middle);
      index_t equal_left = pivot.equal;
      double held = 0;
      for (index_t n = 0; n < length; ++n) {
        const auto key = key_of(context, n);
        if (key == excluded_key) continue;
        if (key > pivot.key || (key == pivot.key && equal_left-- > 0)) {
          held += static_cast<double>(context.attention[static_cast<std::size_t>(n)]);
        }
      }
      (held < most ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace restkv
