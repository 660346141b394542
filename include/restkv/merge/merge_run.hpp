// SPDX-License-Identifier: Apache-2.0
/// @file
/// The steps of `merge`, head by head.
#pragma once

#include <restkv/merge/merge_options.hpp>
#include <restkv/merge/operator.hpp>
#include <restkv/merge/similar_targets.hpp>
#include <restkv/merge/window_guard.hpp>

namespace restkv::detail {

/// The steps of `merge`, for arguments that have been checked.
template <merge_operator Operator, class KeyLayout, class ValueLayout, element T>
class merge_run {
 public:
  using real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using guard_type = window_guard<KeyLayout, ValueLayout, T>;

  merge_run(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer, const Operator& merging,
            const merge_options& options, workspace& space) noexcept
      : cache_(cache),
        layer_(layer),
        merging_(merging),
        options_(options),
        heads_(cache.kept.heads()),
        channels_(layer.key.extent(3)),
        tokens_(layer.key.extent(2)),
        capacity_(cache.kept.capacity()),
        guard_(cache, layer, observes() ? options.window : 0, space),
        targets_(layer.key.extent(0) * heads_, capacity_, channels_, space) {
    const index_t tasks = layer.key.extent(0) * heads_;
    receivers_ = space.take<position_t>(tasks, tokens_);
    order_ = space.take<position_t>(tasks, (options.fraction < 1 ? tokens_ : 0));
    similarities_ = space.take<real>(tasks, tokens_);
    attention_ = space.take<double>(tasks, (Operator::needs_attention ? tokens_ : 0));
    key_sums_ = space.take<real>(tasks, (Operator::merges_keys ? capacity_ * channels_ : 0));
    value_sums_ = space.take<real>(tasks, capacity_, channels_);
    totals_ = space.take<real>(tasks, capacity_);
    counts_ = space.take<position_t>(tasks, capacity_);
    norms_ = space.take<real>(tasks, capacity_);
    rows_ = space.take<real>(tasks, 2, channels_);
    candidates_ = space.take<double>(tasks, 2, channels_);
  }

  template <class ParallelFor>
  void run(const ParallelFor& parallel_for) const {
    parallel_for(layer_.key.extent(0) * heads_, [&](index_t task) { merge_head(task); });
    if (options_.guard != merge_guard::none) guard_.judge_layer(parallel_for);
  }

 private:
  [[nodiscard]] bool observes() const noexcept {
    return options_.guard != merge_guard::none || Operator::needs_attention;
  }
  [[nodiscard]] bool rotates() const noexcept { return !options_.rope.ignore && !options_.rope.frequencies.empty(); }

  void merge_head(index_t task) const noexcept {
    const index_t b = task / heads_;
    const index_t h = task % heads_;
    guard_.prepare(task, Operator::needs_attention ? attention_ + task * tokens_ : nullptr);
    const sequence_span span = guard_.span(task);
    const index_t kept = cache_.kept.lengths(b, h);
    index_t first = 0;  // entries that may receive: [first, last)
    index_t last = kept;
    const auto position = [&](index_t i) { return cache_.kept.positions(b, h, i); };
    while (first < last && position(first) < span.begin + options_.protect.sink) ++first;
    while (last > first && position(last - 1) >= span.begin + span.length - options_.protect.recent) --last;
    if (first == last || kept == span.length) return;
    std::fill(totals_ + task * capacity_, totals_ + task * capacity_ + kept, real(0));
    std::fill(counts_ + task * capacity_, counts_ + task * capacity_ + kept, 0);
    std::fill(value_sums_ + task * capacity_ * channels_, value_sums_ + (task * capacity_ + kept) * channels_, real(0));
    if constexpr (Operator::merges_keys) {
      std::fill(key_sums_ + task * capacity_ * channels_, key_sums_ + (task * capacity_ + kept) * channels_, real(0));
    }
    for (index_t i = first; i < last; ++i) {
      widen_row(cache_.value.row(b, h, i), value_row(task));
      norms_[task * capacity_ + i] = static_cast<real>(norm(value_row(task), channels_));
    }
    if constexpr (Operator::target == merge_target::most_similar) find_targets(task, first, last);
    receive(task, first, last);
    for (index_t i = first; i < last; ++i) {
      if (counts_[task * capacity_ + i] > 0) replace(task, i);
    }
    if (options_.guard != merge_guard::none) guard_.judge(task);
  }

  /// A key as it is compared, [channels].
  template <class Row>
  void read_key(index_t task, index_t token, const Row& row, real* out) const noexcept {
    widen_row(row, out);
    if (rotates()) rotate(task, token, -1.0, out);
  }

  void rotate(index_t task, index_t token, double direction, real* key) const noexcept {
    const auto& rope = options_.rope;
    const index_t kv_head = guard_.kv_head(task % heads_);
    const double position = direction * static_cast<double>(rope.positions.data == nullptr
                                                                ? token
                                                                : rope.positions(task / heads_, kv_head, token));
    const rotary_channels channels(rope.pairs, rope.frequencies.size());
    for (index_t i = 0; i < static_cast<index_t>(rope.frequencies.size()); ++i) {
      const double angle = position * rope.frequencies[static_cast<std::size_t>(i)];
      rotate_pair(key[channels.first(i)], key[channels.second(i)], static_cast<real>(std::cos(angle)),
                  static_cast<real>(std::sin(angle)));
    }
  }

  /// Calls visit(token, key row, value row) for the dropped tokens.
  template <class Visit>
  void for_each_dropped(index_t task, const Visit& visit) const noexcept {
    const index_t b = task / heads_;
    const index_t h = task % heads_;
    const sequence_span span = guard_.span(task);
    index_t next = 0;
    for_each_token(layer_, b, guard_.kv_head(h), span.begin, span.begin + span.length,
                   [&](index_t token, const auto& key, const auto& value) {
                     if (next < cache_.kept.lengths(b, h) && cache_.kept.positions(b, h, next) == token) {
                       ++next;
                     } else {
                       visit(token, key, value);
                     }
                   });
  }

  void find_targets(index_t task, index_t first, index_t last) const noexcept {
    const index_t b = task / heads_;
    const index_t h = task % heads_;
    const sequence_span span = guard_.span(task);
    targets_.begin(task, first, last);
    for (index_t i = first; i < last; ++i) {
      read_key(task, cache_.kept.positions(b, h, i), cache_.key.row(b, h, i), key_row(task));
      targets_.set(task, i, key_row(task));
    }
    position_t* const receivers = receivers_ + task * tokens_;
    real* const similarities = similarities_ + task * tokens_;
    index_t dropped = 0;
    for_each_dropped(task, [&](index_t token, const auto& key, const auto&) {
      read_key(task, token, key, targets_.next(task));
      const index_t at = token - span.begin;
      targets_.add(task, receivers + at, similarities + at);
      ++dropped;
    });
    targets_.finish(task);
    const auto least = static_cast<real>(options_.least_similarity);
    if (options_.fraction < 1) {
      const auto skipped = static_cast<index_t>(std::ceil(static_cast<double>(dropped - 1) * (1 - options_.fraction)));
      keep_most_similar(task, dropped - skipped);
    }
    if (least > -1) {
      for_each_dropped(task, [&](index_t token, const auto&, const auto&) {
        if (!(similarities[token - span.begin] >= least)) receivers[token - span.begin] = -1;
      });
    }
  }

  /// Leaves only `most` of the dropped tokens with a receiver: ties to the smaller position.
  void keep_most_similar(index_t task, index_t most) const noexcept {
    const index_t first = guard_.span(task).begin;
    position_t* const receivers = receivers_ + task * tokens_;
    const real* const similarities = similarities_ + task * tokens_;
    position_t* const order = order_ + task * tokens_;
    index_t count = 0;
    for_each_dropped(task, [&](index_t token, const auto&, const auto&) {
      if (receivers[token - first] >= 0) order[count++] = static_cast<position_t>(token - first);
    });
    if (count <= most) return;
    std::nth_element(order, order + most, order + count, [similarities](position_t x, position_t y) {
      return similarities[x] != similarities[y] ? similarities[x] > similarities[y] : x < y;
    });
    for (index_t i = most; i < count; ++i) receivers[order[i]] = -1;
  }

  /// Adds up what each entry receives.
  void receive(index_t task, index_t first, index_t last) const noexcept {
    const index_t b = task / heads_;
    const index_t h = task % heads_;
    const index_t begin = guard_.span(task).begin;
    index_t next = first;  // first entry behind the token
    for_each_dropped(task, [&](index_t token, const auto& key, const auto& value) {
      merge_pair<real> pair;
      pair.position = token;
      pair.batch = b;
      pair.head = h;
      index_t from = 0;
      index_t count = 1;
      if constexpr (Operator::target == merge_target::most_similar) {
        from = receivers_[task * tokens_ + token - begin];
        if (from < 0) return;
        pair.similarity = similarities_[task * tokens_ + token - begin];
        pair.kept_norm = norms_[task * capacity_ + from];
      } else {
        while (next < last && cache_.kept.positions(b, h, next) < token) ++next;
        from = next;
        count = std::min<index_t>(merging_.targets, last - next);
        if (count == 0) return;
      }
      if constexpr (Operator::needs_attention) {
        const double* const attention = attention_ + task * tokens_;
        double sum = 0;
        for (index_t i = from; i < from + count; ++i) sum += attention[cache_.kept.positions(b, h, i) - begin];
        pair.dropped_attention = static_cast<real>(attention[token - begin]);
        pair.kept_attention = static_cast<real>(sum / static_cast<double>(count));
      }
      widen_row(value, value_row(task));
      if (!all_finite(value_row(task), channels_)) return;
      pair.dropped_norm = static_cast<real>(norm(value_row(task), channels_));
      const real weight = static_cast<real>(merging_.weight(pair)) / static_cast<real>(count);
      if (!(weight > 0) || !std::isfinite(weight)) return;
      if constexpr (Operator::merges_keys) {
        read_key(task, token, key, key_row(task));
        if (!all_finite(key_row(task), channels_)) return;
      }
      for (index_t i = task * capacity_ + from; i < task * capacity_ + from + count; ++i) {
        ++counts_[i];
        totals_[i] += weight;
        for (index_t c = 0; c < channels_; ++c) value_sums_[i * channels_ + c] += weight * value_row(task)[c];
        if constexpr (Operator::merges_keys) {
          for (index_t c = 0; c < channels_; ++c) key_sums_[i * channels_ + c] += weight * key_row(task)[c];
        }
      }
    });
  }

  /// Writes what an entry becomes, unless it is not finite or the guard is against it.
  void replace(index_t task, index_t entry) const noexcept {
    const index_t b = task / heads_;
    const index_t h = task % heads_;
    const index_t i = task * capacity_ + entry;
    const merge_blend<real> blend = merging_.blend(counts_[i], totals_[i]);
    const auto mix = [&](real* row, const real* sums) {
      for (index_t c = 0; c < channels_; ++c) row[c] = blend.own * row[c] + blend.other * sums[c];
    };
    const auto key = cache_.key.row(b, h, entry);
    const auto value = cache_.value.row(b, h, entry);
    widen_row(value, value_row(task));
    mix(value_row(task), value_sums_ + i * channels_);
    if constexpr (Operator::merges_keys) {
      read_key(task, cache_.kept.positions(b, h, entry), key, key_row(task));
      mix(key_row(task), key_sums_ + i * channels_);
      if (rotates()) rotate(task, cache_.kept.positions(b, h, entry), 1.0, key_row(task));
    }
    // What is stored is what counts: rounded first.
    double* const new_key = candidates_ + task * 2 * channels_;
    double* const new_value = new_key + channels_;
    for (index_t c = 0; c < channels_; ++c) {
      new_value[c] = widen<double>(narrow<typename ValueLayout::value_type>(value_row(task)[c]));
      if constexpr (Operator::merges_keys) {
        new_key[c] = widen<double>(narrow<typename KeyLayout::value_type>(key_row(task)[c]));
      } else {
        new_key[c] = widen<double>(key.data[c * key.stride(0)]);
      }
    }
    if (!all_finite(new_value, channels_) || (Operator::merges_keys && !all_finite(new_key, channels_))) return;
    if (options_.guard == merge_guard::token && !guard_.exchange(task, entry, new_key, new_value)) return;
    narrow_row(value_row(task), channels_, value);
    if constexpr (Operator::merges_keys) narrow_row(key_row(task), channels_, key);
  }

  [[nodiscard]] real* key_row(index_t task) const noexcept { return rows_ + task * 2 * channels_; }
  [[nodiscard]] real* value_row(index_t task) const noexcept { return key_row(task) + channels_; }

  merged_cache<KeyLayout, ValueLayout> cache_;
  layer_view<T> layer_;
  Operator merging_;
  merge_options options_;
  index_t heads_;
  index_t channels_;
  index_t tokens_;
  index_t capacity_;
  guard_type guard_;
  similar_targets<real> targets_;
  position_t* receivers_ = nullptr;  // entry that receives a dropped token, -1: none, [tasks, tokens]
  position_t* order_ = nullptr;      // [tasks, tokens]
  real* similarities_ = nullptr;     // [tasks, tokens]
  double* attention_ = nullptr;      // [tasks, tokens]
  real* key_sums_ = nullptr;         // [tasks, capacity, channels]
  real* value_sums_ = nullptr;       // [tasks, capacity, channels]
  real* totals_ = nullptr;           // [tasks, capacity]
  position_t* counts_ = nullptr;     // [tasks, capacity]
  real* norms_ = nullptr;            // of the entries' values, [tasks, capacity]
  real* rows_ = nullptr;             // a key and a value, [tasks, 2, channels]
  double* candidates_ = nullptr;     // a key and a value, [tasks, 2, channels]
};

}  // namespace restkv::detail
