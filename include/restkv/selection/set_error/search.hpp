// SPDX-License-Identifier: Apache-2.0
/// @file
/// The search of `refine_set_error`: which exchanges are tried, and which are accepted.
#pragma once

#include <restkv/selection/kept_tokens.hpp>
#include <restkv/selection/set_error/exchange.hpp>
#include <restkv/selection/set_error/options.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

namespace restkv {

namespace detail {

[[nodiscard]] constexpr index_t observed_count(const set_error& options, index_t query_rows) noexcept {
  return options.window == 0 ? query_rows : options.window;
}

template <element T>
[[nodiscard]] exchange_sizes exchange_sizes_of(const set_error& options, const layer_view<T>& layer,
                                               index_t kept_heads, index_t candidates, index_t capacity) noexcept {
  exchange_sizes sizes;
  sizes.shape = shape_of(layer);
  sizes.kept_heads = kept_heads;
  sizes.hidden = layer.projection.data != nullptr ? layer.projection.extent(0)
                                                  : sizes.shape.query_heads * sizes.shape.head_dim;
  sizes.capacity = std::min(sizes.shape.tokens, candidates + capacity);
  sizes.observed.rows = observed_count(options, layer.query.extent(2));
  sizes.observed.horizon = options.horizon == 0 ? sizes.observed.rows : options.horizon;
  sizes.observed.lanes = padded_set_lanes(sizes.observed.rows);
  return sizes;
}

/// Refines the sets of one batch after the other.
template <class Backend, element T>
class set_error_run {
 public:
  set_error_run(Backend& backend, const set_error& options, const layer_view<T>& layer, const exchange_sizes& sizes,
                const group_metric_view& metric, const const_kept_tokens& candidates, kept_tokens& kept,
                exchange_memory& memory) noexcept
      : options_(options),
        layer_(layer),
        sizes_(sizes),
        candidates_(candidates),
        kept_(kept),
        m_(memory),
        steps_(backend, layer, metric, sizes, memory, static_cast<double>(options.attention_noise)) {}

  void run(set_error_report& report) {
    prepare_weights();
    for (index_t b = 0; b < sizes_.shape.batch; ++b) refine(b, report);
  }

 private:
  void prepare_weights() noexcept {
    normalise(options_.weights, m_.weights);
    normalise(options_.noise_weights.empty() ? options_.weights : options_.noise_weights, m_.noise_weights);
  }
  /// Weights that add up to 1, 0 for the padding; all alike where none are given.
  void normalise(std::span<const float> given, float* out) const noexcept {
    const auto weight_of = [&](index_t i) {
      return given.empty() ? 1.0 : static_cast<double>(given[static_cast<std::size_t>(i)]);
    };
    double sum = 0;
    for (index_t i = 0; i < sizes_.observed.rows; ++i) sum += weight_of(i);
    for (index_t i = 0; i < sizes_.observed.lanes; ++i) {
      out[i] = i < sizes_.observed.rows && sum > 0 ? static_cast<float>(weight_of(i) / sum) : 0.0f;
    }
  }

  void refine(index_t b, set_error_report& report) {
    const bool observed = shortest_head(layer_, b) >= sizes_.observed.horizon &&
                          first_window_row(layer_, b, sizes_.observed.rows) >= 0;
    if (!observed || sizes_.observed.rows == 0 || !gather(b) || !steps_.observe(b)) return;
    const index_t entries = sizes_.kept_heads * sizes_.capacity;
    steps_.evaluate(m_.states, m_.now);
    if (!std::isfinite(m_.now.total)) return;
    report.before += m_.now.total;
    const double window_before = m_.now.window;
    index_t movable = 0;
    for_each_slot([&](index_t, index_t, index_t at) { movable += m_.states[at] == exchange_state::kept ? 1 : 0; });
    index_t most = std::max<index_t>(1, movable / (8 * sizes_.kept_heads));
    for (index_t pass = 0; pass < options_.passes && most > 0; ++pass) {
      steps_.compute_gains();
      const index_t pairs = rank(most);
      ++report.passes;
      index_t count = pairs;
      index_t tries = 0;
      for (; count > 0 && tries < 6; ++tries, count = (count + 3) / 4 == count ? count - 1 : (count + 3) / 4) {
        std::copy_n(m_.states, entries, m_.trial);
        const index_t moved = exchange_best(count);
        if (moved == 0) break;
        steps_.evaluate(m_.trial, m_.next);
        // Both sets are evaluated from the same shares, so the margin is above what rounding makes of them. The
        // observed error may give way to the noise on the way, but not beyond where it began.
        if (m_.next.total < m_.now.total * (1 - 2e-6) && m_.next.window <= window_before) {
          std::swap(m_.now, m_.next);
          std::swap(m_.states, m_.trial);
          report.exchanged += moved;
          break;
        }
      }
      if (pairs == 0 || count == 0 || tries == 6) break;
      most = std::max<index_t>(1, count);
    }
    report.after += m_.now.total;
    scatter(b);
  }

  template <class Visit>
  void for_each_slot(const Visit& visit) const {
    for (index_t row = 0; row < sizes_.kept_heads; ++row) {
      for (index_t n = 0; n < m_.counts[row]; ++n) visit(row, n, row * sizes_.capacity + n);
    }
  }

  /// Merges each head's candidates and kept tokens; false where nothing can be exchanged.
  [[nodiscard]] bool gather(index_t b) noexcept {
    bool any_out = false;
    bool any_kept = false;
    for (index_t row = 0; row < sizes_.kept_heads; ++row) {
      const sequence_span span = sequence(layer_, b, row * sizes_.shape.kv_heads / sizes_.kept_heads);
      index_t i = 0;
      index_t k = 0;
      index_t count = 0;
      const index_t candidates = candidates_.lengths(b, row);
      const index_t kept = kept_.lengths(b, row);
      while (i < candidates || k < kept) {
        const index_t at = row * sizes_.capacity + count++;
        const position_t candidate = i < candidates ? candidates_.positions(b, row, i)
                                                    : std::numeric_limits<position_t>::max();
        const position_t own = k < kept ? kept_.positions(b, row, k) : std::numeric_limits<position_t>::max();
        const position_t token = std::min(candidate, own);
        const bool is_kept = own == token;
        if (candidate == token) ++i;
        if (is_kept) ++k;
        const index_t place = token - span.begin;
        const bool masked = layer_.keep_mask.data != nullptr && layer_.keep_mask(b, token) != 0;
        const bool is_fixed =
            masked || place < options_.protect.sink || place >= span.length - options_.protect.recent;
        m_.tokens[at] = token;
        m_.states[at] = !is_kept ? exchange_state::out : is_fixed ? exchange_state::fixed : exchange_state::kept;
        any_out = any_out || !is_kept;
        any_kept = any_kept || (is_kept && !is_fixed);
      }
      m_.counts[row] = count;
    }
    return any_out && any_kept;
  }

  /// Sorts the tokens that should leave and those that should enter; how many of at most `most` pairs promise to lower
  /// the objective. Ties go to the smaller head, then to the smaller position.
  [[nodiscard]] index_t rank(index_t most) noexcept {
    leaving_ = 0;
    entering_ = 0;
    for_each_slot([&](index_t row, index_t n, index_t at) {
      if (m_.states[at] == exchange_state::fixed || !std::isfinite(m_.gains[at])) return;
      const exchange_entry entry{m_.gains[at], static_cast<std::int32_t>(row), static_cast<std::int32_t>(n)};
      if (m_.states[at] == exchange_state::kept) {
        m_.leave[leaving_++] = entry;
      } else {
        m_.enter[entering_++] = entry;
      }
    });
    const auto before = [](const exchange_entry& x, const exchange_entry& y) {
      if (x.gain != y.gain) return x.gain < y.gain;
      return x.head != y.head ? x.head < y.head : x.index < y.index;
    };
    std::sort(m_.leave, m_.leave + leaving_, before);
    std::sort(m_.enter, m_.enter + entering_, before);
    index_t pairs = 0;
    while (pairs < std::min({most, leaving_, entering_}) && m_.leave[pairs].gain + m_.enter[pairs].gain < 0) ++pairs;
    return pairs;
  }

  /// Exchanges up to `count` pairs in `trial`, the best first, passing over tokens of heads without room; how many.
  index_t exchange_best(index_t count) noexcept {
    for (index_t row = 0; row < sizes_.kept_heads; ++row) {
      m_.lengths[row] = 0;
      for (index_t n = 0; n < m_.counts[row]; ++n) {
        if (m_.states[row * sizes_.capacity + n] != exchange_state::out) ++m_.lengths[row];
      }
    }
    for (index_t i = 0; i < count; ++i) --m_.lengths[m_.leave[i].head];
    index_t moved = 0;
    for (index_t next = 0; next < entering_ && moved < count; ++next) {
      const exchange_entry& entry = m_.enter[next];
      if (m_.lengths[entry.head] >= kept_.capacity()) continue;
      if (entry.gain + m_.leave[moved].gain >= 0) break;
      ++m_.lengths[entry.head];
      m_.trial[entry.head * sizes_.capacity + entry.index] = exchange_state::kept;
      const exchange_entry& leaver = m_.leave[moved++];
      m_.trial[leaver.head * sizes_.capacity + leaver.index] = exchange_state::out;
    }
    // Fewer left than were counted on: a head that a leaver was to make room in may hold one too many.
    for (index_t i = moved; i < count; ++i) {
      if (++m_.lengths[m_.leave[i].head] > kept_.capacity()) return 0;
    }
    return moved;
  }

  void scatter(index_t b) noexcept {
    for (index_t row = 0; row < sizes_.kept_heads; ++row) {
      position_t length = 0;
      for (index_t n = 0; n < m_.counts[row]; ++n) {
        const index_t at = row * sizes_.capacity + n;
        if (m_.states[at] != exchange_state::out) kept_.positions(b, row, length++) = m_.tokens[at];
      }
      kept_.lengths(b, row) = length;
    }
  }

  const set_error& options_;
  const layer_view<T>& layer_;
  exchange_sizes sizes_;
  const const_kept_tokens& candidates_;
  kept_tokens& kept_;
  exchange_memory& m_;
  exchange<Backend, T> steps_;
  index_t leaving_ = 0;
  index_t entering_ = 0;
};

}  // namespace detail

}  // namespace restkv
