// SPDX-License-Identifier: Apache-2.0
/// @file
/// `q_filter`: keys projected on the main direction of the queries, and `find_q_filters`, which finds that direction.
#pragma once

#include <restkv/core/check_view.hpp>
#include <restkv/core/cholesky.hpp>
#include <restkv/core/dtype.hpp>
#include <restkv/core/scratch.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <utility>

namespace restkv {

/// score = k . f with the filter f of the KV head: the direction in which its queries lie (Q-Filters,
/// arXiv 2503.02812). Filters belong to a layer of a model and come from `find_q_filters`. A checkpoint of published
/// filters that was made for the score -k . f wants its sign changed.
///
/// A key that is not finite scores what the arithmetic gives, NaN last, and touches no other token. Ties go to the
/// smaller index. Cost: one pass over the keys, d multiply-adds a token; scratch of 2 rows.
struct q_filter {
  tensor_view<const float, 2> filters{};  ///< [kv_heads, head_dim]

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys;

  [[nodiscard]] status check(const problem_shape& shape) const noexcept {
    if (filters.data == nullptr) return status::error(errc::missing_input, "q_filter has no filters");
    if (filters.extent(0) == shape.kv_heads && filters.extent(1) == shape.head_dim) {
      return detail::check_view("filters", filters);
    }
    return status::error(errc::shape_mismatch, "filters is [%lld, %lld], the plan has %lld KV heads of %lld channels",
                         static_cast<long long>(filters.extent(0)), static_cast<long long>(filters.extent(1)),
                         static_cast<long long>(shape.kv_heads), static_cast<long long>(shape.head_dim));
  }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept { return 2 * shape.head_dim; }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const index_t channels = head.head_dim();
    scratch_rows<Real> memory(scratch);
    Real* const filter = memory.take(channels);
    const std::span<Real> key(memory.take(channels), static_cast<std::size_t>(channels));
    for (index_t c = 0; c < channels; ++c) filter[c] = static_cast<Real>(filters(head.kv_head(), c));
    for (index_t n = 0; n < head.length(); ++n) {
      head.key(n, key);
      scores[static_cast<std::size_t>(n)] = dot(key.data(), filter, channels);
    }
  }
  ///@}
};

/// Doubles of scratch that `find_q_filters` needs.
[[nodiscard]] constexpr index_t q_filter_scratch(index_t head_dim) noexcept {
  return 2 * head_dim * head_dim + outer_product_sum::row_elements(head_dim) + 2 * head_dim;
}

/// The filters of a layer from queries that meet its keys (after RoPE): for each query head the first right singular
/// vector of its queries, with the sign that gives them a positive mean projection; the mean over a KV head's query
/// heads is its filter (arXiv 2503.02812). The paper takes some thousand queries of general text; the filters then
/// serve every prompt.
///
/// queries: [batch, query_heads, rows, head_dim], of all sequences together; rows that are not finite are left out.
/// filters: [kv_heads, head_dim]. scratch: q_filter_scratch(head_dim) doubles. Fails, before anything is written, on
/// extents that do not fit. Allocates nothing.
///
/// The vector is found by squaring Q^T Q until the rest has vanished: 40 times, which separates directions whose
/// singular values differ by 1e-10 of their size; of directions that are as long as each other it takes a mixture.
/// Cost: d^2 / 2 multiply-adds a query and 20 d^3 a head.
template <element T>
[[nodiscard]] status find_q_filters(const tensor_view<const T, 4>& queries, const tensor_view<float, 2>& filters,
                                    std::span<double> scratch) noexcept {
  const index_t heads = queries.extent(1);
  const index_t rows = queries.extent(2);
  const index_t channels = queries.extent(3);
  const index_t kv_heads = filters.extent(0);
  if (filters.data == nullptr) return status::error(errc::missing_input, "filters has a null pointer");
  RESTKV_RETURN_IF_FAILED(detail::check_view("filters", filters));
  RESTKV_RETURN_IF_FAILED(detail::check_view("queries", queries));
  if (channels > 4096) {  // the limit of a plan
    return status::error(errc::invalid_argument, "queries has %lld channels, at most 4096 are possible",
                         static_cast<long long>(channels));
  }
  if (kv_heads < 1 || heads < 1 || heads % kv_heads != 0) {
    return status::error(errc::shape_mismatch,
                         "queries has %lld heads, filters %lld: query heads must be a multiple of KV heads",
                         static_cast<long long>(heads), static_cast<long long>(kv_heads));
  }
  if (filters.extent(1) != channels) {
    return status::error(errc::shape_mismatch, "filters has %lld channels, queries %lld",
                         static_cast<long long>(filters.extent(1)), static_cast<long long>(channels));
  }
  if (static_cast<index_t>(scratch.size()) < q_filter_scratch(channels)) {
    return status::error(errc::workspace_too_small, "scratch has %zu doubles, find_q_filters needs %lld",
                         scratch.size(), static_cast<long long>(q_filter_scratch(channels)));
  }
  double* matrix = scratch.data();
  double* square = matrix + channels * channels;
  double* const gathered = square + channels * channels;
  double* const mean = gathered + outer_product_sum::row_elements(channels);
  double* const filter = mean + channels;
  for (index_t k = 0; k < kv_heads; ++k) {
    std::fill(filter, filter + channels, 0.0);
    for (index_t h = k * (heads / kv_heads); h < (k + 1) * (heads / kv_heads); ++h) {
      std::fill(matrix, matrix + channels * channels, 0.0);
      std::fill(mean, mean + channels, 0.0);
      outer_product_sum sum(matrix, gathered, channels);
      for (index_t b = 0; b < queries.extent(0); ++b) {
        for (index_t i = 0; i < rows; ++i) {
          double* const row = sum.next();
          for (index_t c = 0; c < channels; ++c) row[c] = widen<double>(queries(b, h, i, c));
          if (!all_finite(row, channels)) continue;
          for (index_t c = 0; c < channels; ++c) mean[c] += row[c];
          sum.add();
        }
      }
      sum.finish();
      for (index_t r = 0; r < channels; ++r) {
        for (index_t c = 0; c < r; ++c) matrix[c * channels + r] = matrix[r * channels + c];
      }
      for (int step = 0; step < 40; ++step) {
        double largest = 0;
        for (index_t i = 0; i < channels * channels; ++i) largest = std::max(largest, std::fabs(matrix[i]));
        if (!(largest > 0)) break;
        for (index_t i = 0; i < channels * channels; ++i) matrix[i] /= largest;
        for (index_t r = 0; r < channels; ++r) {
          for (index_t c = 0; c <= r; ++c) {
            const double entry = dot(matrix + r * channels, matrix + c * channels, channels);
            square[r * channels + c] = entry;
            square[c * channels + r] = entry;
          }
        }
        std::swap(matrix, square);
      }
      // Every column is a multiple of the vector now; the one with the largest diagonal entry is the longest.
      index_t best = 0;
      for (index_t c = 1; c < channels; ++c) {
        if (matrix[c * channels + c] > matrix[best * channels + best]) best = c;
      }
      const double* const direction = matrix + best * channels;
      const double length = norm(direction, channels);
      if (!(length > 0)) continue;
      const double sign = dot(direction, mean, channels) < 0 ? -1 : 1;
      for (index_t c = 0; c < channels; ++c) filter[c] += sign * direction[c] / length;
    }
    for (index_t c = 0; c < channels; ++c) {
      filters(k, c) = static_cast<float>(filter[c] / static_cast<double>(heads / kv_heads));
    }
  }
  return {};
}

}  // namespace restkv
