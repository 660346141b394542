// SPDX-License-Identifier: Apache-2.0
// Scores of a user's own, by which backends are compared.
#pragma once

#include <restkv/score/features.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>

namespace restkv_test {

using restkv::feature;
using restkv::logit_perturbation;
using restkv::query_order;
using restkv::token_features;

/// A score of a user's own that reads every feature.
struct all_features {
  query_order order = query_order::before;
  restkv::metric metric_of_distance = restkv::metric::identity;

  static constexpr feature needs = feature::attention | feature::odds | feature::distance | feature::output_norm |
                                   feature::value_norm | feature::key_norm | feature::alignment |
                                   feature::value_norm_l1 | feature::mean_distance;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention * (token.value_norm + token.value_norm_l1 + std::fabs(token.alignment)) +
           token.odds * (token.distance + token.mean_distance) / (Real(1) + token.output_norm) +
           Real(1e-3) * token.key_norm / (Real(1) + static_cast<Real>(token.length - token.position));
  }
};

/// One that is defined for the tokens of the window too, by the queries that see them, with noise in some cases.
struct seen_tokens {
  logit_perturbation noise{};

  static constexpr feature needs = feature::attention | feature::odds | feature::logit;
  static constexpr bool scores_window = true;

  [[nodiscard]] logit_perturbation perturbation() const noexcept { return noise; }
  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention + std::min(token.odds, Real(2)) / (Real(1) + token.logit * token.logit);
  }
};

}  // namespace restkv_test
