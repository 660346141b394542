// SPDX-License-Identifier: Apache-2.0
/// @file
/// `cur_dkv`: tokens with long keys and values, compared with their neighbours.
#pragma once

#include <restkv/core/scratch.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv {

/// Which leverage `cur_dkv` ranks by.
enum class cur_leverage {
  key,      ///< of keys
  value,    ///< of values
  mean,     ///< mean of both
  product,  ///< product of both
};

/// CurDKV (arXiv 2509.15038) with squared norms for leverage: with p[n] = ||k_n||^2 / (the sum of ||k||^2 over the
/// `local_window` tokens of n's window) and q[n] the same of values, the score is p, q, (p + q) / 2 or p q, divided by
/// its sum over the head. Windows lie at multiples of `local_window`; the last may be shorter.
///
/// Where all norms of a window are 0, its shares are. A token whose key or value is not finite scores NaN and takes no
/// part in the sums. Sinks are left to `protection`. Cost: one pass over what the leverage needs, 2 d operations a
/// token; scratch of one row and one number a token.
struct cur_dkv {
  cur_leverage leverage = cur_leverage::product;  ///< what is ranked
  index_t local_window = 16;                      ///< tokens that share a sum; 0: all tokens

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys | cache_part::values;

  [[nodiscard]] status check() const noexcept {
    if (local_window >= 0) return {};
    return status::error(errc::invalid_argument, "local_window of cur_dkv is %lld, must be at least 0",
                         static_cast<long long>(local_window));
  }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept {
    return shape.head_dim + shape.tokens;
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const index_t length = head.length();
    scratch_rows<Real> memory(scratch);
    const std::span<Real> row(memory.take(head.head_dim()), static_cast<std::size_t>(head.head_dim()));
    const std::span<Real> keys = scores.first(static_cast<std::size_t>(length));
    const std::span<Real> values(memory.take(length), static_cast<std::size_t>(length));
    if (leverage != cur_leverage::value) {
      shares(keys, row, [&](index_t n) { head.key(n, row); });
    }
    if (leverage != cur_leverage::key) {
      shares(values, row, [&](index_t n) { head.value(n, row); });
    }
    double sum = 0;
    for (index_t n = 0; n < length; ++n) {
      Real& score = scores[static_cast<std::size_t>(n)];
      const Real value = values[static_cast<std::size_t>(n)];
      switch (leverage) {
        case cur_leverage::key: break;
        case cur_leverage::value: score = value; break;
        case cur_leverage::mean: score = (score + value) / 2; break;
        case cur_leverage::product: score *= value; break;
      }
      if (score == score) sum += static_cast<double>(score);
    }
    if (sum == 0) return;
    for (Real& score : keys) score = static_cast<Real>(static_cast<double>(score) / sum);
  }
  ///@}

 private:
  /// out[n] = the share of the n-th row's squared norm in its window.
  template <std::floating_point Real, class Read>
  void shares(std::span<Real> out, std::span<Real> row, const Read& read) const noexcept {
    const auto length = static_cast<index_t>(out.size());
    const index_t width = local_window == 0 ? length : std::min(local_window, length);
    const double root = std::sqrt(static_cast<double>(std::max<std::size_t>(row.size(), 1)));
    for (index_t first = 0; first < length; first += width) {
      const std::span<Real> window = out.subspan(static_cast<std::size_t>(first),
                                                 static_cast<std::size_t>(std::min(width, length - first)));
      Real largest = 0;
      for (std::size_t i = 0; i < window.size(); ++i) {
        read(first + static_cast<index_t>(i));
        // Root mean squares, which stay in the range of Real.
        window[i] = static_cast<Real>(norm(row.data(), static_cast<index_t>(row.size())) / root);
        if (!(window[i] <= std::numeric_limits<Real>::max())) window[i] = std::numeric_limits<Real>::quiet_NaN();
        largest = window[i] > largest ? window[i] : largest;
      }
      if (largest == 0) continue;
      double sum = 0;
      for (Real& x : window) {
        x /= largest;  // its square is in range
        x *= x;
        if (x == x) sum += static_cast<double>(x);
      }
      for (Real& x : window) x = static_cast<Real>(static_cast<double>(x) / sum);
    }
  }
};

}  // namespace restkv
