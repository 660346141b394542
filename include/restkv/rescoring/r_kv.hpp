// SPDX-License-Identifier: Apache-2.0
/// @file
/// `r_kv`: attention less redundancy.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/rescoring/rescoring.hpp>
#include <restkv/score/key_redundancy.hpp>

namespace restkv {

/// score = lambda * s - (1 - lambda) * redundancy (R-KV, arXiv 2505.24133), s any score, there the window's attention pooled
/// by maximum; redundancy as `key_redundancy` measures it. Both are shares, so scores that add up to something else are
/// first divided by their sum over the row where `normalise` says so. Made for long generations that repeat themselves.
/// Cost of a row: that of `key_redundancy`.
struct r_kv {
  float lambda = 0.1f;      ///< weight of the score, in [0, 1]
  bool normalise = false;   ///< divide the scores by their sum
  key_redundancy weight{};  ///< minus the redundancy

  ///@{
  /// See `rescorer`.
  template <element T, std::floating_point Real>
  void rescore(const head_view<T>&, const rescoring_context<Real>& context, std::span<Real> scores,
               std::span<Real>) const noexcept {
    double sum = 0;
    for (const Real score : scores) sum += score == score ? static_cast<double>(score) : 0.0;
    const auto scale = static_cast<Real>(static_cast<double>(lambda) / (normalise && sum > 0 ? sum : 1.0));
    const auto rest = static_cast<Real>(1.0 - static_cast<double>(lambda));
    for (std::size_t n = 0; n < scores.size(); ++n) scores[n] = scale * scores[n] + rest * context.weights[n];
  }
  ///@}

  /// Fails on a lambda outside [0, 1].
  [[nodiscard]] status check() const noexcept {
    if (!(lambda >= 0.0f && lambda <= 1.0f)) {
      return status::error(errc::invalid_argument, "r_kv.lambda is %g, must be within [0, 1]", double{lambda});
    }
    return weight.check();
  }
};

}  // namespace restkv
