// SPDX-License-Identifier: Apache-2.0
/// @file
/// `key_redundancy`: tokens whose key resembles many others, as R-KV measures it.
#pragma once

#include <restkv/core/scratch.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv {

/// The redundancy half of R-KV (arXiv 2505.24133), negative because larger is kept. With S[i, j] the cosine of keys i
/// and j, S[i, i] = 0, and S[i, j] = 0 too for the `recent` latest tokens j of those with S[i, j] > threshold: token
/// j's redundancy is the mean of S[i, j] over i, softmax over the tokens makes shares of it, and the score is minus the
/// share. The latest of a set of similar keys thus counts as the one to keep. R-KV ranks by
/// lambda * attention - (1 - lambda) * redundancy, lambda = 0.1: add `lambda * attention` to (1 - lambda) times this.
///
/// A key of 0 has cosine 0 with every key. A key that is not finite scores NaN and takes no part. Ties go to the
/// smaller index. Cost: d multiply-adds for each pair of tokens that is looked at. Token i looks at the others from
/// the last one backwards until `recent` similar ones are found, so a head without similar keys costs length^2 d: made
/// for the some thousand tokens of a cache while decoding. With recent = 0 no pair is looked at: 3 passes over the
/// keys. Scratch of 64 d + 6 d + 4 elements a token.
struct key_redundancy {
  double threshold = 0.5;  ///< cosine above which two keys are similar
  index_t recent = 1;      ///< latest similar tokens that are not held against themselves

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys;

  [[nodiscard]] status check() const noexcept {
    if (recent < 0) {
      return status::error(errc::invalid_argument, "recent of key_redundancy is %lld, must be at least 0",
                           static_cast<long long>(recent));
    }
    if (threshold >= -1 && threshold <= 1) return {};
    return status::error(errc::invalid_argument, "threshold of key_redundancy is %g, must be within [-1, 1]",
                         threshold);
  }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept {
    return scratch_of_doubles(shape.head_dim) + scratch_of_doubles(shape.tokens) + (block + 1) * shape.head_dim +
           2 * shape.tokens;
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const index_t channels = head.head_dim();
    const index_t length = head.length();
    scratch_rows<Real> memory(scratch);
    double* const sum_of_units = memory.take_doubles(channels);
    double* const redundancy = memory.take_doubles(length);
    Real* const later = memory.take(block * channels);
    Real* const key = memory.take(channels);
    Real* const inverse = memory.take(length);  // 1 / ||k||, 0 without a direction, NaN for what is not finite
    Real* const missing = memory.take(length);  // similar tokens still to be found

    std::fill(sum_of_units, sum_of_units + channels, 0.0);
    double finite = 0;
    for (index_t n = 0; n < length; ++n) {
      head.key(n, std::span(key, static_cast<std::size_t>(channels)));
      inverse[n] = static_cast<Real>(inverse_norm(key, channels));
      missing[n] = inverse[n] == inverse[n] ? static_cast<Real>(recent) : Real(0);
      if (inverse[n] != inverse[n]) continue;
      ++finite;
      for (index_t c = 0; c < channels; ++c) {
        sum_of_units[c] += static_cast<double>(key[c]) * static_cast<double>(inverse[n]);
      }
    }
    // The sum of a column of S, without the diagonal.
    for (index_t n = 0; n < length; ++n) {
      redundancy[n] = 0;
      if (inverse[n] != inverse[n] || inverse[n] == 0) continue;
      unit(head, n, inverse[n], key);
      redundancy[n] = detail::sum_in_lanes<double>(channels, [&](index_t c) {
        const auto x = static_cast<double>(key[c]);
        return x * (sum_of_units[c] - x);
      });
    }
    for (index_t last = recent == 0 ? 0 : length; last > 0; last -= std::min(block, last)) {
      const index_t first = std::max<index_t>(last - block, 0);
      for (index_t j = first; j < last; ++j) unit(head, j, inverse[j], later + (j - first) * channels);
      for (index_t i = 0; i < length; ++i) {
        if (missing[i] == 0 || inverse[i] == 0) continue;
        unit(head, i, inverse[i], key);
        for (index_t j = last - 1; j >= first && missing[i] > 0; --j) {
          if (j == i) continue;
          const Real cosine = dot(key, later + (j - first) * channels, channels);
          if (!(static_cast<double>(cosine) > threshold)) continue;  // NaN is not similar
          redundancy[j] -= static_cast<double>(cosine);
          --missing[i];
        }
      }
    }
    double largest = -std::numeric_limits<double>::infinity();
    for (index_t n = 0; n < length; ++n) {
      if (inverse[n] == inverse[n]) largest = std::max(largest, redundancy[n]);
    }
    double sum = 0;
    for (index_t n = 0; n < length; ++n) {
      redundancy[n] = std::exp((redundancy[n] - largest) / finite);
      if (inverse[n] == inverse[n]) sum += redundancy[n];
    }
    for (index_t n = 0; n < length; ++n) {
      scores[static_cast<std::size_t>(n)] =
          inverse[n] == inverse[n] ? static_cast<Real>(-redundancy[n] / sum) : inverse[n];
    }
  }
  ///@}

 private:
  static constexpr index_t block = 64;  ///< keys that are compared with one at a time

  /// Token n's key, divided by its length.
  template <element T, std::floating_point Real>
  static void unit(const head_view<T>& head, index_t n, Real inverse, Real* out) noexcept {
    head.key(n, std::span(out, static_cast<std::size_t>(head.head_dim())));
    for (index_t c = 0; c < head.head_dim(); ++c) out[c] *= inverse;
  }
};

}  // namespace restkv
