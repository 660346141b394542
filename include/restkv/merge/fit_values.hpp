// SPDX-License-Identifier: Apache-2.0
/// @file
/// `fit_values`: the kept values are corrected so that the window's outputs are what the full cache gives.
#pragma once

#include <restkv/merge/ridge.hpp>
#include <restkv/merge/window_guard.hpp>

namespace restkv {

/// How values are fitted.
struct fit_options {
  index_t window = 32;  ///< last queries whose outputs are fitted, and judged
  double ridge = 0.1;   ///< weight of the correction's size, relative to the mean square of the attention rows

  /// Fails on a value out of its range.
  [[nodiscard]] status check() const noexcept {
    if (window < 1 || window > 4096) {
      return status::error(errc::invalid_argument, "the observation window is %lld queries, must be within [1, %d]",
                           static_cast<long long>(window), 4096);
    }
    if (ridge > 0 && std::isfinite(ridge)) return {};
    return status::error(errc::invalid_argument, "ridge is %g, must be above 0 and finite", ridge);
  }
};

namespace detail {

/// The steps of `fit_values`, for arguments that have been checked.
template <class KeyLayout, class ValueLayout, element T>
class fit_run {
 public:
  fit_run(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer, const fit_options& options,
          workspace& space) noexcept
      : cache_(cache),
        options_(options),
        tasks_(layer.key.extent(0) * cache.kept.heads()),
        entries_(cache.kept.capacity() + 1),
        channels_(layer.key.extent(3)),
        rows_(layer.query.extent(1) / cache.kept.heads() * std::min(options.window, layer.query.extent(2))),
        guard_(cache, layer, options.window, space) {
    shares_ = space.take<double>(tasks_, rows_, entries_);
    grams_ = space.take<double>(tasks_, rows_, rows_);
    rights_ = space.take<double>(tasks_, rows_, channels_);
  }

  template <class ParallelFor>
  void run(const ParallelFor& parallel_for) const {
    parallel_for(tasks_, [&](index_t task) {
      guard_.prepare(task);
      fit(task);
      guard_.judge(task);
    });
    guard_.judge_layer(parallel_for);
  }

 private:
  void fit(index_t task) const noexcept {
    const index_t b = task / cache_.kept.heads();
    const index_t h = task % cache_.kept.heads();
    const index_t rows = guard_.rows(b);
    const index_t count = cache_.length(b, h);
    if (rows == 0 || count == 0) return;
    double* const shares = shares_ + task * rows_ * entries_;  // P, [rows, count]
    double* const gram = grams_ + task * rows_ * rows_;
    double* const right = rights_ + task * rows_ * channels_;
    const auto seen = guard_.horizon_of(task);
    const running_attention sums = guard_.attention(task);  // as `prepare` left them: over the entries
    for (index_t i = 0; i < count; ++i) {
      widen_row(cache_.key.row(b, h, i), guard_.key_room(task));
      for (index_t r = 0; r < rows; ++r) {
        const bool visible = guard_.position(task, i) < seen(r);
        shares[r * count + i] = visible ? sums.share(r, guard_.key_room(task)) : 0.0;
      }
    }
    for (index_t r = 0; r < rows; ++r) {
      for (index_t s = 0; s <= r; ++s) gram[r * rows + s] = dot(shares + r * count, shares + s * count, count);
      for (index_t c = 0; c < channels_; ++c) right[r * channels_ + c] = -guard_.change(task, r)[c];
    }
    if (!solve_ridge(gram, rows, options_.ridge, right, channels_)) return;
    for (index_t i = 0; i < count; ++i) {
      double* const value = guard_.value_room(task);
      widen_row(cache_.value.row(b, h, i), value);
      for (index_t r = 0; r < rows; ++r) {
        const double share = shares[r * count + i];
        for (index_t c = 0; c < channels_; ++c) value[c] += share * right[r * channels_ + c];
      }
      narrow_row(value, channels_, cache_.value.row(b, h, i));
    }
  }

  merged_cache<KeyLayout, ValueLayout> cache_;
  fit_options options_;
  index_t tasks_;
  index_t entries_;
  index_t channels_;
  index_t rows_;
  window_guard<KeyLayout, ValueLayout, T> guard_;
  double* shares_ = nullptr;  // attention over the entries, [tasks, rows, entries]
  double* grams_ = nullptr;   // [tasks, rows, rows]
  double* rights_ = nullptr;  // [tasks, rows, channels]
};

template <class KeyLayout, class ValueLayout, element T>
[[nodiscard]] status check_observed(const merged_cache<KeyLayout, ValueLayout>& cache,
                                    const layer_view<T>& layer, index_t window) noexcept {
  if (layer.query.data == nullptr) {
    return status::error(errc::missing_input, "%lld queries are to be observed and the layer has no query",
                         static_cast<long long>(window));
  }
  RESTKV_RETURN_IF_FAILED(check_merged(cache, layer, layer.key.extent(2), 1));
  return check_written(cache, layer);
}

}  // namespace detail

/// Bytes of workspace that `fit_values` needs for these arguments. 0 where they do not fit each other: `fit_values`
/// says why.
template <detail::element_layout KeyLayout, detail::element_layout ValueLayout, element T>
[[nodiscard]] std::size_t fit_workspace_bytes(const merged_cache<KeyLayout, ValueLayout>& cache,
                                              const layer_view<T>& layer, const fit_options& options = {}) noexcept {
  if (!options.check().ok() || !detail::check_observed(cache, layer, options.window).ok()) return 0;
  workspace counting;
  const detail::fit_run<KeyLayout, ValueLayout, T> run(cache, layer, options, counting);
  return counting.required_bytes();
}

/// Adds to the values of each head the smallest correction that brings the window's outputs to those of the full cache:
///
///     V' = V + P^T (P P^T + ridge * trace(P P^T) / rows * I)^-1 (O - P V)
///
/// with P the attention of the window's queries, of all query heads of the head, over the entries [rows, entries], and
/// O their outputs over all tokens of `layer` [rows, head_dim]. That is ridge regression: it minimises
/// ||O - P V'||^2 + ridge * trace(P P^T) / rows * ||V' - V||^2, so the error over the window never rises. Keys,
/// positions and the number of entries stay. Least squares for a compacted cache's values: "Fast KV Compaction via
/// Attention Matching" (arXiv 2602.16284); there without a ridge and for more queries than entries.
///
/// `cache` is as for `merge`, and so are `layer`, the guard and what fails; the guard is that of merge_guard::head.
/// Call it last, after `merge` or `add_summary`.
///
/// Cost: the guard's, and rows^2 entries / 2 + rows^3 / 6 multiply-adds a head. Memory: 8 rows (rows + entries) bytes a
/// head beside the guard's.
template <detail::element_layout KeyLayout, detail::element_layout ValueLayout, element T,
          parallel_loop ParallelFor = serial_for>
[[nodiscard]] status fit_values(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer,
                                const fit_options& options, workspace space, const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(options.check());
  RESTKV_RETURN_IF_FAILED(detail::check_observed(cache, layer, options.window));
  const detail::fit_run<KeyLayout, ValueLayout, T> run(cache, layer, options, space);
  RESTKV_RETURN_IF_FAILED(space.check());
  run.run(parallel_for);
  return {};
}

}  // namespace restkv
