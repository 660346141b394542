// SPDX-License-Identifier: Apache-2.0
/// @file
/// Mean and covariance of a head's queries, and what RoPE makes of them on average over positions to come:
/// `query_statistics`, `average_rope`.
#pragma once

#include <restkv/cache/rope.hpp>
#include <restkv/core/check_view.hpp>
#include <restkv/core/cholesky.hpp>
#include <restkv/core/dtype.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

#include <cmath>
#include <span>

namespace restkv {

/// Where the statistics of queries go.
struct query_statistics_view {
  tensor_view<double, 3> mean{};        ///< [batch, query_heads, head_dim]
  tensor_view<double, 4> covariance{};  ///< [batch, query_heads, head_dim, head_dim]; optional
};

/// RoPE that queries carry already: row i stands at position first_position + i.
struct carried_rope {
  std::span<const double> frequencies{};           ///< of `rope_frequencies`; none: the queries carry no RoPE
  rotary_pairs pairing = rotary_pairs::half_split;  ///< which channels make a pair
  index_t first_position = 0;                      ///< of row 0
};

/// Doubles of scratch that `query_statistics` needs.
[[nodiscard]] constexpr index_t query_statistics_scratch(index_t head_dim) noexcept {
  return head_dim * head_dim + outer_product_sum::row_elements(head_dim);
}

namespace detail {

[[nodiscard]] inline status check_query_statistics(const query_statistics_view& out, index_t batch, index_t heads,
                                                   index_t channels) noexcept {
  if (out.mean.data == nullptr) return status::error(errc::missing_input, "the statistics have no mean");
  const auto check = [&](const char* name, const auto& part) -> status {
    const index_t wanted[] = {batch, heads, channels, channels};
    const char* const axes[] = {"sequences", "heads", "channels", "channels"};
    for (std::size_t axis = 0; axis < part.rank; ++axis) {
      if (part.extent(axis) == wanted[axis]) continue;
      return status::error(errc::shape_mismatch, "%s has %lld %s, the queries have %lld", name,
                           static_cast<long long>(part.extent(axis)), axes[axis],
                           static_cast<long long>(wanted[axis]));
    }
    return check_view(name, part);
  };
  RESTKV_RETURN_IF_FAILED(check("mean", out.mean));
  return out.covariance.data == nullptr ? status{} : check("covariance", out.covariance);
}

[[nodiscard]] inline status check_rotary_channels(std::span<const double> frequencies, index_t channels) noexcept {
  if (2 * static_cast<index_t>(frequencies.size()) > channels) {
    return status::error(errc::shape_mismatch, "frequencies has %zu entries, %lld channels have %lld pairs",
                         frequencies.size(), static_cast<long long>(channels), static_cast<long long>(channels / 2));
  }
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    if (std::isfinite(frequencies[i])) continue;
    return status::error(errc::invalid_argument, "frequency %zu of %zu is %g, must be finite", i, frequencies.size(),
                         frequencies[i]);
  }
  return {};
}

/// Calls body(pair, first channel, second channel) for every rotary pair.
template <class Body>
void for_each_rotary_pair(std::size_t pairs, rotary_pairs pairing, const Body& body) noexcept {
  const rotary_channels channels(pairing, pairs);
  for (index_t i = 0; i < static_cast<index_t>(pairs); ++i) {
    body(static_cast<std::size_t>(i), channels.first(i), channels.second(i));
  }
}

}  // namespace detail

/// The mean of each head's queries, and their covariance (divided by their number), as expected attention needs them
/// (arXiv 2510.00636).
///
/// queries: [batch, query_heads, rows, head_dim], oldest first. The first `skip` rows, whose queries are outliers in
/// most models, are left out, and so are rows that are not finite; with none left mean and covariance are 0. Queries
/// after RoPE are turned back where `rope` says how they were turned. scratch: query_statistics_scratch(head_dim)
/// doubles.
///
/// Fails, before anything is written, on extents that do not fit, on a scratch that is too small, and without a row
/// behind `skip`. Allocates nothing. Cost: two reads of the queries, d^2 / 2 multiply-adds a row for the covariance,
/// a cosine and a sine a pair and row where they carry RoPE.
template <element T>
[[nodiscard]] status query_statistics(const tensor_view<const T, 4>& queries, const query_statistics_view& out,
                                      std::span<double> scratch, index_t skip = 4,
                                      const carried_rope& rope = {}) noexcept {
  const index_t rows = queries.extent(2);
  const index_t channels = queries.extent(3);
  RESTKV_RETURN_IF_FAILED(
      detail::check_query_statistics(out, queries.extent(0), queries.extent(1), channels));
  RESTKV_RETURN_IF_FAILED(detail::check_rotary_channels(rope.frequencies, channels));
  RESTKV_RETURN_IF_FAILED(detail::check_view("queries", queries));
  if (channels > 4096) {  // the limit of a plan
    return status::error(errc::invalid_argument, "queries has %lld channels, at most 4096 are possible",
                         static_cast<long long>(channels));
  }
  if (skip < 0 || rows <= skip) {
    return status::error(errc::invalid_argument, "queries has %lld rows, must have more than the %lld that are skipped",
                         static_cast<long long>(rows), static_cast<long long>(skip));
  }
  if (static_cast<index_t>(scratch.size()) < query_statistics_scratch(channels)) {
    return status::error(errc::workspace_too_small, "scratch has %zu doubles, query_statistics needs %lld",
                         scratch.size(), static_cast<long long>(query_statistics_scratch(channels)));
  }
  double* const matrix = scratch.data();
  double* const gathered = matrix + channels * channels;
  const auto read = [&](index_t b, index_t h, index_t i, double* row) {
    for (index_t c = 0; c < channels; ++c) row[c] = widen<double>(queries(b, h, i, c));
    const auto position = static_cast<double>(rope.first_position + i);
    detail::for_each_rotary_pair(rope.frequencies.size(), rope.pairing, [&](std::size_t pair, index_t x, index_t y) {
      const double angle = -position * rope.frequencies[pair];
      detail::rotate_pair(row[x], row[y], std::cos(angle), std::sin(angle));
    });
    return all_finite(row, channels);
  };
  for (index_t b = 0; b < queries.extent(0); ++b) {
    for (index_t h = 0; h < queries.extent(1); ++h) {
      double* const mean = matrix;  // until the matrix is built
      double* const row = gathered;
      std::fill(mean, mean + channels, 0.0);
      double count = 0;
      for (index_t i = skip; i < rows; ++i) {
        if (!read(b, h, i, row)) continue;
        for (index_t c = 0; c < channels; ++c) mean[c] += row[c];
        ++count;
      }
      for (index_t c = 0; c < channels; ++c) out.mean(b, h, c) = count == 0 ? 0 : mean[c] / count;
      if (out.covariance.data == nullptr) continue;
      std::fill(matrix, matrix + channels * channels, 0.0);
      outer_product_sum sum(matrix, gathered, channels);
      for (index_t i = skip; i < rows; ++i) {
        double* const centred = sum.next();
        if (!read(b, h, i, centred)) continue;
        for (index_t c = 0; c < channels; ++c) centred[c] -= out.mean(b, h, c);
        sum.add();
      }
      sum.finish();
      for (index_t r = 0; r < channels; ++r) {
        for (index_t c = 0; c <= r; ++c) {
          const double entry = count == 0 ? 0 : matrix[r * channels + c] / count;
          out.covariance(b, h, r, c) = entry;
          out.covariance(b, h, c, r) = entry;
        }
      }
    }
  }
  return {};
}

/// Turns statistics of queries before RoPE into those at the positions to come: mean -> R mean, covariance ->
/// R covariance R^T, with R the mean of the rotation matrices of positions [first_position, first_position + count)
/// (arXiv 2510.00636, where first_position is the prompt's length and count is 512). In place.
///
/// Fails, before anything is written, on frequencies that do not fit or are not finite, and on a count below 1. Cost:
/// count cosines and sines a pair, 4 d^2 operations a head.
[[nodiscard]] inline status average_rope(std::span<const double> frequencies, rotary_pairs pairing,
                                         index_t first_position, index_t count,
                                         const query_statistics_view& statistics) noexcept {
  const auto& mean = statistics.mean;
  const auto& covariance = statistics.covariance;
  const index_t channels = mean.extent(2);
  RESTKV_RETURN_IF_FAILED(
      detail::check_query_statistics(statistics, mean.extent(0), mean.extent(1), channels));
  RESTKV_RETURN_IF_FAILED(detail::check_rotary_channels(frequencies, channels));
  if (count < 1) {
    return status::error(errc::invalid_argument, "average_rope is over %lld positions, must be at least 1",
                         static_cast<long long>(count));
  }
  detail::for_each_rotary_pair(frequencies.size(), pairing, [&](std::size_t pair, index_t x, index_t y) {
    double cosine = 0;
    double sine = 0;
    for (index_t i = 0; i < count; ++i) {
      const double angle = static_cast<double>(first_position + i) * frequencies[pair];
      cosine += std::cos(angle);
      sine += std::sin(angle);
    }
    cosine /= static_cast<double>(count);
    sine /= static_cast<double>(count);
    for (index_t b = 0; b < mean.extent(0); ++b) {
      for (index_t h = 0; h < mean.extent(1); ++h) {
        detail::rotate_pair(mean(b, h, x), mean(b, h, y), cosine, sine);
        if (covariance.data == nullptr) continue;
        for (index_t c = 0; c < channels; ++c) {
          detail::rotate_pair(covariance(b, h, x, c), covariance(b, h, y, c), cosine, sine);
        }
        for (index_t r = 0; r < channels; ++r) {
          detail::rotate_pair(covariance(b, h, r, x), covariance(b, h, r, y), cosine, sine);
        }
      }
    }
  });
  return {};
}

}  // namespace restkv
