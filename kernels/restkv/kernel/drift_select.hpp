// SPDX-License-Identifier: Apache-2.0
/// @file
/// `window_drift` of the kernels: the sum of the positions of the most attended tokens of every query, by radix
/// selection over logits that are computed again in each pass. Nothing is sorted, and no row of logits leaves a block.
#pragma once

#include <restkv/kernel/attention_scores.hpp>
#include <restkv/selection/order_key.hpp>

#include <span>

namespace restkv::kernel {

/// One digit of a logit's order key, the highest first: 7, 7, 6, 6 and 6 bits.
struct drift_digit {
  int shift;
  int bits;
};
inline constexpr drift_digit drift_passes[] = {{25, 7}, {18, 7}, {12, 6}, {6, 6}, {0, 6}};

/// Every lane before the first pass. Queries of an odd window's end, and sequences without tokens, take no part.
/// Blocks: of 128 lanes.
template <cached T>
struct drift_begin {
  static constexpr int threads = 128;
  struct shared {};

  attention_problem<T> problem;
  const position_t* chosen;  ///< most attended tokens, [batch]
  drift_lane* state;         ///< [batch * kv_heads * lanes]
  std::int32_t* histogram;   ///< [batch * kv_heads * lanes, drift_digits]
  index_t lanes;

  [[nodiscard]] index_t blocks() const noexcept { return (lanes + threads - 1) / threads; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    group.for_each_thread([&](int t) {
      const index_t lane = block * threads + t;
      if (lane >= lanes) return;
      const index_t unit = lane / problem.lanes();
      const head_span span = problem.spans[unit];
      const index_t query = problem.first_query + lane % problem.queries;
      const position_t most = chosen[unit / problem.kv_heads];
      drift_lane start;
      if (query < problem.window_of(span) / 2 * 2) start.chosen = most < span.length ? most : span.length;
      if (start.chosen < 0) start.chosen = 0;
      start.wanted = start.chosen;
      group.write(state[lane], start);
      for (int digit = 0; digit < drift_digits; ++digit) group.write(histogram[lane * drift_digits + digit], 0);
    });
  }
};

/// Where a block of the passes over the tokens works.
template <cached T>
struct drift_place {
  static constexpr int lanes = 32;
  index_t split;
  index_t b;
  index_t kv_head;
  index_t first_lane;  ///< among the lanes of the KV head
  index_t count;
  index_t base;  ///< state of the first lane
  index_t begin;
  index_t end;
  head_span span;

  RESTKV_HD drift_place(const attention_problem<T>& problem, index_t block) noexcept {
    const index_t lane_tiles = tiles(problem);
    split = block % problem.splits;
    first_lane = block / problem.splits % lane_tiles * lanes;
    b = block / problem.splits / lane_tiles / problem.kv_heads;
    kv_head = block / problem.splits / lane_tiles % problem.kv_heads;
    span = problem.span(b, kv_head);
    count = problem.lanes() - first_lane < lanes ? problem.lanes() - first_lane : lanes;
    base = problem.first_lane(b, kv_head) + first_lane;
    begin = split * problem.split_tokens;
    end = begin + problem.split_tokens < span.length ? begin + problem.split_tokens : span.length;
  }
  [[nodiscard]] RESTKV_HD static index_t tiles(const attention_problem<T>& problem) noexcept {
    return (problem.lanes() + lanes - 1) / lanes;
  }
  [[nodiscard]] static index_t blocks(const attention_problem<T>& problem) noexcept {
    return problem.batch * problem.kv_heads * tiles(problem) * problem.splits;
  }
};

/// Counts one digit of the keys that share what is known of their lane's pivot. Blocks: [batch, kv_heads, lane tiles,
/// splits].
template <cached T>
struct drift_count_digits {
  static constexpr int threads = 128;
  using tile = logit_tile<T, drift_place<T>::lanes, threads>;
  struct shared {
    typename tile::operands operands;
    alignas(32) float logits[drift_place<T>::lanes * tile::stride];
    std::int32_t counts[drift_place<T>::lanes * drift_digits];
    drift_lane state[drift_place<T>::lanes];
  };

  attention_problem<T> problem;
  const drift_lane* state;
  std::int32_t* histogram;  ///< [batch * kv_heads * lanes, drift_digits]
  drift_digit digit;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const drift_place<T> at(problem, block);
    if (at.begin >= at.end) return;
    group.for_each(at.count, [&](index_t i) { group.write(memory.state[i], state[at.base + i]); });
    group.for_each(at.count * drift_digits, [&](index_t i) { group.write(memory.counts[i], 0); });
    for (index_t first = at.begin; first < at.end; first += token_tile) {
      tile::compute(group, memory.operands, memory.logits, problem, at.span,
                    {at.b, at.kv_head, at.first_lane, at.count, first});
      group.for_each(at.count * token_tile, [&](index_t item) {
        const index_t lane = item / token_tile;
        const drift_lane known = group.read(memory.state[lane]);
        if (known.chosen == 0 || first + item % token_tile >= at.end) return;
        const std::uint32_t key = order_key(group.read(memory.logits[lane * tile::stride + item % token_tile]));
        const int low = digit.shift + digit.bits;
        if (low < 32 && (key ^ known.key) >> low != 0) return;
        const auto value = static_cast<int>(key >> digit.shift & ((1u << digit.bits) - 1));
        group.add(memory.counts[lane * drift_digits + value], 1);
      });
      group.sync();
    }
    group.for_each(at.count * drift_digits, [&](index_t i) {
      const std::int32_t counted = group.read(memory.counts[i]);
      if (counted != 0) group.add(histogram[at.base * drift_digits + i], counted);
    });
  }
};

/// Finds each lane's digit and clears its counts. Blocks: of 128 lanes.
struct drift_find_digit {
  static constexpr int threads = 128;
  struct shared {};

  drift_lane* state;
  std::int32_t* histogram;
  drift_digit digit;
  index_t lanes;

  [[nodiscard]] index_t blocks() const noexcept { return (lanes + threads - 1) / threads; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    group.for_each_thread([&](int t) {
      const index_t lane = block * threads + t;
      if (lane >= lanes) return;
      drift_lane known = group.read(state[lane]);
      if (known.chosen == 0) return;
      std::int32_t* const counts = histogram + lane * drift_digits;
      bool found = false;
      for (int value = drift_digits - 1; value >= 0; --value) {
        const std::int32_t counted = group.read(counts[value]);
        group.write(counts[value], 0);
        if (found) continue;
        found = counted >= known.wanted;
        if (found) {
          known.key |= static_cast<std::uint32_t>(value) << digit.shift;
        } else {
          known.wanted -= counted;
        }
      }
      group.write(state[lane], known);
    });
  }
};

/// Per split and lane: the sum of the positions of keys above the pivot, and how many equal it; or, once it is known
/// how many equal it in the splits before, the sum of the positions of those among the first `wanted` in all. Blocks:
/// [batch, kv_heads, lane tiles, splits].
template <cached T>
struct drift_sum_positions {
  static constexpr int threads = 128;
  using tile = logit_tile<T, drift_place<T>::lanes, threads>;
  struct shared {
    typename tile::operands operands;
    alignas(32) float logits[drift_place<T>::lanes * tile::stride];
  };

  attention_problem<T> problem;
  const drift_lane* state;
  drift_part* parts;  ///< [batch * kv_heads * lanes, splits]
  bool ties;          ///< the second pass: adds to `above` what ties give

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const drift_place<T> at(problem, block);
    auto part = group.template locals<drift_part, 1>();
    group.for_each_thread([&](int t) {
      part(t)[0] = drift_part{};
      if (ties && t < at.count) part(t)[0] = parts[(at.base + t) * problem.splits + at.split];
    });
    for (index_t first = at.begin; first < at.end; first += token_tile) {
      tile::compute(group, memory.operands, memory.logits, problem, at.span,
                    {at.b, at.kv_head, at.first_lane, at.count, first});
      group.for_each_thread([&](int t) {
        if (t >= at.count) return;
        const drift_lane known = state[at.base + t];
        if (known.chosen == 0) return;
        drift_part& mine = part(t)[0];
        for (index_t n = first; n < first + token_tile && n < at.end; ++n) {
          const std::uint32_t key = order_key(group.read(memory.logits[t * tile::stride + n - first]));
          if (!ties && key > known.key) mine.above += n;
          if (key != known.key) continue;
          if (ties && mine.equal < known.wanted) mine.above += n;
          ++mine.equal;
        }
      });
      group.sync();
    }
    group.for_each_thread([&](int t) {
      if (t < at.count) group.write(parts[(at.base + t) * problem.splits + at.split], part(t)[0]);
    });
  }
};

/// Turns the counts of equal keys into those of the splits before. Blocks: of 128 lanes.
struct drift_rank_ties {
  static constexpr int threads = 128;
  struct shared {};

  drift_part* parts;
  index_t lanes;
  index_t splits;

  [[nodiscard]] index_t blocks() const noexcept { return (lanes + threads - 1) / threads; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    group.for_each_thread([&](int t) {
      const index_t lane = block * threads + t;
      if (lane >= lanes) return;
      std::int64_t before = 0;
      for (index_t s = 0; s < splits; ++s) {
        drift_part part = group.read(parts[lane * splits + s]);
        const std::int64_t here = part.equal;
        part.equal = before;
        before += here;
        group.write(parts[lane * splits + s], part);
      }
    });
  }
};

/// The drift of every query head: the front half's sums less the rear half's. Blocks: of 128 heads.
template <cached T>
struct drift_combine {
  static constexpr int threads = 128;
  struct shared {};

  attention_problem<T> problem;
  const drift_lane* state;
  const drift_part* parts;
  double* out;
  index_t strides[2];
  bool first;  ///< the window's first queries are among the lanes

  [[nodiscard]] index_t blocks() const noexcept {
    return (problem.batch * problem.query_heads + threads - 1) / threads;
  }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    group.for_each_thread([&](int t) {
      const index_t head = block * threads + t;  // [batch, query_heads]
      if (head >= problem.batch * problem.query_heads) return;
      const index_t b = head / problem.query_heads;
      const index_t h = head % problem.query_heads;
      const head_span span = problem.span(b, h / problem.group());
      const index_t pairs = problem.window_of(span) / 2;
      double& cell = out[b * strides[0] + h * strides[1]];
      double drift = first ? 0.0 : group.read(cell);
      index_t chosen = 0;
      for (index_t i = 0; i < problem.queries; ++i) {
        const index_t lane = head * problem.queries + i;
        const drift_lane known = state[lane];
        if (i == 0) chosen = known.chosen;
        if (known.chosen == 0) continue;
        std::int64_t sum = 0;
        for (index_t s = 0; s < problem.splits; ++s) sum += parts[lane * problem.splits + s].above;
        drift += problem.first_query + i < pairs ? static_cast<double>(sum) : -static_cast<double>(sum);
        chosen = known.chosen;
      }
      // A head whose window ended in an earlier block of queries was finished there.
      const bool ends = problem.first_query < 2 * pairs && problem.first_query + problem.queries >= 2 * pairs;
      if (ends && chosen > 0) drift /= static_cast<double>(pairs * chosen);
      group.write(cell, drift);
    });
  }
};

/// The drift of each query head's attention, see `tensor_backend`; `out` [batch, query_heads] lies in the executor's
/// memory, most_attended [batch] on the host. 7 passes over the logits of the window. Nothing waits.
template <class Executor, class Request, element Number, memory_space S, class Caches, memory_space O>
[[nodiscard]] status window_drift(Executor& executor, const Request& request, const layer_view<Number, S>& layer,
                                  const Caches& caches, std::span<const index_t> most_attended,
                                  attention_scratch<Request>& scratch, const tensor_view<double, 2, O>& out) {
  using T = cached_as<Number, Caches>;
  attention_problem<T> problem;
  RESTKV_RETURN_IF_FAILED(make_problem(request, layer, caches, problem));
  problem.perturbation = {};
  problem.perturbed = false;
  if constexpr (!needs_of<Request>::window) {
    upload_table(executor, out.data, out.size(), [](index_t) { return 0.0; });
  } else {
    upload_spans(executor, request, layer, scratch.spans);
    upload_table(executor, scratch.chosen, request.shape.batch, [&](index_t b) {
      return static_cast<position_t>(
          std::min<index_t>(most_attended[static_cast<std::size_t>(b)], std::numeric_limits<position_t>::max()));
    });
    const index_t window = std::max<index_t>(1, request.window_of(layer.key.extent(2)));
    for (index_t first = 0; first < window; first += scratch.queries) {
      set_lanes(problem, scratch, first);
      const index_t lanes = problem.batch * problem.kv_heads * problem.lanes();
      const index_t blocks = drift_place<T>::blocks(problem);
      const drift_begin<T> begin{problem, scratch.chosen, scratch.drift_lanes, scratch.histogram, lanes};
      executor.launch(begin, begin.blocks());
      for (const drift_digit digit : drift_passes) {
        executor.launch(drift_count_digits<T>{problem, scratch.drift_lanes, scratch.histogram, digit}, blocks);
        const drift_find_digit find{scratch.drift_lanes, scratch.histogram, digit, lanes};
        executor.launch(find, find.blocks());
      }
      executor.launch(drift_sum_positions<T>{problem, scratch.drift_lanes, scratch.drift_parts, false}, blocks);
      const drift_rank_ties rank{scratch.drift_parts, lanes, problem.splits};
      executor.launch(rank, rank.blocks());
      executor.launch(drift_sum_positions<T>{problem, scratch.drift_lanes, scratch.drift_parts, true}, blocks);
      const drift_combine<T> combine{
          problem, scratch.drift_lanes, scratch.drift_parts, out.data, {out.stride(0), out.stride(1)}, first == 0};
      executor.launch(combine, combine.blocks());
    }
  }
  return {};
}

}  // namespace restkv::kernel
