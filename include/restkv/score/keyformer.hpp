// SPDX-License-Identifier: Apache-2.0
/// @file
/// `keyformer`: accumulated attention of logits with noise, under a temperature.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/score/features.hpp>

namespace restkv {

/// score = softmax((z + g) / temperature)[n], per query that sees the token, g a standard Gumbel number for each query and
/// token (Keyformer, arXiv 2403.09054). With `every_query` and the temporal smoother `sum` it is accumulated as H2O's.
/// Published: temperature 1 for the prompt, rising to 2 while tokens are generated; 60 % of the prompt is kept, 30 % of
/// that by recency. The noise is a function of (seed, sequence, query head, query, token). Cost: as `observed_attention`,
/// and two logarithms a logit.
struct keyformer {
  float temperature = 1.0f;  ///< > 0
  std::uint64_t seed = 0;    ///< another seed draws other noise

  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention;
  static constexpr bool scores_window = true;

  [[nodiscard]] constexpr logit_perturbation perturbation() const noexcept {
    return {.temperature = temperature, .gumbel = true, .seed = seed};
  }
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention;
  }
  ///@}

  /// Fails on a temperature that is not above 0.
  [[nodiscard]] status check() const noexcept {
    if (!(temperature > 0.0f) || !(temperature <= 1e6f)) {
      return status::error(errc::invalid_argument, "keyformer.temperature is %g, must be above 0 and at most 1e6",
                           double{temperature});
    }
    return {};
  }
};

}  // namespace restkv
