// SPDX-License-Identifier: Apache-2.0
/// @file
/// Temporal smoothing: from one row per window query to one row. The concept, and its models.
#pragma once

#include <restkv/core/larger.hpp>
#include <restkv/core/status.hpp>

#include <cmath>
#include <concepts>
#include <span>

namespace restkv {

namespace detail {

template <class S, class Real>
concept reduces_rows = requires(const S& smoother, std::span<const Real> rows) {
  { smoother(rows) } -> std::convertible_to<Real>;
};

}  // namespace detail

/// A temporal smoother: a const call operator that takes the values of one token under the window's queries, oldest
/// first, and returns one value. A *linear* one also has `weight(i, count)`: the weight of row i of `count`; backends
/// then fold the reduction into the attention and never store the rows. One that never falls when a row grows says
/// `static constexpr bool monotone = true`; certified pruning needs that.
template <class S>
concept temporal_smoother = detail::reduces_rows<S, float> && detail::reduces_rows<S, double>;

template <class S>
concept linear_temporal_smoother = temporal_smoother<S> && requires(const S& smoother, int i) {
  { smoother.weight(i, i) } -> std::convertible_to<double>;
};

/// True where the smoother is a weighted sum: by its type, or by a member `linear()` where that is known at run time only.
template <temporal_smoother S>
[[nodiscard]] constexpr bool is_linear(const S& smoother) noexcept {
  if constexpr (requires { { smoother.linear() } -> std::convertible_to<bool>; }) return smoother.linear();
  return linear_temporal_smoother<S>;
}

/// False for a smoother that does not move with its rows, S(x + c) != S(x) + c: what it makes of attention rows is no
/// attention, so `query_order::after` does not go with it. Said by a member `averages()`.
template <temporal_smoother S>
[[nodiscard]] constexpr bool is_average(const S& smoother) noexcept {
  if constexpr (requires { { smoother.averages() } -> std::convertible_to<bool>; }) return smoother.averages();
  return true;
}

/// A temporal smoother that takes the rows one by one, whatever their number: a linear one, or one whose
/// `fold(running, value, first)` gives the value of the rows so far from the value before and the next row. Windows as
/// long as the prompt need that.
template <class S>
concept streaming_temporal_smoother =
    linear_temporal_smoother<S> || (temporal_smoother<S> && requires(const S& smoother, float value) {
      { smoother.fold(value, value, true) } -> std::convertible_to<float>;
    });

template <class S>
concept monotone_temporal_smoother = temporal_smoother<S> && requires { requires bool(S::monotone); };

namespace detail {

/// The sum of weight(i) * row(i), oldest first.
template <class S, std::floating_point Real>
[[nodiscard]] RESTKV_HD constexpr Real weighted_rows(const S& smoother, std::span<const Real> rows) noexcept {
  Real sum = 0;
  const int count = static_cast<int>(rows.size());
  for (int i = 0; i < count; ++i) sum += static_cast<Real>(smoother.weight(i, count)) * rows[static_cast<std::size_t>(i)];
  return sum;
}

}  // namespace detail

/// The mean over the window's queries.
struct mean {
  ///@{
  /// See `linear_temporal_smoother`.
  static constexpr bool monotone = true;

  [[nodiscard]] RESTKV_HD constexpr double weight(int, int count) const noexcept { return 1.0 / count; }
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD constexpr Real operator()(std::span<const Real> rows) const noexcept {
    return detail::weighted_rows(*this, rows);
  }
  ///@}
};

/// The sum over the window's queries: the mean up to a factor, so it keeps the same tokens (SnapKV's release).
struct sum {
  ///@{
  /// See `linear_temporal_smoother`.
  static constexpr bool monotone = true;

  [[nodiscard]] constexpr bool averages() const noexcept { return false; }
  [[nodiscard]] RESTKV_HD constexpr double weight(int, int) const noexcept { return 1.0; }
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD constexpr Real operator()(std::span<const Real> rows) const noexcept {
    return detail::weighted_rows(*this, rows);
  }
  ///@}
};

/// Exponential moving average, oldest to newest: acc = row 0; acc = alpha * row + (1 - alpha) * acc (ReST-KV, section
/// on temporal smoothing). alpha = 0.3 puts 94 % of the weight on the newest 8 rows.
struct ema {
  float alpha = 0.3f;  ///< weight of the newest row, in (0, 1]

  ///@{
  /// See `linear_temporal_smoother`.
  static constexpr bool monotone = true;

  [[nodiscard]] RESTKV_HD double weight(int i, int count) const noexcept {
    const double decay = 1.0 - static_cast<double>(alpha);
    return std::pow(decay, count - 1 - i) * (i == 0 ? 1.0 : static_cast<double>(alpha));
  }
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(std::span<const Real> rows) const noexcept {
    return detail::weighted_rows(*this, rows);
  }
  ///@}
  /// Fails on an alpha outside (0, 1].
  [[nodiscard]] status check() const noexcept {
    if (!(alpha > 0.0f && alpha <= 1.0f)) {
      return status::error(errc::invalid_argument, "ema.alpha is %g, must be above 0 and at most 1", double{alpha});
    }
    return {};
  }
};

/// The newest query alone.
struct last {
  ///@{
  /// See `linear_temporal_smoother`.
  static constexpr bool monotone = true;

  [[nodiscard]] RESTKV_HD constexpr double weight(int i, int count) const noexcept { return i + 1 == count ? 1.0 : 0.0; }
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD constexpr Real operator()(std::span<const Real> rows) const noexcept {
    return rows.empty() ? Real(0) : rows.back();
  }
  ///@}
};

/// The largest value over the window's queries; NaN if any is NaN. Not linear.
struct maximum {
  ///@{
  /// See `monotone_temporal_smoother` and `streaming_temporal_smoother`.
  static constexpr bool monotone = true;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD constexpr Real fold(Real running, Real value, bool first) const noexcept {
    return first ? value : detail::larger(running, value);
  }
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD constexpr Real operator()(std::span<const Real> rows) const noexcept {
    Real largest = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) largest = fold(largest, rows[i], i == 0);
    return largest;
  }
  ///@}
};

/// The root of the sum of squares over the window's queries, ||row||_2 (LaProx, arXiv 2605.07234). Not linear.
struct root_sum_square {
  ///@{
  /// See `monotone_temporal_smoother` and `streaming_temporal_smoother`; it grows with rows that are not negative.
  static constexpr bool monotone = true;

  [[nodiscard]] constexpr bool averages() const noexcept { return false; }

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real fold(Real running, Real value, bool first) const noexcept {
    const double before = first ? 0.0 : static_cast<double>(running);
    return static_cast<Real>(std::sqrt(before * before + static_cast<double>(value) * static_cast<double>(value)));
  }
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(std::span<const Real> rows) const noexcept {
    double squares = 0;  // in double, where no square of a float overflows or underflows
    for (const Real value : rows) squares += static_cast<double>(value) * static_cast<double>(value);
    return static_cast<Real>(std::sqrt(squares));
  }
  ///@}
};

}  // namespace restkv
