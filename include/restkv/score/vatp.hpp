// SPDX-License-Identifier: Apache-2.0
/// @file
/// `vatp`: attention times the size of the value.
#pragma once

#include <restkv/score/features.hpp>

namespace restkv {

/// score = a * ||v||_1, per query of the window (VATP, arXiv 2406.12335, value-aware token pruning). Published with the
/// accumulated attention of H2O and with the attention of the window. Cost: as `snap_kv`, and one read of the values.
struct vatp {
  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::attention | feature::value_norm_l1;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention * token.value_norm_l1;
  }
  ///@}
};

}  // namespace restkv
