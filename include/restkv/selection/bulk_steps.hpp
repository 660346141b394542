// SPDX-License-Identifier: Apache-2.0
/// @file
/// The element-wise steps of a selection on a bulk backend, each the body of a `for_each`: what the host's
/// `selection_run` does to a row, done to every token of every row.
#pragma once

#include <restkv/backend/bulk.hpp>
#include <restkv/budget/budget.hpp>
#include <restkv/score/group_reduce.hpp>
#include <restkv/selection/granularity.hpp>
#include <restkv/smoothing/spatial.hpp>

#include <memory>

namespace restkv::detail::bulk {

/// The element-wise part of a row of scores or keys.
template <class T>
[[nodiscard]] RESTKV_HD constexpr std::span<T> part_of(T* row, index_t count) noexcept {
  return {row, static_cast<std::size_t>(count)};
}

/// drift[row] = the mean over the row's query heads. For each row.
struct mean_drift {
  const double* of_heads;  ///< [rows * group]
  double* drift;           ///< [rows]
  index_t group;

  RESTKV_HD void operator()(index_t row) const noexcept {
    double sum = 0;
    for (index_t j = 0; j < group; ++j) sum += of_heads[row * group + j];
    drift[row] = sum / static_cast<double>(group);
  }
};

/// drift[row] = 0, for smoothers that do not ask for it. For each row.
struct no_drift {
  double* drift;  ///< [rows]

  RESTKV_HD void operator()(index_t row) const noexcept { drift[row] = 0.0; }
};

/// Reduces token n of all heads of a sequence to the first head's row. For each (sequence, n).
struct share_heads {
  float* score;  ///< [batch, heads, tokens]
  bulk_rows rows;
  group_reduce group;
  index_t heads;
  index_t tokens;  ///< most of a row
  index_t stride;  ///< from one head to the next

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t b = item / tokens;
    const index_t n = item % tokens;
    if (n >= rows.span_of(b).past) return;
    float* const row = score + b * heads * stride;
    float folded = 0;
    for (index_t h = 0; h < heads; ++h) folded = group_fold(group, folded, row[h * stride + n], h == 0);
    row[n] = group_finish(group, folded, heads);
  }
};

/// smoothed = spatial(score). For each (row, part).
template <class Spatial>
struct smooth_rows {
  Spatial spatial;
  const float* score;
  float* smoothed;
  const double* drift;
  bulk_rows rows;
  index_t rows_per_sequence;
  index_t tokens;  ///< most parts of a row

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / tokens;
    const index_t part = item % tokens;
    const index_t past = rows.span_of(row).past;
    const row_context context{.drift = drift[row], .sequence = row / rows_per_sequence};
    if (part >= past || part >= spatial.parts(past, context)) return;  // parts may cost a division
    spatial.smooth_part(part, part_of(score + row * rows.stride, past), part_of(smoothed + row * rows.stride, past),
                        context);
  }
};

/// The order key of each unit; 0 where it may not be evicted, and behind the row's last unit. For each (row, unit).
struct make_keys {
  granularity unit;
  const float* smoothed;
  std::uint32_t* keys;
  const std::uint32_t*
      mask;  ///< [batch, words], a bit for each token from the span's beginning; null where there is none
  bulk_rows rows;
  index_t rows_per_sequence;
  index_t words;
  index_t units;  ///< of the longest row

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / units;
    const index_t u = item % units;
    const bulk_span& span = rows.span_of(row);
    bool may_evict = u >= span.first && u < span.end;
    const index_t begin = u * unit.tokens;
    const index_t end = begin + unit.tokens < span.length ? begin + unit.tokens : span.length;
    if (mask != nullptr && may_evict) {
      const std::uint32_t* const bits = mask + row / rows_per_sequence * words;
      for (index_t n = begin; n < end; ++n) may_evict = may_evict && (bits[n / 32] >> (n % 32) & 1u) == 0;
    }
    std::uint32_t key = excluded_key;
    if (may_evict) {
      const float* const scores = smoothed + row * rows.stride + begin;
      key = unit.tokens == 1 ? order_key(*scores) : order_key(unit(part_of(scores, unit.tokens)));
    }
    std::construct_at(keys + row * rows.stride + u, key);  // where a score lay
  }
};

/// candidates[row], where heads differ. For each row.
struct list_candidates {
  bulk_rows rows;
  index_t* candidates;

  RESTKV_HD void operator()(index_t row) const noexcept { candidates[row] = rows.span_of(row).candidates; }
};

/// A sequence as its allocator sees it, from what lies in the backend's memory: `selection_problem::sequence` there.
struct sequence_budget {
  bulk_rows rows;
  index_t heads;              ///< rows of a sequence
  const index_t* candidates;  ///< [batch * heads] where heads differ, null otherwise
  index_t layer;
  index_t layers;

  [[nodiscard]] RESTKV_HD budget_problem operator()(index_t b) const noexcept {
    index_t longest = b * heads;
    for (index_t h = 1; candidates != nullptr && h < heads; ++h) {
      if (rows.span_of(b * heads + h).length > rows.span_of(longest).length) longest = b * heads + h;
    }
    budget_problem problem;
    problem.heads = heads;
    problem.length = rows.units_of(longest);
    problem.candidates = rows.span_of(longest).candidates;
    problem.layer = layer;
    problem.layers = layers;
    problem.unit = rows.unit;
    if (candidates != nullptr) problem.head_candidates = part_of(candidates + b * heads, heads);
    return problem;
  }
};

/// Turns the numbers of pooled keys of the heads of a sequence into their counts. For each sequence.
template <class Budget>
struct share_pools {
  Budget budget;
  sequence_budget problem_of;
  index_t* counts;  ///< [batch * heads]
  double* shares;   ///< [batch * heads]

  RESTKV_HD void operator()(index_t b) const noexcept {
    const budget_problem problem = problem_of(b);
    index_t* const of_heads = counts + b * problem.heads;
    if (problem.length <= budget.tokens_per_head(problem)) {
      for (index_t h = 0; h < problem.heads; ++h) of_heads[h] = problem.candidates_of(h);
      return;
    }
    budget.share_pool(problem, part_of(of_heads, problem.heads), part_of(shares + b * problem.heads, problem.heads));
  }
};

/// The counts of an allocator that looks at every key, in memory of the host. For each sequence.
template <class Budget>
struct allocate_by_keys {
  Budget budget;
  sequence_budget problem_of;
  const std::uint32_t* keys;
  index_t* counts;
  double* shares;

  void operator()(index_t b) const noexcept {
    const budget_problem problem = problem_of(b);
    const std::span<index_t> of_heads = part_of(counts + b * problem.heads, problem.heads);
    if (problem.length <= budget.tokens_per_head(problem)) {
      for (index_t h = 0; h < problem.heads; ++h) of_heads[static_cast<std::size_t>(h)] = problem.candidates_of(h);
      return;
    }
    const index_t stride = problem_of.rows.stride;
    const tensor_view<const std::uint32_t, 2> of_rows(keys + b * problem.heads * stride,
                                                      {problem.heads, problem.length}, {stride, 1});
    budget.allocate(problem, of_rows, of_heads, part_of(shares + b * problem.heads, problem.heads));
  }
};

/// Keeps every token. For each (row of the result, token).
struct keep_everything {
  bulk_rows rows;
  bulk_kept kept;
  index_t width;  ///< items of a row: its capacity, and one where that is 0

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / width;
    const index_t n = item % width;
    const bulk_span& span = rows.span_of(row / kept.copies);
    if (n < span.length) kept.positions[row * kept.capacity + n] = static_cast<position_t>(span.begin + n);
    if (n == 0) kept.lengths[row] = span.length;
  }
};

/// Copies rows of scores to those of the heads that share them. For each (head, token).
template <memory_space Space>
struct describe_scores {
  const float* score;
  const float* smoothed;
  const double* drift;
  bulk_rows rows;
  index_t copies;
  index_t heads;
  index_t tokens;
  tensor_view<float, 3, Space> score_out;     ///< [batch, heads, tokens]
  tensor_view<float, 3, Space> smoothed_out;  ///< [batch, heads, tokens]
  tensor_view<double, 2, Space> drift_out;    ///< [batch, heads]

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t head_row = item / tokens;
    const index_t n = item % tokens;
    const index_t row = head_row / copies;
    const index_t b = head_row / heads;
    const index_t h = head_row % heads;
    if (n == 0) drift_out(b, h) = drift[row];
    if (n >= rows.span_of(row).past) return;
    score_out(b, h, n) = score[row * rows.stride + n];
    smoothed_out(b, h, n) = smoothed[row * rows.stride + n];
  }
};

}  // namespace restkv::detail::bulk
