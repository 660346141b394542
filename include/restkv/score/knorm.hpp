// SPDX-License-Identifier: Apache-2.0
/// @file
/// `knorm`: tokens with short keys.
#pragma once

#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>

namespace restkv {

/// score = -||k||_2: keys with a small norm tend to get much attention (Devoto et al., arXiv 2406.11430). The
/// publication leaves the first two layers of a model alone.
///
/// A key with an infinity scores -inf, with a NaN NaN; neither touches other tokens. Cost: one pass over the keys, 2 d
/// operations a token; scratch of one row.
struct knorm {
  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys;

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept { return shape.head_dim; }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const std::span<Real> key = scratch.first(static_cast<std::size_t>(head.head_dim()));
    for (index_t n = 0; n < head.length(); ++n) {
      head.key(n, key);
      scores[static_cast<std::size_t>(n)] = static_cast<Real>(-norm(key.data(), head.head_dim()));
    }
  }
  ///@}
};

}  // namespace restkv
