// SPDX-License-Identifier: Apache-2.0
/// @file
/// `value_norm`: the size of a value, by itself or through the output projection.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// Which size of a value is meant.
enum class value_size {
  l1,            ///< the sum of |v[c]|
  l2,            ///< ||v||_2
  projected_l1,  ///< ||W[h] v||_1; needs layer.projection, costs hidden * d multiply-adds a token and query head
  projected_l2,  ///< ||W[h] v||_2; needs layer.metric, costs d^2
};

/// score = the size of the value. Needs no queries: the weight of rescorers (`critical_kv`), and the value half of others.
template <value_size Size = value_size::l2>
struct value_norm {
  restkv::metric metric_of_distance =
      Size == value_size::projected_l2 ? restkv::metric::projection : restkv::metric::identity;  ///< as Size says

  ///@{
  /// See `token_score`.
  static constexpr feature needs = Size == value_size::l1             ? feature::value_norm_l1
                                   : Size == value_size::projected_l1 ? feature::projected_norm_l1
                                                                      : feature::value_norm;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    if constexpr (Size == value_size::l1) return token.value_norm_l1;
    if constexpr (Size == value_size::projected_l1) return token.projected_norm_l1;
    return token.value_norm;
  }
  ///@}
};

}  // namespace restkv
