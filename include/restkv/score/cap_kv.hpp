// SPDX-License-Identifier: Apache-2.0
/// @file
/// `cap_kv`: tokens whose value the other values, weighted by what queries look for, cannot explain.
#pragma once

#include <restkv/core/cholesky.hpp>
#include <restkv/core/scratch.hpp>
#include <restkv/score/expected_attention.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv {

/// CapKV (arXiv 2604.25975). With the mean q of the queries to come (see `query_statistics` and `average_rope`) and
/// the weights w[n] = exp(tau (c[n] - max c)), c = cos(q, k), over the tokens behind the first `sink`: the score is
/// w v^T (I + sum_m w[m] v[m] v[m]^T)^-1 v, in [0, 1). Without `cosine` c = q k, as the paper writes it; its release
/// takes the cosine. The published policy takes the mean over a group's query heads.
///
/// The sinks get the largest score of the others: protect them. A key of 0 has the cosine 0. A token whose key or value
/// is not finite scores NaN and takes no part in the sum. Ties go to the smaller index. Cost for each query head: one
/// pass over the keys and two over the values, d^2 + d multiply-adds a token, in double; scratch of 2 d^2 + 10 d
/// elements.
struct cap_kv {
  tensor_view<const double, 3> mean{};  ///< q. [batch, query_heads, head_dim]; a stride of 0 repeats
  double tau = 5;                       ///< sharpness of the weights
  index_t sink = 4;                     ///< first tokens, left out of the sum
  bool cosine = true;                   ///< directions of queries and keys only

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys | cache_part::values;
  static constexpr bool per_query_head = true;

  [[nodiscard]] status check() const noexcept {
    if (sink < 0) {
      return status::error(errc::invalid_argument, "sink of cap_kv is %lld, must be at least 0",
                           static_cast<long long>(sink));
    }
    if (tau >= 0 && std::isfinite(tau)) return {};
    return status::error(errc::invalid_argument, "tau of cap_kv is %g, must be at least 0 and finite", tau);
  }

  [[nodiscard]] status check(const problem_shape& shape) const noexcept {
    return detail::check_query_array("mean of cap_kv", mean, shape);
  }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept {
    return 2 * shape.head_dim + scratch_of_doubles(shape.head_dim * shape.head_dim) +
           scratch_of_doubles(outer_product_sum::row_elements(shape.head_dim));
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const index_t channels = head.head_dim();
    const index_t length = head.length();
    const index_t sinks = std::min(sink, length);
    scratch_rows<Real> memory(scratch);
    double* const matrix = memory.take_doubles(channels * channels);
    double* const gathered = memory.take_doubles(outer_product_sum::row_elements(channels));
    Real* const query = memory.take(channels);
    const std::span<Real> row(memory.take(channels), static_cast<std::size_t>(channels));

    double* const wide = gathered;
    for (index_t c = 0; c < channels; ++c) wide[c] = mean(head.batch(), head.query_head(), c);
    const double scale = cosine ? norm(wide, channels) : 1;
    for (index_t c = 0; c < channels; ++c) query[c] = static_cast<Real>(scale > 0 ? wide[c] / scale : 0);

    constexpr Real most = std::numeric_limits<Real>::max();
    Real largest = -most;
    for (index_t n = sinks; n < length; ++n) {
      head.key(n, row);
      Real& alignment = scores[static_cast<std::size_t>(n)];
      alignment = align(row.data(), query, channels);
      largest = alignment > largest ? alignment : largest;
    }
    std::fill(matrix, matrix + channels * channels, 0.0);
    for (index_t i = 0; i < channels; ++i) matrix[i * channels + i] = 1;
    outer_product_sum sum(matrix, gathered, channels);
    for (index_t n = sinks; n < length; ++n) {
      Real& weight = scores[static_cast<std::size_t>(n)];
      // Halves, so that the difference stays in range.
      const Real below = weight / 2 - largest / 2;
      weight = std::exp(static_cast<Real>(tau * 2 * static_cast<double>(below)));
      if (weight != weight) continue;
      head.value(n, row);
      const double root = std::sqrt(static_cast<double>(weight));
      double* const x = sum.next();
      for (index_t c = 0; c < channels; ++c) x[c] = root * static_cast<double>(row[static_cast<std::size_t>(c)]);
      if (all_finite(row.data(), channels)) {
        sum.add();
      } else {
        weight = std::numeric_limits<Real>::quiet_NaN();
      }
    }
    sum.finish();
    cholesky_factor(matrix, channels, 1);
    invert_lower(matrix, channels, gathered);
    Real best = 0;
    for (index_t n = sinks; n < length; ++n) {
      Real& score = scores[static_cast<std::size_t>(n)];
      if (score != score) continue;
      head.value(n, row);
      for (index_t c = 0; c < channels; ++c) wide[c] = static_cast<double>(row[static_cast<std::size_t>(c)]);
      score = static_cast<Real>(static_cast<double>(score) * inverse_quadratic(matrix, wide, channels));
      best = score > best ? score : best;
    }
    std::fill(scores.begin(), scores.begin() + sinks, best);
  }
  ///@}

 private:
  /// NaN for a key that is not finite.
  template <std::floating_point Real>
  [[nodiscard]] Real align(const Real* key, const Real* query, index_t channels) const noexcept {
    constexpr auto most = static_cast<double>(std::numeric_limits<Real>::max());
    auto product = static_cast<double>(dot(key, query, channels));
    if (!(product >= -most && product <= most)) {
      if (!all_finite(key, channels)) return std::numeric_limits<Real>::quiet_NaN();
      product = 0;
      for (index_t c = 0; c < channels; ++c) product += static_cast<double>(key[c]) * static_cast<double>(query[c]);
    }
    if (!cosine) return static_cast<Real>(std::clamp(product, -most, most));
    const double length = norm(key, channels);
    return length >= static_cast<double>(std::numeric_limits<Real>::min()) ? static_cast<Real>(product / length)
                                                                           : Real(0);
  }
};

}  // namespace restkv
