// SPDX-License-Identifier: Apache-2.0
/// @file
/// `following_pool`: importance carried from a token to the tokens that follow it.
#pragma once

#include <restkv/smoothing/spatial.hpp>

namespace restkv {

/// The maximum over a token and those before it:
///
///     out[n] = max over i = max(0, n - width + 1) .. n of in[i]
///
/// A question points at what stands before its answer: the queries of "what is the number of Oslo?" attend to "the
/// number of Oslo is" and not yet to the digits behind it, which are read only while they are copied. What follows an
/// attended token is therefore worth more than what precedes it, and a pool that looks both ways spends half of its
/// tokens on the wrong side. All `width` tokens count alike, since half an answer is none. A NaN spreads to the `width`
/// tokens from it on. Cost: width comparisons a token.
struct following_pool {
  int width = 11;  ///< tokens, at least 1

  ///@{
  /// See `monotone_spatial_smoother` and `parted_spatial_smoother`.
  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const row_context& row) const noexcept {
    const auto length = static_cast<index_t>(in.size());
    for (index_t n = 0; n < length; ++n) smooth_part(n, in, out, row);
  }
  [[nodiscard]] RESTKV_HD constexpr token_reach reach(const row_context&) const noexcept { return {1 - width, 0}; }
  [[nodiscard]] RESTKV_HD constexpr index_t parts(index_t length, const row_context&) const noexcept { return length; }
  template <std::floating_point Real>
  RESTKV_HD void smooth_part(index_t n, std::span<const Real> in, std::span<Real> out,
                             const row_context&) const noexcept {
    out[static_cast<std::size_t>(n)] = detail::largest_of(in, std::max<index_t>(0, n - width + 1), n);
  }
  ///@}
  /// Fails on a width below 1.
  [[nodiscard]] status check() const noexcept {
    if (width < 1) {
      return status::error(errc::invalid_argument, "following_pool.width is %d, must be at least 1", width);
    }
    return {};
  }
};

}  // namespace restkv
