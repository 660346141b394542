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

/// Means over a wide window with replicated ends, in one pass whatever the width: a running sum in double over the
/// finite values, with the others counted apart, so that a NaN leaves the sum again when it leaves the window.
template <std::floating_point Real>
void sliding_mean(std::span<const Real> in, std::span<Real> out, token_reach window) noexcept {
  const auto length = static_cast<index_t>(in.size());
  if (length == 0) return;
  const double tokens = static_cast<double>(window.last - window.first + 1);
  double sum = 0;
  index_t unusable = 0;
  const auto add = [&](index_t n, double times) {
    const auto value = static_cast<double>(in[static_cast<std::size_t>(std::clamp<index_t>(n, 0, length - 1))]);
    if (std::isfinite(value)) {
      sum += times * value;
    } else {
      unusable += static_cast<index_t>(times);
    }
  };
  // The first window [first, last], its repeats of the two ends counted instead of visited.
  const index_t before = std::clamp<index_t>(-window.first, 0, window.last - window.first + 1);
  const index_t behind = std::clamp<index_t>(window.last - (length - 1), 0, window.last - window.first + 1);
  if (before > 0) add(0, static_cast<double>(before));
  if (behind > 0) add(length - 1, static_cast<double>(behind));
  for (index_t n = std::max<index_t>(window.first, 0); n <= std::min(window.last, length - 1); ++n) add(n, 1.0);
  for (index_t n = 0; n < length; ++n) {
    out[static_cast<std::size_t>(n)] =
        unusable != 0 ? std::numeric_limits<Real>::quiet_NaN() : static_cast<Real>(sum / tokens);
    add(n + window.first, -1.0);
    add(n + window.last + 1, 1.0);
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
/// pass over the row for each token of the width up to 129, one pass in all beyond.
struct adaptive_window {
  int min_width = 5;      ///< tokens, odd; 21 was published for RULER and InfiniteBench
  float scale = 2000.0f;  ///< tokens of drift per step of width and shift, > 0
  drift_shift shift_rule = drift_shift::released;

  static constexpr bool needs_drift = true;

  [[nodiscard]] index_t width(double drift) const noexcept {
    const double steps = std::floor(std::fabs(finite(drift)) / static_cast<double>(scale));
    return std::max<index_t>(min_width, 2 * static_cast<index_t>(std::min(steps, 1e9)) + 1);
  }

  [[nodiscard]] index_t shift(double drift) const noexcept {
    const double steps = std::clamp(finite(drift) / static_cast<double>(scale), -1e9, 1e9);
    if (shift_rule == drift_shift::centred) return static_cast<index_t>(std::trunc(steps));
    const auto floored = static_cast<index_t>(std::floor(steps));
    return steps > 0 ? floored : floored + 1;
  }

  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const row_context& row) const noexcept {
    const auto length = static_cast<index_t>(in.size());
    const token_reach window = reach(row);
    const index_t tokens = window.last - window.first + 1;
    if (tokens > widest_direct || window.first >= length || window.last <= -length) {
      detail::sliding_mean(in, out, window);
    } else {
      detail::shifted_row_sum(in, out, window, Real(1) / static_cast<Real>(tokens), true);
    }
  }

  /// The tokens out[n] depends on. Wide windows slide, which makes an output's rounding depend on its neighbours.
  [[nodiscard]] token_reach reach(const row_context& row) const noexcept {
    const index_t half = width(row.drift) / 2;
    const index_t centre = shift(row.drift);
    return {centre - half, centre + half};
  }

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
  [[nodiscard]] static double finite(double drift) noexcept { return std::isfinite(drift) ? drift : 0.0; }

  /// Up to this many tokens a window is summed directly, neighbour by neighbour; wider ones slide.
  static constexpr index_t widest_direct = 129;
};

}  // namespace restkv
