// SPDX-License-Identifier: Apache-2.0
/// @file
/// `lag_kv`: tokens that differ from the range of the chunk that follows theirs.
#pragma once

#include <restkv/core/scratch.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv {

/// LagKV (arXiv 2504.04704). Behind the first `sink` tokens the head is cut into chunks of `lag` tokens. With the
/// minimum and maximum of each channel over the *next* chunk, x' = (x - min) / (max - min); a token's spread is the
/// standard deviation of x' over the channels (divided by d - 1), and softmax over its chunk turns spreads into
/// shares, for keys and for values. The mean of both shares is the score with `cross_scoring`; without it the score is
/// the token's rank in its chunk divided by `lag`, so that every chunk keeps the same part.
///
/// The sinks, the last whole chunk and what is left behind it score 1. A head shorter than sink + 2 lag has no chunk to
/// compare with: its sinks score 1 and the other tokens i / (length - sink), i counted from the first of them.
///
/// Ties in a chunk rank the earlier token higher. A channel without a range (max = min) counts 0 for all tokens. A
/// token whose key or value is not finite scores NaN and takes no part in ranges, shares and ranks. Cost: two passes
/// over keys and over values, the second from a chunk that was read just before, 6 d operations each; scratch of
/// 8 lag + 7 d elements.
struct lag_kv {
  index_t sink = 4;            ///< first tokens, which are left alone
  index_t lag = 128;           ///< tokens of a chunk
  bool cross_scoring = false;  ///< shares, comparable between chunks, instead of ranks

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys | cache_part::values;

  [[nodiscard]] status check() const noexcept {
    if (sink < 0) {
      return status::error(errc::invalid_argument, "sink of lag_kv is %lld, must be at least 0",
                           static_cast<long long>(sink));
    }
    if (lag < 1 || lag > std::numeric_limits<position_t>::max()) {
      return status::error(errc::invalid_argument, "lag of lag_kv is %lld, must be within [1, %lld]",
                           static_cast<long long>(lag),
                           static_cast<long long>(std::numeric_limits<position_t>::max()));
    }
    return {};
  }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept {
    const index_t chunk = std::min(lag, shape.tokens);
    return 4 * scratch_of_doubles(chunk) + 3 * scratch_of_doubles(shape.head_dim) + shape.head_dim;
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const index_t length = head.length();
    const index_t sinks = std::min(sink, length);
    std::fill(scores.begin(), scores.begin() + sinks, Real(1));
    if ((length - sinks) / lag < 2) {
      for (index_t n = sinks; n < length; ++n) {
        scores[static_cast<std::size_t>(n)] = static_cast<Real>(n - sinks) / static_cast<Real>(length - sinks);
      }
      return;
    }
    scratch_rows<Real> memory(scratch);
    const index_t channels = head.head_dim();
    const rows<Real> room{.shares = memory.take_doubles(lag),
                          .other = memory.take_doubles(lag),
                          .sorted = memory.take_doubles(lag),
                          .used = memory.take_doubles(lag),
                          .low = memory.take_doubles(channels),
                          .scale = memory.take_doubles(channels),
                          .scaled = memory.take_doubles(channels),
                          .row = memory.take(channels)};
    const index_t chunks = (length - sinks) / lag;
    for (index_t i = 0; i + 1 < chunks; ++i) {
      const index_t first = sinks + i * lag;
      find_shares(head, first, room, room.shares, [&](index_t n, std::span<Real> row) { head.key(n, row); });
      find_shares(head, first, room, room.other, [&](index_t n, std::span<Real> row) { head.value(n, row); });
      for (index_t j = 0; j < lag; ++j) room.shares[j] = (room.shares[j] + room.other[j]) / 2;
      if (!cross_scoring) rank(room);
      for (index_t j = 0; j < lag; ++j) scores[static_cast<std::size_t>(first + j)] = static_cast<Real>(room.shares[j]);
    }
    std::fill(scores.begin() + (sinks + (chunks - 1) * lag), scores.begin() + length, Real(1));
  }
  ///@}

 private:
  template <std::floating_point Real>
  struct rows {
    double* shares;  // [lag]
    double* other;   // [lag]
    double* sorted;  // [lag]
    double* used;    // [lag]
    double* low;     // [head_dim]
    double* scale;   // [head_dim]
    double* scaled;  // [head_dim]
    Real* row;       // [head_dim]
  };

  /// The softmax of the spreads of the chunk at `first`, NaN for tokens that are not finite.
  template <element T, std::floating_point Real, class Read>
  void find_shares(const head_view<T>& head, index_t first, const rows<Real>& room, double* shares,
                  const Read& read) const noexcept {
    const index_t channels = head.head_dim();
    const std::span<Real> row(room.row, static_cast<std::size_t>(channels));
    constexpr double infinity = std::numeric_limits<double>::infinity();
    std::fill(room.low, room.low + channels, infinity);
    std::fill(room.scale, room.scale + channels, -infinity);
    for (index_t n = first + lag; n < first + 2 * lag; ++n) {
      read(n, row);
      if (!all_finite(room.row, channels)) continue;
      for (index_t c = 0; c < channels; ++c) {
        const auto x = static_cast<double>(room.row[c]);
        room.low[c] = x < room.low[c] ? x : room.low[c];
        room.scale[c] = x > room.scale[c] ? x : room.scale[c];
      }
    }
    for (index_t c = 0; c < channels; ++c) {
      const double range = room.scale[c] - room.low[c];  // not above 0, or infinite, where there is none
      room.scale[c] = range > 0 && range < infinity ? std::min(1 / range, std::numeric_limits<double>::max()) : 0;
      if (room.scale[c] == 0) room.low[c] = 0;
    }
    double largest = 0;
    for (index_t j = 0; j < lag; ++j) {
      read(first + j, row);
      shares[j] = all_finite(room.row, channels) ? spread(room, channels) : std::numeric_limits<double>::quiet_NaN();
      largest = shares[j] > largest ? shares[j] : largest;
    }
    double sum = 0;
    for (index_t j = 0; j < lag; ++j) {
      shares[j] = std::exp(shares[j] - largest);
      if (shares[j] == shares[j]) sum += shares[j];
    }
    for (index_t j = 0; j < lag; ++j) shares[j] /= sum;
  }

  /// The standard deviation of (x - low) * scale over the channels.
  template <std::floating_point Real>
  [[nodiscard]] static double spread(const rows<Real>& room, index_t channels) noexcept {
    if (channels < 2) return 0;
    for (index_t c = 0; c < channels; ++c) {
      room.scaled[c] = (static_cast<double>(room.row[c]) - room.low[c]) * room.scale[c];
    }
    const double* const scaled = room.scaled;
    const double mean =
        detail::sum_in_lanes<double>(channels, [=](index_t c) { return scaled[c]; }) / static_cast<double>(channels);
    const double squares = detail::sum_in_lanes<double>(channels, [=](index_t c) {
      const double part = scaled[c] - mean;
      return part * part;
    });
    const double deviation = std::sqrt(squares / static_cast<double>(channels - 1));
    constexpr double most = std::numeric_limits<double>::max();
    return deviation <= most ? deviation : most;
  }

  /// Replaces shares by ranks / lag, 0 the smallest.
  template <std::floating_point Real>
  void rank(const rows<Real>& room) const noexcept {
    double* last = std::copy_if(room.shares, room.shares + lag, room.sorted, [](double x) { return x == x; });
    std::sort(room.sorted, last);
    std::fill(room.used, room.used + lag, 0.0);
    for (index_t j = lag - 1; j >= 0; --j) {
      if (room.shares[j] != room.shares[j]) continue;
      const auto at = std::lower_bound(room.sorted, last, room.shares[j]) - room.sorted;
      room.shares[j] = (static_cast<double>(at) + room.used[at]) / static_cast<double>(lag);
      ++room.used[at];
    }
  }
};

}  // namespace restkv
