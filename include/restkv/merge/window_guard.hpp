// SPDX-License-Identifier: Apache-2.0
/// @file
/// The guard of every step that changes a compacted cache: what the step does to the exact error over the observation
/// window, and the way back where it does not lower it.
#pragma once

#include <restkv/core/workspace.hpp>
#include <restkv/merge/merged_cache.hpp>
#include <restkv/merge/running_attention.hpp>

namespace restkv::detail {

/// The observation window of each head of a merged cache, the full cache's output for it, the cache's error, and a
/// copy of the cache.
///
/// A head's error is the sum over its query heads and the window's rows of ||o' - o||^2; a layer's that of
/// ||sum_h W[h] (o'_h - o_h)||^2. In double, from the entries as they are stored.
template <class KeyLayout, class ValueLayout, element T>
class window_guard {
 public:
  using cache_type = merged_cache<KeyLayout, ValueLayout>;
  using key_type = typename KeyLayout::value_type;
  using value_type = typename ValueLayout::value_type;

  window_guard(const cache_type& cache, const layer_view<T>& layer, index_t window, workspace& space) noexcept
      : cache_(cache), layer_(layer), shape_(shape_of(layer)), heads_(cache.kept.heads()) {
    group_ = window > 0 && heads_ > 0 ? shape_.query_heads / heads_ : 0;
    window_ = window > 0 ? std::min(window, layer.query.extent(2)) : 0;
    entries_ = cache.kept.capacity() + 1;
    const index_t count = shape_.batch * heads_;
    const index_t channels = shape_.head_dim;
    const index_t rows = group_ * window_;
    queries_ = space.take<double>(count, rows, channels);
    outputs_ = space.take<double>(count, rows, channels);
    before_ = space.take<double>(count, rows, channels);
    after_ = space.take<double>(count, rows, channels);
    sums_ = space.take<double>(count, rows, (channels + 2));
    pair_ = space.take<double>(count, 2, channels);
    errors_ = space.take<double>(count, 2);
    lengths_ = space.take<index_t>(count);
    changed_ = space.take<std::uint8_t>(count);
    old_keys_ = space.take<key_type>(count, entries_, channels);
    old_values_ = space.take<value_type>(count, entries_, channels);
    if (layer.projection.data != nullptr && window_ > 0) {
      total_ = space.take<double>(shape_.batch, window_, layer.projection.extent(0));
      gains_ = space.take<double>(shape_.batch, window_);
    }
  }

  /// Queries a head of sequence b observes: those of its query heads behind each other.
  [[nodiscard]] index_t rows(index_t b) const noexcept { return group_ * window_of(b); }
  [[nodiscard]] index_t channels() const noexcept { return shape_.head_dim; }
  [[nodiscard]] const double* query(index_t task, index_t row) const noexcept { return at(queries_, task, row); }
  /// The output of attention over all tokens.
  [[nodiscard]] const double* output(index_t task, index_t row) const noexcept { return at(outputs_, task, row); }
  /// o' - o of the cache as it was when the guard was prepared.
  [[nodiscard]] const double* change(index_t task, index_t row) const noexcept { return at(before_, task, row); }
  [[nodiscard]] index_t kv_head(index_t h) const noexcept { return h * shape_.kv_heads / heads_; }
  [[nodiscard]] sequence_span span(index_t task) const noexcept {
    return sequence(layer_, task / heads_, kv_head(task % heads_));
  }
  /// Where row r of a head sees up to: (*this)(r) is one behind the last position.
  struct horizon {
    index_t first = 0;
    index_t window = 1;
    [[nodiscard]] index_t operator()(index_t row) const noexcept { return first + row % window; }
  };
  [[nodiscard]] horizon horizon_of(index_t task) const noexcept {
    const index_t window = window_of(task / heads_);
    const sequence_span tokens = span(task);
    return {tokens.begin + tokens.length - window + 1, std::max<index_t>(window, 1)};
  }
  /// Where an entry is; one that belongs to no position is in front of all tokens.
  [[nodiscard]] index_t position(index_t task, index_t entry) const noexcept {
    const index_t b = task / heads_;
    const index_t h = task % heads_;
    return entry < cache_.kept.lengths(b, h) ? cache_.kept.positions(b, h, entry) : -1;
  }
  [[nodiscard]] tensor_view<key_type, 1> old_key(index_t task, index_t entry) const noexcept {
    return {old_keys_ + (task * entries_ + entry) * channels(), {channels()}};
  }
  [[nodiscard]] tensor_view<value_type, 1> old_value(index_t task, index_t entry) const noexcept {
    return {old_values_ + (task * entries_ + entry) * channels(), {channels()}};
  }
  /// Room for a key and a value.
  [[nodiscard]] double* key_room(index_t task) const noexcept { return pair_ + task * 2 * channels(); }
  [[nodiscard]] double* value_room(index_t task) const noexcept { return key_room(task) + channels(); }
  /// The running sums of a head, free between calls.
  [[nodiscard]] running_attention attention(index_t task) const noexcept {
    const index_t most = group_ * window_;
    return {channels(), most, queries_ + task * most * channels(), sums_ + task * most * (channels() + 2)};
  }

  /// Copies the head's entries; with a window also computes its output over all tokens and its error, and where asked
  /// the mean attention of each token, from the sequence's first, [length]. Afterwards `attention` holds the sums over
  /// the entries.
  void prepare(index_t task, double* mean_attention = nullptr) const noexcept {
    const index_t b = task / heads_;
    const index_t h = task % heads_;
    changed_[task] = 0;
    lengths_[task] = cache_.length(b, h);
    for (index_t i = 0; i < lengths_[task]; ++i) {
      copy_row(cache_.key.row(b, h, i), old_key(task, i));
      copy_row(cache_.value.row(b, h, i), old_value(task, i));
    }
    if (rows(b) == 0) return;
    for (index_t r = 0; r < rows(b); ++r) {
      const index_t window = window_of(b);
      const auto queries = window_queries(layer_, b, h * group_ + r / window, window);
      widen_row(queries[r % window], at(queries_, task, r));
    }
    const running_attention sums = attention(task);
    sums.clear(rows(b));
    const sequence_span tokens = span(task);
    double* const key = key_room(task);
    double* const value = value_room(task);
    const horizon seen = horizon_of(task);
    const index_t count = rows(b);
    for_each_token(layer_, b, kv_head(h), tokens.begin, tokens.begin + tokens.length,
                   [&](index_t token, const auto& key_row, const auto& value_row) {
                     widen_row(key_row, key);
                     widen_row(value_row, value);
                     for (index_t r = 0; r < count; ++r) {
                       if (token < seen(r)) sums.add(r, key, value);
                     }
                   });
    for (index_t r = 0; r < rows(b); ++r) sums.output(r, at(outputs_, task, r));
    if (mean_attention != nullptr) {
      std::fill(mean_attention, mean_attention + tokens.length, 0.0);
      for_each_token(layer_, b, kv_head(h), tokens.begin, tokens.begin + tokens.length,
                     [&](index_t token, const auto& key_row, const auto&) {
                       widen_row(key_row, key);
                       double& sum = mean_attention[token - tokens.begin];
                       for (index_t r = 0; r < count; ++r) {
                         if (token < seen(r)) sum += sums.share(r, key);
                       }
                       sum /= static_cast<double>(count);
                     });
    }
    errors_[2 * task] = measure(task, before_);
  }

  /// Replaces an entry in the running sums that `prepare` left where that lowers the head's error. The rows are as
  /// stored; the entry itself is the caller's to write. False where the error would not fall.
  bool exchange(index_t task, index_t entry, const double* new_key, const double* new_value) const noexcept {
    const index_t b = task / heads_;
    const index_t count = rows(b);
    const running_attention sums = attention(task);
    const horizon seen = horizon_of(task);
    const index_t at_position = position(task, entry);
    double* const key = key_room(task);
    double* const value = value_room(task);
    widen_row(cache_.key.row(b, task % heads_, entry), key);
    widen_row(cache_.value.row(b, task % heads_, entry), value);
    double gain = 0;
    for (index_t r = 0; r < count; ++r) {
      if (at_position >= seen(r)) continue;
      const double old_weight = sums.weight(r, key);
      const double new_weight = sums.weight(r, new_key);
      const double mass = sums.mass(r) - old_weight + new_weight;
      if (!(mass > 0)) return false;
      const double* const sum = sums.sum(r);
      const double* const wanted = output(task, r);
      for (index_t c = 0; c < channels(); ++c) {
        const double now = sum[c] / sums.mass(r) - wanted[c];
        const double then = (sum[c] - old_weight * value[c] + new_weight * new_value[c]) / mass - wanted[c];
        gain += then * then - now * now;
      }
    }
    if (!(gain < 0)) return false;
    for (index_t r = 0; r < count; ++r) {
      if (at_position >= seen(r)) continue;
      const double old_weight = sums.weight(r, key);
      const double new_weight = sums.weight(r, new_key);
      sums.mass(r) += new_weight - old_weight;
      double* const sum = sums.sum(r);
      for (index_t c = 0; c < channels(); ++c) sum[c] += new_weight * new_value[c] - old_weight * value[c];
    }
    return true;
  }

  /// Keeps what was done to the head since `prepare` where its error fell, and undoes it otherwise. False where it was
  /// undone.
  bool judge(index_t task) const noexcept {
    if (rows(task / heads_) == 0) {
      undo(task);  // nothing to measure it by
      return false;
    }
    errors_[2 * task + 1] = measure(task, after_);
    changed_[task] = errors_[2 * task + 1] < errors_[2 * task] ? 1 : 0;
    if (changed_[task] == 0) undo(task);
    return changed_[task] != 0;
  }

  /// Goes through the heads that `judge` let pass, in order, and undoes those that would raise the layer's error
  /// through W_O, given what was decided before. Does nothing without W_O.
  template <class ParallelFor>
  void judge_layer(const ParallelFor& parallel_for) const {
    if (total_ == nullptr) return;
    const index_t hidden = layer_.projection.extent(0);
    for (index_t h = -1; h < heads_; ++h) {  // -1: the error before
      parallel_for(shape_.batch * window_, [&](index_t task) {
        const index_t b = task / window_;
        const index_t row = task % window_;
        if (row < window_of(b)) project(b, h, row);
      });
      if (h < 0) continue;
      for (index_t b = 0; b < shape_.batch; ++b) {
        const index_t task = b * heads_ + h;
        if (changed_[task] == 0) continue;
        double gain = 0;
        for (index_t row = 0; row < window_of(b); ++row) gain += gains_[b * window_ + row];
        if (gain < 0) continue;
        changed_[task] = 0;
        undo(task);
        for (index_t row = 0; row < window_of(b); ++row) {
          add_step(b, h, row, -1.0, total_ + (b * window_ + row) * hidden);
        }
      }
    }
  }

 private:
  [[nodiscard]] index_t window_of(index_t b) const noexcept { return std::min(window_, shortest_head(layer_, b)); }
  [[nodiscard]] double* at(double* table, index_t task, index_t row) const noexcept {
    return table + (task * group_ * window_ + row) * channels();
  }

  template <class U>
  void copy_row(const tensor_view<U, 1>& from, const tensor_view<U, 1>& to) const noexcept {
    for (index_t c = 0; c < channels(); ++c) to.data[c * to.stride(0)] = from.data[c * from.stride(0)];
  }

  void undo(index_t task) const noexcept {
    const index_t b = task / heads_;
    const index_t h = task % heads_;
    for (index_t i = 0; i < lengths_[task]; ++i) {
      copy_row(old_key(task, i), cache_.key.row(b, h, i));
      copy_row(old_value(task, i), cache_.value.row(b, h, i));
    }
    if (cache_.lengths.data != nullptr) cache_.lengths(b, h) = static_cast<position_t>(lengths_[task]);
  }

  /// o' - o of the stored entries to `changes`; the head's error.
  [[nodiscard]] double measure(index_t task, double* changes) const noexcept {
    const index_t b = task / heads_;
    const index_t h = task % heads_;
    const running_attention sums = attention(task);
    const horizon seen = horizon_of(task);
    const index_t count = rows(b);
    sums.clear(count);
    for (index_t i = 0; i < cache_.length(b, h); ++i) {
      widen_row(cache_.key.row(b, h, i), key_room(task));
      widen_row(cache_.value.row(b, h, i), value_room(task));
      const index_t at_position = position(task, i);
      for (index_t r = 0; r < count; ++r) {
        if (at_position < seen(r)) sums.add(r, key_room(task), value_room(task));
      }
    }
    double error = 0;
    for (index_t r = 0; r < count; ++r) {
      double* const change = at(changes, task, r);
      sums.output(r, change);
      for (index_t c = 0; c < channels(); ++c) change[c] -= at(outputs_, task, r)[c];
      error += restkv::squared_norm(change, channels());
    }
    return error;
  }

  /// Adds factor * sum over the head's query heads of W[h] (after - before) to out. [hidden]
  double add_step(index_t b, index_t h, index_t row, double factor, double* out) const noexcept {
    const index_t task = b * heads_ + h;
    double gain = 0;
    for (index_t i = 0; i < layer_.projection.extent(0); ++i) {
      double step = 0;
      for (index_t g = 0; g < group_; ++g) {
        const double* const old = at(before_, task, g * window_of(b) + row);
        const double* const now = at(after_, task, g * window_of(b) + row);
        const T* const weights = &layer_.projection(i, (h * group_ + g) * channels());
        for (index_t c = 0; c < channels(); ++c) {
          step += widen<double>(weights[c * layer_.projection.stride(1)]) * (now[c] - old[c]);
        }
      }
      gain += step * (2 * out[i] + step);
      out[i] += factor * step;
    }
    return gain;
  }

  void project(index_t b, index_t h, index_t row) const noexcept {
    double* const out = total_ + (b * window_ + row) * layer_.projection.extent(0);
    if (h >= 0) {
      if (changed_[b * heads_ + h] != 0) gains_[b * window_ + row] = add_step(b, h, row, 1.0, out);
      return;
    }
    for (index_t i = 0; i < layer_.projection.extent(0); ++i) {
      out[i] = 0;
      for (index_t q = 0; q < heads_ * group_; ++q) {
        const double* const change = at(before_, b * heads_ + q / group_, q % group_ * window_of(b) + row);
        const T* const weights = &layer_.projection(i, q * channels());
        for (index_t c = 0; c < channels(); ++c) {
          out[i] += widen<double>(weights[c * layer_.projection.stride(1)]) * change[c];
        }
      }
    }
  }

  cache_type cache_;
  layer_view<T> layer_;
  problem_shape shape_;
  index_t heads_;
  index_t group_ = 0;
  index_t window_ = 0;
  index_t entries_ = 0;
  double* queries_;             // [tasks, rows, channels]
  double* outputs_;             // [tasks, rows, channels]
  double* before_;              // o' - o, [tasks, rows, channels]
  double* after_;               // [tasks, rows, channels]
  double* sums_;                // [tasks, rows, channels + 2]
  double* pair_;                // [tasks, 2, channels]
  double* errors_;              // before and after, [tasks, 2]
  index_t* lengths_;            // [tasks]
  std::uint8_t* changed_;       // [tasks]
  key_type* old_keys_;          // [tasks, entries, channels]
  value_type* old_values_;      // [tasks, entries, channels]
  double* total_ = nullptr;     // W_O (o' - o) of all heads, [batch, window, hidden]
  double* gains_ = nullptr;     // [batch, window]
};

}  // namespace restkv::detail
