// SPDX-License-Identifier: Apache-2.0
/// @file
/// `add_summary`: one more entry a head stands for all tokens that were dropped.
#pragma once

#include <restkv/merge/fit_values.hpp>

namespace restkv {

/// How the dropped tokens are summarised.
struct summary_options {
  index_t window = 32;   ///< last queries that the entry's key is fitted to, and judged by
  double ridge = 0.01;   ///< weight of the key's correction, relative to the mean square of the queries

  /// Fails on a value out of its range.
  [[nodiscard]] status check() const noexcept { return fit_options{window, ridge}.check(); }
};

namespace detail {

/// The steps of `add_summary`, for arguments that have been checked.
template <class KeyLayout, class ValueLayout, element T>
class summary_run {
 public:
  summary_run(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer,
              const summary_options& options, workspace& space) noexcept
      : cache_(cache),
        layer_(layer),
        options_(options),
        tasks_(layer.key.extent(0) * cache.kept.heads()),
        channels_(layer.key.extent(3)),
        rows_(layer.query.extent(1) / cache.kept.heads() * std::min(options.window, layer.query.extent(2))),
        guard_(cache, layer, options.window, space) {
    grams_ = space.take<double>(tasks_, rows_, rows_);
    rights_ = space.take<double>(tasks_, rows_);
    sums_ = space.take<double>(tasks_, 4, channels_);
  }

  template <class ParallelFor>
  void run(const ParallelFor& parallel_for) const {
    parallel_for(tasks_, [&](index_t task) {
      cache_.lengths(task / cache_.kept.heads(), task % cache_.kept.heads()) =
          cache_.kept.lengths(task / cache_.kept.heads(), task % cache_.kept.heads());
      guard_.prepare(task);
      summarise(task);
      guard_.judge(task);
    });
    guard_.judge_layer(parallel_for);
  }

 private:
  void summarise(index_t task) const noexcept {
    const index_t b = task / cache_.kept.heads();
    const index_t h = task % cache_.kept.heads();
    const index_t rows = guard_.rows(b);
    const sequence_span span = guard_.span(task);
    double* const mean_key = sums_ + task * 4 * channels_;
    double* const mean_value = mean_key + channels_;
    double* const key = mean_value + channels_;
    double* const value = key + channels_;
    std::fill(mean_key, key, 0.0);
    index_t next = 0;
    index_t count = 0;
    for_each_token(layer_, b, guard_.kv_head(h), span.begin, span.begin + span.length,
                   [&](index_t token, const auto& key_row, const auto& value_row) {
                     if (next < cache_.kept.lengths(b, h) && cache_.kept.positions(b, h, next) == token) {
                       ++next;
                       return;
                     }
                     widen_row(key_row, key);
                     widen_row(value_row, value);
                     if (!all_finite(key, channels_) || !all_finite(value, channels_)) return;
                     ++count;
                     for (index_t c = 0; c < channels_; ++c) {
                       mean_key[c] += key[c];
                       mean_value[c] += value[c];
                     }
                   });
    if (count == 0 || rows == 0) return;
    for (index_t c = 0; c < channels_; ++c) {
      mean_key[c] /= static_cast<double>(count);
      mean_value[c] /= static_cast<double>(count);
    }
    // The smallest delta with q . delta = sqrt(d) log(count) for the window's queries, up to the ridge.
    double* const gram = grams_ + task * rows_ * rows_;
    double* const right = rights_ + task * rows_;
    for (index_t r = 0; r < rows; ++r) {
      right[r] = std::sqrt(static_cast<double>(channels_)) * std::log(static_cast<double>(count));
      for (index_t s = 0; s <= r; ++s) {
        gram[r * rows + s] = dot(guard_.query(task, r), guard_.query(task, s), channels_);
      }
    }
    if (!solve_ridge(gram, rows, options_.ridge, right, 1)) return;
    for (index_t r = 0; r < rows; ++r) {
      for (index_t c = 0; c < channels_; ++c) mean_key[c] += right[r] * guard_.query(task, r)[c];
    }
    const index_t entry = cache_.kept.lengths(b, h);
    narrow_row(mean_key, channels_, cache_.key.row(b, h, entry));
    narrow_row(mean_value, channels_, cache_.value.row(b, h, entry));
    cache_.lengths(b, h) = static_cast<position_t>(entry + 1);
  }

  merged_cache<KeyLayout, ValueLayout> cache_;
  layer_view<T> layer_;
  summary_options options_;
  index_t tasks_;
  index_t channels_;
  index_t rows_;
  window_guard<KeyLayout, ValueLayout, T> guard_;
  double* grams_ = nullptr;   // [tasks, rows, rows]
  double* rights_ = nullptr;  // [tasks, rows]
  double* sums_ = nullptr;    // means and one token, [tasks, 4, channels]
};

template <class KeyLayout, class ValueLayout, element T>
[[nodiscard]] status check_summary(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer,
                                   const summary_options& options) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(options.check());
  if (cache.lengths.data == nullptr) {
    return status::error(errc::missing_input,
                         "the cache has no lengths, to say which of %lld heads have one more entry",
                         ll(cache.kept.heads()));
  }
  // What lengths holds is not read.
  merged_cache<KeyLayout, ValueLayout> plain = cache;
  plain.lengths = {};
  RESTKV_RETURN_IF_FAILED(check_observed(plain, layer, options.window));
  RESTKV_RETURN_IF_FAILED(check_equal("lengths", "sequences", cache.lengths.extent(0), "the kept set",
                                      cache.kept.batch()));
  RESTKV_RETURN_IF_FAILED(check_equal("lengths", "heads", cache.lengths.extent(1), "the kept set",
                                      cache.kept.heads()));
  RESTKV_RETURN_IF_FAILED(check_distinct("lengths", cache.lengths));
  RESTKV_RETURN_IF_FAILED(check_disjoint("lengths", touched_bytes(cache.lengths), "kept.lengths",
                                         touched_bytes(cache.kept.lengths)));
  RESTKV_RETURN_IF_FAILED(check_disjoint("lengths", touched_bytes(cache.lengths), "kept.positions",
                                         touched_bytes(cache.kept.positions)));
  RESTKV_RETURN_IF_FAILED(check_written(cache, layer));
  RESTKV_RETURN_IF_FAILED(check_disjoint("lengths", touched_bytes(cache.lengths), "layer.lengths",
                                         touched_bytes(layer.lengths)));
  RESTKV_RETURN_IF_FAILED(check_disjoint("lengths", touched_bytes(cache.lengths), "layer.head_lengths",
                                         touched_bytes(layer.head_lengths)));
  for (index_t b = 0; b < cache.kept.batch(); ++b) {
    for (index_t h = 0; h < cache.kept.heads(); ++h) {
      const index_t needed = cache.kept.lengths(b, h) + 1;
      const index_t room = std::min(cache.key.capacity(b, h), cache.value.capacity(b, h));
      if (room >= needed) continue;
      return status::error(errc::shape_mismatch, "head %lld of sequence %lld has room for %lld entries, needs %lld",
                           ll(h), ll(b), ll(room), ll(needed));
    }
  }
  return {};
}

}  // namespace detail

/// Bytes of workspace that `add_summary` needs for these arguments. 0 where they do not fit each other: `add_summary`
/// says why.
template <detail::element_layout KeyLayout, detail::element_layout ValueLayout, element T>
[[nodiscard]] std::size_t summary_workspace_bytes(const merged_cache<KeyLayout, ValueLayout>& cache,
                                                  const layer_view<T>& layer,
                                                  const summary_options& options = {}) noexcept {
  if (!detail::check_summary(cache, layer, options).ok()) return 0;
  workspace counting;
  const detail::summary_run<KeyLayout, ValueLayout, T> run(cache, layer, options, counting);
  return counting.required_bytes();
}

/// Adds an entry behind the kept ones of each head that stands for all n dropped tokens: their mean value, and a key
/// under which attention sees them with the mass n e^(q . k / sqrt(d)) of their mean key k,
///
///     k' = k + Q^T (Q Q^T + ridge * trace(Q Q^T) / rows * I)^-1 (sqrt(d) log n, ..., sqrt(d) log n)
///
/// with Q the window's queries, of all query heads of the head [rows, head_dim]: log n is put into the key along what
/// the queries have in common, so that an ordinary kernel reads it as an ordinary entry. The means are the moments of
/// order 0 and 1 that MomentKV (arXiv 2606.01563) keeps of the evicted tokens, beside the cache and with an attention
/// kernel that knows of them. Tokens that are not finite are left out of the means.
///
/// The entry belongs to no position and is visible to every query; append tokens behind cache.lengths, which is
/// written: kept.lengths + 1, or kept.lengths where nothing was dropped or the guard was against it. `layer`, the guard
/// and what fails are as for `fit_values`; every head needs room for one more entry than it keeps. The key is fitted to
/// the window's queries: the farther the queries move from them, the less is known of what they make of it.
///
/// Cost: the guard's, and rows^2 d / 2 + rows^3 / 6 multiply-adds a head. Memory: 8 rows^2 bytes a head beside the
/// guard's.
template <detail::element_layout KeyLayout, detail::element_layout ValueLayout, element T,
          parallel_loop ParallelFor = serial_for>
[[nodiscard]] status add_summary(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer,
                                 const summary_options& options, workspace space,
                                 const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_summary(cache, layer, options));
  const detail::summary_run<KeyLayout, ValueLayout, T> run(cache, layer, options, space);
  RESTKV_RETURN_IF_FAILED(space.check());
  run.run(parallel_for);
  return {};
}

}  // namespace restkv
