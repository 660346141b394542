// SPDX-License-Identifier: Apache-2.0
/// @file
/// `expected_attention`: the attention that queries of a known distribution would pay.
#pragma once

#include <restkv/core/check_view.hpp>
#include <restkv/core/cholesky.hpp>
#include <restkv/core/scratch.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv {

namespace detail {

/// Checks an array that begins with [batch, query_heads, head_dim].
template <std::size_t Rank>
[[nodiscard]] status check_query_array(const char* name, const tensor_view<const double, Rank>& array,
                                       const problem_shape& shape) noexcept {
  const index_t wanted[] = {shape.batch, shape.query_heads, shape.head_dim, shape.head_dim};
  const char* const axes[] = {"sequences", "query heads", "channels", "channels"};
  if (array.data == nullptr) return status::error(errc::missing_input, "%s is missing", name);
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    if (array.extent(axis) == wanted[axis]) continue;
    return status::error(errc::shape_mismatch, "%s has %lld %s, the plan has %lld", name,
                         static_cast<long long>(array.extent(axis)), axes[axis], static_cast<long long>(wanted[axis]));
  }
  return check_view(name, array);
}

}  // namespace detail

/// Expected attention (arXiv 2510.00636). With the mean m and the covariance C of the queries to come (see
/// `query_statistics` and `average_rope`), a token's expected logit is z = m k / sqrt(d) + k^T C k / (2 d); softmax
/// over the tokens behind the first `sink` gives its share s, and the score is (s + epsilon) ||v||. The published
/// policy takes the mean over a group's query heads, and competes between heads with epsilon = 0.01.
///
/// The sinks get the largest score of the others: protect them. A token whose key (or, where it acts, value) is not
/// finite scores NaN and takes no part in the softmax. Ties go to the smaller index. Cost for each query head: one
/// pass over keys and values, d^2 / 2 + 3 d multiply-adds a token, 3 d without covariance; scratch of d^2 + 2 d.
struct expected_attention {
  tensor_view<const double, 3> mean{};        ///< [batch, query_heads, head_dim]; a stride of 0 repeats
  tensor_view<const double, 4> covariance{};  ///< [batch, query_heads, head_dim, head_dim]; read if use_covariance
  index_t sink = 4;                           ///< first tokens, left out of the softmax
  bool use_covariance = true;                 ///< the second term of the logit
  bool use_value_norm = true;                 ///< without it, the score is s
  double epsilon = 0;                         ///< added to the share

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys | cache_part::values;
  static constexpr bool per_query_head = true;

  [[nodiscard]] status check() const noexcept {
    if (sink < 0) {
      return status::error(errc::invalid_argument, "sink of expected_attention is %lld, must be at least 0",
                           static_cast<long long>(sink));
    }
    if (epsilon >= 0 && std::isfinite(epsilon)) return {};
    return status::error(errc::invalid_argument, "epsilon of expected_attention is %g, must be at least 0 and finite",
                         epsilon);
  }

  [[nodiscard]] status check(const problem_shape& shape) const noexcept {
    RESTKV_RETURN_IF_FAILED(detail::check_query_array("mean of expected_attention", mean, shape));
    return use_covariance ? detail::check_query_array("covariance of expected_attention", covariance, shape)
                          : status{};
  }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept {
    return shape.head_dim * (2 + (use_covariance ? shape.head_dim : 0));
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const index_t channels = head.head_dim();
    const index_t length = head.length();
    const index_t sinks = std::min(sink, length);
    scratch_rows<Real> memory(scratch);
    const std::span<Real> row(memory.take(channels), static_cast<std::size_t>(channels));
    Real* const linear = memory.take(channels);
    Real* const quadratic = use_covariance ? memory.take(channels * channels) : nullptr;
    scale(head.batch(), head.query_head(), channels, linear, quadratic);

    Real largest = -std::numeric_limits<Real>::infinity();
    for (index_t n = sinks; n < length; ++n) {
      head.key(n, row);
      Real& logit = scores[static_cast<std::size_t>(n)];
      logit = expected_logit<Real>(row.data(), channels, linear, quadratic);
      largest = logit > largest ? logit : largest;
    }
    double sum = 0;
    for (index_t n = sinks; n < length; ++n) {
      Real& share = scores[static_cast<std::size_t>(n)];
      share = std::exp(share - largest);
      if (share == share) sum += static_cast<double>(share);
    }
    Real most = 0;
    for (index_t n = sinks; n < length; ++n) {
      Real& score = scores[static_cast<std::size_t>(n)];
      const double share = static_cast<double>(score) / sum;
      if (use_value_norm) {
        head.value(n, row);
        const double length_of_value = norm(row.data(), channels);
        score = length_of_value <= std::numeric_limits<double>::max()
                    ? static_cast<Real>((share + epsilon) * length_of_value)
                    : std::numeric_limits<Real>::quiet_NaN();
      } else {
        score = static_cast<Real>(share);
      }
      most = score > most ? score : most;
    }
    std::fill(scores.begin(), scores.begin() + sinks, most);
  }
  ///@}

 private:
  /// m / sqrt(d), and the lower triangle of C / (2 d) with what lies above the diagonal added.
  template <std::floating_point Real>
  void scale(index_t batch, index_t head, index_t channels, Real* linear, Real* quadratic) const noexcept {
    const auto d = static_cast<double>(channels);
    for (index_t r = 0; r < channels; ++r) {
      linear[r] = static_cast<Real>(mean(batch, head, r) / std::sqrt(d));
      if (quadratic == nullptr) continue;
      Real* const row = quadratic + r * channels;
      for (index_t c = 0; c < r; ++c) {
        row[c] = static_cast<Real>((covariance(batch, head, r, c) + covariance(batch, head, c, r)) / (2 * d));
      }
      row[r] = static_cast<Real>(covariance(batch, head, r, r) / (2 * d));
      std::fill(row + r + 1, row + channels, Real(0));
    }
  }

  /// NaN for a key that is not finite; a logit beyond the range of Real is the range's end.
  template <std::floating_point Real>
  [[nodiscard]] static Real expected_logit(const Real* key, index_t channels, const Real* linear,
                                           const Real* quadratic) noexcept {
    Real logit = dot(key, linear, channels);
    for (index_t r = 0; quadratic != nullptr && r < channels; ++r) {
      logit += key[r] * dot(key, quadratic + r * channels, detail::lower_row_end(r, channels));
    }
    constexpr Real most = std::numeric_limits<Real>::max();
    if (logit >= -most && logit <= most) return logit;
    if (!all_finite(key, channels)) return std::numeric_limits<Real>::quiet_NaN();
    double wide = 0;
    for (index_t r = 0; r < channels; ++r) {
      double factor = static_cast<double>(linear[r]);
      for (index_t c = 0; quadratic != nullptr && c <= r; ++c) {
        factor += static_cast<double>(quadratic[r * channels + c]) * static_cast<double>(key[c]);
      }
      wide += static_cast<double>(key[r]) * factor;
    }
    if (wide != wide) wide = 0;
    return static_cast<Real>(std::clamp(wide, -static_cast<double>(most), static_cast<double>(most)));
  }
};

}  // namespace restkv
