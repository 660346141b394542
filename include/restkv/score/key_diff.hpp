// SPDX-License-Identifier: Apache-2.0
/// @file
/// `key_diff`: tokens whose key points away from the others.
#pragma once

#include <restkv/core/scratch.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>

namespace restkv {

/// score = -cos(k, m) with m the mean of the head's unit keys k / ||k|| (KeyDiff, arXiv 2504.15364).
///
/// A key of 0 has no direction: its cosine is 0. A key that is not finite scores NaN and takes no part in the mean.
/// Cost: two passes over the keys, 8 d operations a token; scratch of 4 rows. The mean is summed in double.
struct key_diff {
  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys;

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept {
    return scratch_of_doubles(shape.head_dim) + 2 * shape.head_dim;
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const index_t channels = head.head_dim();
    const auto size = static_cast<std::size_t>(channels);
    scratch_rows<Real> room(scratch);
    double* const mean = room.take_doubles(channels);
    Real* const direction = room.take(channels);
    Real* const key = room.take(channels);
    for (index_t c = 0; c < channels; ++c) mean[c] = 0;
    for (index_t n = 0; n < head.length(); ++n) {
      head.key(n, std::span(key, size));
      const double inverse = inverse_norm(key, channels);
      scores[static_cast<std::size_t>(n)] = static_cast<Real>(inverse);  // the second pass needs it
      if (!(inverse > 0)) continue;
      for (index_t c = 0; c < channels; ++c) mean[c] += static_cast<double>(key[c]) * inverse;
    }
    const double length_of_mean = norm(mean, channels);
    for (index_t c = 0; c < channels; ++c) {
      direction[c] = length_of_mean > 0 ? static_cast<Real>(mean[c] / length_of_mean) : Real(0);
    }
    for (index_t n = 0; n < head.length(); ++n) {
      Real& score = scores[static_cast<std::size_t>(n)];
      if (!(score > 0)) continue;
      head.key(n, std::span(key, size));
      for (index_t c = 0; c < channels; ++c) key[c] *= score;
      score = -dot(key, direction, channels);
    }
  }
  ///@}
};

}  // namespace restkv
