// SPDX-License-Identifier: Apache-2.0
/// @file
/// `attention_entropy`: a token's part of the entropy of a query's attention.
#pragma once

#include <restkv/score/features.hpp>

#include <cmath>

namespace restkv {

/// score = -a log(a + 1e-10), with a the token's attention: its part of the entropy of the query's attention, which
/// sums over tokens, queries and heads give (CAKE's dispersion, arXiv 2503.12491). Never negative. Cost of a token and
/// query: one logarithm.
struct attention_entropy {
  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    const Real part = -token.attention * std::log(token.attention + static_cast<Real>(1e-10));
    return part > 0 || part != part ? part : Real(0);  // an attention of 1
  }
  ///@}
};

}  // namespace restkv
