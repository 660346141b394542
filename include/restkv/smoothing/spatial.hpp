// SPDX-License-Identifier: Apache-2.0
/// @file
/// Spatial smoothing: from a row of scores over tokens to a row. The concept, and the pools of fixed width.
///
/// A NaN spreads to the outputs whose window contains it, and no further.
#pragma once

#include <restkv/core/larger.hpp>
#include <restkv/core/status.hpp>

#include <algorithm>
#include <concepts>
#include <limits>
#include <span>

namespace restkv {

/// What a spatial smoother may know about the row: the drift of the head's attention (see adaptive_window), 0 for
/// smoothers that do not ask for it, and whose row it is.
struct row_context {
  double drift = 0;      ///< in tokens
  index_t sequence = 0;  ///< of the batch
};

/// The tokens that out[n] depends on: in[clamp(n + first)] .. in[clamp(n + last)].
struct token_reach {
  index_t first = 0;  ///< relative to n
  index_t last = 0;   ///< relative to n, included
};

namespace detail {

template <class S, class Real>
concept smooths_row = requires(const S& smoother, std::span<const Real> in, std::span<Real> out,
                               const row_context& context) { smoother(in, out, context); };

}  // namespace detail

/// A spatial smoother: `smoother(in, out, context)` fills `out`, which has the extent of `in` and does not overlap it.
/// `static constexpr bool needs_drift = true` asks for the drift. A smoother whose output never falls when an input
/// grows says so by having `reach(context)`, RESTKV_HD where a device runs it; certified pruning needs that.
template <class S>
concept spatial_smoother = detail::smooths_row<S, float> && detail::smooths_row<S, double>;

/// Certified pruning asks that out[n] depend on the inputs in reach alone, to the last bit; a reach of more than
/// `widest_direct_reach` tokens may come from running sums, and is left alone there.
inline constexpr index_t widest_direct_reach = 129;

/// A smoother that may be run in parts, on any processor: `parts(length, context)` says into how many independent ones
/// a row falls, `smooth_part(part, in, out, context)` fills those of `out` that belong to one, as the call operator does, bit
/// by bit. Both are RESTKV_HD. Backends that take all rows at once need it.
template <class S>
concept parted_spatial_smoother =
    spatial_smoother<S> && requires(const S& smoother, std::span<const float> in, std::span<float> out,
                                    const row_context& row, index_t n) {
      { smoother.parts(n, row) } -> std::same_as<index_t>;
      smoother.smooth_part(n, in, out, row);
    };

template <class S>
concept monotone_spatial_smoother = spatial_smoother<S> && requires(const S& smoother, const row_context& row) {
  { smoother.reach(row) } -> std::convertible_to<token_reach>;
};

/// True when the smoother asks for the drift.
template <spatial_smoother S>
[[nodiscard]] constexpr bool needs_drift() noexcept {
  if constexpr (requires { S::needs_drift; }) return S::needs_drift;
  return false;
}

/// False where a smoother whose type needs the drift has a member `uses_drift()` that says it will not look at it.
template <spatial_smoother S>
[[nodiscard]] constexpr bool uses_drift(const S& smoother) noexcept {
  if constexpr (requires { { smoother.uses_drift() } -> std::convertible_to<bool>; }) return smoother.uses_drift();
  return needs_drift<S>();
}

/// No spatial smoothing: out = in.
struct no_pool {
  ///@{
  /// See `monotone_spatial_smoother`.
  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const row_context&) const noexcept {
    std::copy(in.begin(), in.end(), out.begin());
  }
  [[nodiscard]] constexpr token_reach reach(const row_context&) const noexcept { return {0, 0}; }
  [[nodiscard]] RESTKV_HD constexpr index_t parts(index_t length, const row_context&) const noexcept { return length; }
  template <std::floating_point Real>
  RESTKV_HD void smooth_part(index_t n, std::span<const Real> in, std::span<Real> out,
                             const row_context&) const noexcept {
    out[static_cast<std::size_t>(n)] = in[static_cast<std::size_t>(n)];
  }
  ///@}
};

namespace detail {

[[nodiscard]] inline status check_pool_width(const char* name, int width) noexcept {
  if (width < 1 || width % 2 == 0) {
    return status::error(errc::invalid_argument, "%s.width is %d, must be odd and at least 1", name, width);
  }
  return {};
}

/// The sum over u in [first, last], ascending, of in[n + u], where terms outside the row are left out, or repeat its ends
/// (`replicate`).
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD Real neighbour_sum(std::span<const Real> in, index_t n, token_reach reach,
                                           bool replicate) noexcept {
  const auto length = static_cast<index_t>(in.size());
  const index_t first = replicate ? reach.first : std::max(reach.first, -n);
  const index_t last = replicate ? reach.last : std::min(reach.last, length - 1 - n);
  Real sum = 0;
  for (index_t u = first; u <= last; ++u) {
    sum += in[static_cast<std::size_t>(std::clamp<index_t>(n + u, 0, length - 1))];
  }
  return sum;
}

/// out[n] = neighbour_sum(in, n, reach) * scale. The sum runs in the same order for every n, so a result never depends on
/// n's neighbours' rounding; the loop over n is innermost, so it is a sum of shifted rows and vectorises.
template <std::floating_point Real>
void shifted_row_sum(std::span<const Real> in, std::span<Real> out, token_reach reach, Real scale,
                     bool replicate) noexcept {
  const auto length = static_cast<index_t>(in.size());
  if (length == 0) return;
  const index_t inner_begin = std::clamp<index_t>(-reach.first, 0, length);
  const index_t inner_end = std::clamp<index_t>(length - reach.last, inner_begin, length);
  const auto edge = [&](index_t n) {
    out[static_cast<std::size_t>(n)] = neighbour_sum(in, n, reach, replicate) * scale;
  };
  for (index_t n = 0; n < inner_begin; ++n) edge(n);
  for (index_t n = inner_end; n < length; ++n) edge(n);
  constexpr index_t block = 512;  // stays in the first-level cache over the whole sum
  for (index_t start = inner_begin; start < inner_end; start += block) {
    const index_t count = std::min(block, inner_end - start);
    Real* const target = out.data() + start;
    for (index_t i = 0; i < count; ++i) target[i] = 0;
    for (index_t u = reach.first; u <= reach.last; ++u) {
      const Real* const source = in.data() + start + u;
      for (index_t i = 0; i < count; ++i) target[i] += source[i];
    }
    for (index_t i = 0; i < count; ++i) target[i] *= scale;
  }
}

}  // namespace detail

/// Mean over `width` neighbouring tokens: zero padding of width / 2 on both sides, always divided by `width`.
struct average_pool {
  int width = 5;  ///< tokens, odd

  ///@{
  /// See `monotone_spatial_smoother`.
  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const row_context& row) const noexcept {
    detail::shifted_row_sum(in, out, reach(row), Real(1) / static_cast<Real>(width), false);
  }
  [[nodiscard]] RESTKV_HD constexpr token_reach reach(const row_context&) const noexcept {
    return {-(width / 2), width / 2};
  }
  [[nodiscard]] RESTKV_HD constexpr index_t parts(index_t length, const row_context&) const noexcept { return length; }
  template <std::floating_point Real>
  RESTKV_HD void smooth_part(index_t n, std::span<const Real> in, std::span<Real> out,
                             const row_context& row) const noexcept {
    out[static_cast<std::size_t>(n)] =
        detail::neighbour_sum(in, n, reach(row), false) * (Real(1) / static_cast<Real>(width));
  }
  ///@}
  /// Fails on a width that is even or below 1.
  [[nodiscard]] status check() const noexcept { return detail::check_pool_width("average_pool", width); }
};

namespace detail {

/// The largest of in[first .. last], a NaN before anything else.
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD Real largest_of(std::span<const Real> in, index_t first, index_t last) noexcept {
  Real largest = in[static_cast<std::size_t>(first)];
  for (index_t i = first; i <= last; ++i) largest = larger(largest, in[static_cast<std::size_t>(i)]);
  return largest;
}

}  // namespace detail

/// Maximum over `width` neighbouring tokens; positions outside the row do not take part.
struct max_pool {
  int width = 7;  ///< tokens, odd

  ///@{
  /// See `monotone_spatial_smoother`.
  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const row_context& row) const noexcept {
    const auto length = static_cast<index_t>(in.size());
    for (index_t n = 0; n < length; ++n) smooth_part(n, in, out, row);
  }
  [[nodiscard]] constexpr token_reach reach(const row_context&) const noexcept { return {-(width / 2), width / 2}; }
  [[nodiscard]] RESTKV_HD constexpr index_t parts(index_t length, const row_context&) const noexcept { return length; }
  template <std::floating_point Real>
  RESTKV_HD void smooth_part(index_t n, std::span<const Real> in, std::span<Real> out,
                             const row_context&) const noexcept {
    const auto length = static_cast<index_t>(in.size());
    const index_t first = std::max<index_t>(0, n - width / 2);
    const index_t last = std::min<index_t>(length - 1, n + width / 2);
    out[static_cast<std::size_t>(n)] = detail::largest_of(in, first, last);
  }
  ///@}
  /// Fails on a width that is even or below 1.
  [[nodiscard]] status check() const noexcept { return detail::check_pool_width("max_pool", width); }
};

}  // namespace restkv
