// SPDX-License-Identifier: Apache-2.0
/// @file
/// `variance` and `mean_variance`: how much a token's value moves from query to query.
#pragma once

#include <restkv/core/status.hpp>

#include <cmath>
#include <concepts>
#include <span>

namespace restkv {

namespace detail {

/// Mean and sum of squared deviations of rows, one row after the other (Welford), in double.
struct row_moments {
  double mean = 0;
  double deviations = 0;
  std::size_t count = 0;

  template <std::floating_point Real>
  RESTKV_HD explicit row_moments(std::span<const Real> rows) noexcept : count(rows.size()) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const double change = static_cast<double>(rows[i]) - mean;
      mean += change / static_cast<double>(i + 1);
      deviations += change * (static_cast<double>(rows[i]) - mean);
    }
  }
  /// Unbiased; 0 of a single row.
  [[nodiscard]] RESTKV_HD double variance() const noexcept {
    return count > 1 ? deviations / static_cast<double>(count - 1) : 0.0;
  }
};

}  // namespace detail

/// The unbiased variance over the window's queries, 1 / (w - 1) times the sum of squared deviations from the mean; 0
/// where only one query sees the token. Not linear. Cost: three operations in double for each row.
struct variance {
  ///@{
  /// See `temporal_smoother`.
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(std::span<const Real> rows) const noexcept {
    return static_cast<Real>(detail::row_moments(rows).variance());
  }
  ///@}
};

/// The mean and gamma times the unbiased variance over the window's queries: with attention as the score CAKE's
/// indicator (arXiv 2503.12491), which keeps tokens whose importance comes and goes. Not linear.
struct mean_variance {
  float gamma = 200.0f;  ///< weight of the variance, >= 0

  ///@{
  /// See `temporal_smoother`.
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(std::span<const Real> rows) const noexcept {
    const detail::row_moments moments(rows);
    return static_cast<Real>(moments.mean + static_cast<double>(gamma) * moments.variance());
  }
  ///@}
  /// Fails on a gamma that is negative or not finite.
  [[nodiscard]] status check() const noexcept {
    if (!(gamma >= 0.0f) || !std::isfinite(gamma)) {
      return status::error(errc::invalid_argument, "mean_variance.gamma is %g, must be at least 0", double{gamma});
    }
    return {};
  }
};

}  // namespace restkv
