// SPDX-License-Identifier: Apache-2.0
/// @file
/// `caote_rescoring`: the deletion error, with any score in the place of attention.
#pragma once

#include <restkv/rescoring/rescoring.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv {

/// What the deletion error is measured against.
enum class caote_output {
  weighted,  ///< o = sum of alpha_n v_n (CAOTE)
  mean,      ///< the mean value (FastCAOTE)
};

/// With alpha = s / sum of s over the row: score = alpha / (1 - alpha) * ||o - v||_2 (CAOTE as a meta-policy over H2O, TOVA
/// or SnapKV, arXiv 2504.14051). Scores that are negative or not numbers count as 0 and stay last. A row without a
/// positive score stays as it is. 1 - alpha is the sum of the others, so no score is infinite.
/// Cost of a row: two reads of the values.
struct caote_rescoring {
  caote_output output = caote_output::weighted;  ///< see caote_output

  ///@{
  /// See `rescorer`.
  static constexpr cache_part reads = cache_part::values;

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept { return 2 * shape.head_dim; }

  template <element T, std::floating_point Real>
  void rescore(const head_view<T>& head, const rescoring_context<Real>&, std::span<Real> scores,
               std::span<Real> scratch) const noexcept {
    const auto channels = static_cast<std::size_t>(head.head_dim());
    const std::span<Real> out = scratch.first(channels);
    const std::span<Real> value = scratch.subspan(channels, channels);
    const auto weight_of = [&](std::size_t n) {
      const Real score = scores[n];
      return score > 0 ? std::min(score, std::numeric_limits<Real>::max()) : Real(0);
    };
    double sum = 0;
    std::size_t top = 0;
    for (std::size_t n = 0; n < scores.size(); ++n) {
      sum += static_cast<double>(weight_of(n));
      top = weight_of(n) > weight_of(top) ? n : top;
    }
    if (!(sum > 0)) return;
    double others = 0;  // without the top score, where sum - s would cancel
    for (std::size_t n = 0; n < scores.size(); ++n) others += n == top ? 0.0 : static_cast<double>(weight_of(n));
    std::fill(out.begin(), out.end(), Real(0));
    for (std::size_t n = 0; n < scores.size(); ++n) {
      const double share = output == caote_output::mean ? 1.0 / static_cast<double>(scores.size())
                                                        : static_cast<double>(weight_of(n)) / sum;
      if (share == 0.0) continue;
      head.value(static_cast<index_t>(n), value);
      for (std::size_t c = 0; c < channels; ++c) out[c] += static_cast<Real>(share) * value[c];
    }
    constexpr auto most = static_cast<double>(std::numeric_limits<Real>::max());
    for (std::size_t n = 0; n < scores.size(); ++n) {
      if (scores[n] != scores[n]) continue;
      head.value(static_cast<index_t>(n), value);
      double squares = 0;
      for (std::size_t c = 0; c < channels; ++c) {
        const double difference = static_cast<double>(out[c]) - static_cast<double>(value[c]);
        squares += difference * difference;
      }
      const double weight = static_cast<double>(weight_of(n));
      const double rest = std::max(n == top ? others : sum - weight, sum * least_rest);
      scores[n] = static_cast<Real>(std::min(weight / rest * std::sqrt(squares), most));
    }
  }
  ///@}
};

}  // namespace restkv
