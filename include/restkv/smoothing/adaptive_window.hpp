// SPDX-License-Identifier: Apache-2.0
/// @file
/// `adaptive_window`: ReST-KV's spatial smoothing, whose width and shift follow the drift of attention.
#pragma once

#include <restkv/smoothing/spatial.hpp>

#include <cmath>

namespace restkv {

/// Which of the two shift formulas.
enum class drift_shift {
  released,  ///< floor(t / scale) for t > 0, floor(t / scale) + 1 otherwise: the release's code; t = 0 shifts by one
  centred,   ///< trunc(t / scale): t = 0 does not shift, and t and -t mirror each other
};

namespace detail {

/// Sum of in[clamp(n, 0, size - 1)] for n in [first, last], the repeats of the two ends counted instead of visited.
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD double replicated_sum(std::span<const Real> in, index_t first, index_t last) noexcept {
  const index_t end = static_cast<index_t>(in.size()) - 1;
  const index_t before = std::min<index_t>(last, -1) - first + 1;
  const index_t behind = last - std::max(first, end + 1) + 1;
  double sum = 0;
  if (before > 0) sum += static_cast<double>(before) * static_cast<double>(in.front());
  for (index_t n = std::max<index_t>(first, 0); n <= std::min(last, end); ++n) {
    sum += static_cast<double>(in[static_cast<std::size_t>(n)]);
  }
  if (behind > 0) sum += static_cast<double>(behind) * static_cast<double>(in.back());
  return sum;
}

/// Means over a window with replicated ends, in two passes whatever its width. The row is cut into blocks as wide as
/// the window, so that every window is the end of one block and the beginning of the next; both parts are running sums
/// (van Herk 1992). Nothing is ever subtracted: a huge value leaves no rounding error behind, a NaN stays within its
/// windows, and no mean falls when a value grows.
/// This is block `block` of them.
template <std::floating_point Real>
RESTKV_HD void block_mean(std::span<const Real> in, std::span<Real> out, token_reach window, index_t block) noexcept {
  const auto length = static_cast<index_t>(in.size());
  const index_t width = window.last - window.first + 1;
  const double part = 1.0 / static_cast<double>(width);
  const auto at = [&](index_t n) {
    return static_cast<double>(in[static_cast<std::size_t>(std::clamp<index_t>(n, 0, length - 1))]);
  };
  const index_t begin = block * width;
  const index_t end = std::min(begin + width, length);
  double sum = replicated_sum(in, end + window.first, begin + window.last);
  for (index_t n = end - 1; n >= begin; --n) {
    sum += at(n + window.first);
    out[static_cast<std::size_t>(n)] = static_cast<Real>(sum * part);
  }
  sum = 0;
  for (index_t n = begin + 1; n < end; ++n) {
    sum += at(n + window.last);
    Real& mean = out[static_cast<std::size_t>(n)];
    mean = static_cast<Real>(std::fma(sum, part, static_cast<double>(mean)));
  }
}

}  // namespace detail

/// The mean over a window whose width and position follow the drift t of the head's attention (ReST-KV, arXiv
/// 2605.08840, adaptive window smoothing).
///
///     width k = max(min_width, 2 floor(|t| / scale) + 1)
///     shift s = see drift_shift
///     out[n]  = (1 / k) sum over u = -floor(k/2) .. floor(k/2) of in[clamp(n + s + u, 0, size - 1)]
///
/// t is in tokens: the mean position of the most attended tokens in the newer half of the window's queries less that
/// in the older half, negated (`window_drift` computes it). A drift that is not finite counts as 0. Cost: one
/// pass over the row for each token of the width up to `widest_direct_reach`, two passes in all beyond.
struct adaptive_window {
  int min_width = 5;                               ///< tokens, odd; 21 was published for RULER and InfiniteBench
  float scale = 2000.0f;                           ///< tokens of drift per step of width and shift, > 0
  drift_shift shift_rule = drift_shift::released;  ///< see drift_shift

  static constexpr bool needs_drift = true;  ///< see `spatial_smoother`

  /// k for a drift: odd, at least min_width.
  [[nodiscard]] RESTKV_HD index_t width(double drift) const noexcept {
    const double steps = std::floor(std::fabs(finite(drift)) / static_cast<double>(scale));
    return std::max<index_t>(min_width, 2 * static_cast<index_t>(std::min(steps, 1e9)) + 1);
  }

  /// s for a drift.
  [[nodiscard]] RESTKV_HD index_t shift(double drift) const noexcept {
    const double steps = std::clamp(finite(drift) / static_cast<double>(scale), -1e9, 1e9);
    if (shift_rule == drift_shift::centred) return static_cast<index_t>(std::trunc(steps));
    const auto floored = static_cast<index_t>(std::floor(steps));
    return steps > 0 ? floored : floored + 1;
  }

  /// See `spatial_smoother`.
  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const row_context& row) const noexcept {
    const auto length = static_cast<index_t>(in.size());
    const token_reach window = reach(row);
    if (runs_in_blocks(length, window)) {
      for (index_t block = 0; block < parts(length, row); ++block) detail::block_mean(in, out, window, block);
    } else {
      detail::shifted_row_sum(in, out, window, Real(1) / static_cast<Real>(tokens_of(window)), true);
    }
  }

  ///@{
  /// See `parted_spatial_smoother`.
  [[nodiscard]] RESTKV_HD index_t parts(index_t length, const row_context& row) const noexcept {
    const token_reach window = reach(row);
    if (!runs_in_blocks(length, window)) return length;
    return (length + tokens_of(window) - 1) / tokens_of(window);
  }
  template <std::floating_point Real>
  RESTKV_HD void smooth_part(index_t part, std::span<const Real> in, std::span<Real> out,
                             const row_context& row) const noexcept {
    const token_reach window = reach(row);
    if (runs_in_blocks(static_cast<index_t>(in.size()), window)) {
      detail::block_mean(in, out, window, part);
    } else {
      out[static_cast<std::size_t>(part)] =
          detail::neighbour_sum(in, part, window, true) * (Real(1) / static_cast<Real>(tokens_of(window)));
    }
  }
  ///@}

  /// The tokens out[n] depends on.
  [[nodiscard]] RESTKV_HD token_reach reach(const row_context& row) const noexcept {
    const index_t half = width(row.drift) / 2;
    const index_t centre = shift(row.drift);
    return {centre - half, centre + half};
  }

  /// Fails on a width that is even or below 1 and on a scale that is not above 0.
  [[nodiscard]] status check() const noexcept {
    if (min_width < 1 || min_width % 2 == 0) {
      return status::error(errc::invalid_argument, "adaptive_window.min_width is %d, must be odd and at least 1",
                           min_width);
    }
    if (!(scale > 0.0f) || !std::isfinite(scale)) {
      return status::error(errc::invalid_argument, "adaptive_window.scale is %g, must be above 0", double{scale});
    }
    return {};
  }

 private:
  [[nodiscard]] RESTKV_HD static constexpr index_t tokens_of(const token_reach& window) noexcept {
    return window.last - window.first + 1;
  }
  [[nodiscard]] RESTKV_HD static constexpr bool runs_in_blocks(index_t length, const token_reach& window) noexcept {
    return tokens_of(window) > widest_direct_reach || window.first >= length || window.last <= -length;
  }
  [[nodiscard]] RESTKV_HD static double finite(double drift) noexcept { return std::isfinite(drift) ? drift : 0.0; }
};

}  // namespace restkv
