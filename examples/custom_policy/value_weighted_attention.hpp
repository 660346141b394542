// SPDX-License-Identifier: Apache-2.0
/// @file
/// A policy of one's own: a new score, and the library's parts around it.
#pragma once

#include <restkv/policy.hpp>

//! [custom_policy]
/// score = a * ||W v||: what a token adds to the output, as long as the others do not answer for it.
struct value_weighted_attention {
  restkv::metric metric_of_distance = restkv::metric::projection;

  static constexpr restkv::feature needs = restkv::feature::attention | restkv::feature::value_norm;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const restkv::token_features<Real>& token) const noexcept {
    return token.attention * token.value_norm;
  }
};

inline constexpr auto my_policy = [](restkv::budget_size budget) {
  return restkv::eviction_policy{.score = value_weighted_attention{},
                                 .temporal = restkv::ema{.alpha = 0.3f},
                                 .spatial = restkv::average_pool{.width = 5},
                                 .group = restkv::group_reduce::l2,
                                 .budget = restkv::ada_kv{.budget = budget}};
};
//! [custom_policy]
