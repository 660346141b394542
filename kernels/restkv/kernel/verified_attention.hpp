// SPDX-License-Identifier: Apache-2.0
/// @file
/// What the verifier's kernels are handed, and its first pass over the keys: each query's attention split into the kept
/// tokens, the top evicted token and the other evicted ones.
#pragma once

#include <restkv/kernel/exact_tile.hpp>
#include <restkv/kernel/gather_rows.hpp>
#include <restkv/verify/attention_split.hpp>

namespace restkv::kernel {

/// Where one KV head's sequence lies, and which queries are verified.
struct verified_span {
  position_t begin = 0;        ///< first token on the token axis
  position_t length = 0;       ///< tokens
  position_t first_row = 0;    ///< row of the query tensor with query 0; below 0 where the sequence is too short for it
  position_t first_query = 0;  ///< the first query that the sequence has
};

/// The kept set as bits of the token axis: bit n % 32 of word n / 32 of [batch, heads, words]. For `for_each`: item i
/// makes word i.
struct kept_bits {
  kept_rows kept;
  std::uint32_t* bits;
  index_t words;  ///< of a head

  RESTKV_HD void operator()(index_t i) const noexcept {
    const index_t b = i / words / kept.heads;
    const index_t h = i / words % kept.heads;
    const index_t first = i % words * 32;
    const index_t end = std::min(kept.length(b, h), kept.capacity);
    index_t slot = 0;  // the first that holds a position of the word
    for (index_t left = end; left > 0;) {
      const index_t half = left / 2;
      if (kept.position(b, h, slot + half) < first) {
        slot += half + 1;
        left -= half + 1;
      } else {
        left = half;
      }
    }
    std::uint32_t word = 0;
    for (; slot < end && kept.position(b, h, slot) < first + 32; ++slot) {
      word |= 1u << (kept.position(b, h, slot) % 32);
    }
    bits[i] = word;
  }
};

/// A layer, the queries that are verified, and the kept set. A *lane* is one query of one query head; the lanes of a KV
/// head are those of its query heads, one head behind the other, so that lanes lie as tables
/// [batch, query_heads, queries] do.
template <element T>
struct verified_attention {
  static_assert(!std::is_same_v<T, double>, "caches on a device are float, half or bfloat16");
  using tile = exact_tile<T>;

  const T* query = nullptr;  ///< [batch, query_heads, rows, head_dim]
  index_t query_strides[4] = {};
  token_chunks<T> key;
  token_chunks<T> value;
  const verified_span* spans = nullptr;  ///< [batch, kv_heads]
  const std::uint32_t* kept = nullptr;   ///< [batch, kept_heads, words], see kept_bits
  double root = 1;                       ///< sqrt(head_dim)
  index_t words = 0;
  index_t batch = 0;
  index_t query_heads = 0;
  index_t kv_heads = 0;
  index_t kept_heads = 0;
  index_t head_dim = 0;
  index_t queries = 0;
  index_t split_tokens = 0;
  index_t splits = 0;

  [[nodiscard]] RESTKV_HD index_t lanes_of_kv_head() const noexcept { return query_heads / kv_heads * queries; }
  [[nodiscard]] RESTKV_HD index_t lanes() const noexcept { return batch * query_heads * queries; }
  [[nodiscard]] RESTKV_HD index_t lane_tiles() const noexcept {
    return (lanes_of_kv_head() + tile::vectors - 1) / tile::vectors;
  }
  /// Blocks of a kernel that takes 16 lanes of a KV head and a split each: [batch, kv_heads, lane tiles, splits].
  [[nodiscard]] index_t blocks() const noexcept { return batch * kv_heads * lane_tiles() * splits; }
  /// Tokens that query `i` sees.
  [[nodiscard]] RESTKV_HD index_t visible(const verified_span& span, index_t i) const noexcept {
    return i < span.first_query ? 0 : span.length - queries + i + 1;
  }
};

/// Where such a block works, and what it knows of its lanes.
template <element T>
struct verified_block {
  using tile = exact_tile<T>;

  /// Of the lanes, in shared memory.
  struct lane_facts {
    const std::uint32_t* kept[tile::vectors];  ///< the bits of the lane's kept set
    position_t seen[tile::vectors];            ///< tokens; 0: there is no such lane, or no such query
  };

  const verified_attention<T>& problem;
  index_t split;
  index_t b;
  index_t kv_head;
  index_t first_lane;  ///< among those of the KV head
  index_t count;       ///< lanes, at most 16
  index_t lane_base;   ///< the first lane's place in tables
  verified_span span;
  index_t begin;  ///< first token of the split
  index_t end;

  RESTKV_HD verified_block(const verified_attention<T>& of, index_t block) noexcept : problem(of) {
    split = block % of.splits;
    const index_t unit = block / of.splits / of.lane_tiles();
    b = unit / of.kv_heads;
    kv_head = unit % of.kv_heads;
    first_lane = block / of.splits % of.lane_tiles() * tile::vectors;
    count = std::min<index_t>(of.lanes_of_kv_head() - first_lane, tile::vectors);
    lane_base = unit * of.lanes_of_kv_head() + first_lane;
    span = of.spans[unit];
    begin = split * of.split_tokens;
    end = std::min<index_t>(begin + of.split_tokens, span.length);
  }

  /// The query head of lane `r`.
  [[nodiscard]] RESTKV_HD index_t head_of(index_t r) const noexcept {
    return kv_head * (problem.query_heads / problem.kv_heads) + (first_lane + r) / problem.queries;
  }

  /// Fills in the lanes' facts. One phase.
  template <class Group>
  RESTKV_HD void begin_lanes(Group& group, lane_facts& facts) const {
    group.for_each(tile::vectors, [&](index_t r) {
      const index_t kept_head = head_of(r) / (problem.query_heads / problem.kept_heads);
      const bool exists = r < count;
      group.write(facts.kept[r],
                  exists ? problem.kept + (b * problem.kept_heads + kept_head) * problem.words : nullptr);
      const index_t query = (first_lane + r) % problem.queries;
      group.write(facts.seen[r], exists ? static_cast<position_t>(problem.visible(span, query)) : 0);
    });
    group.sync();
  }
  /// Whether lane `r`'s kept set holds a token of the sequence.
  template <class Group>
  [[nodiscard]] RESTKV_HD bool keeps(Group& group, const lane_facts& facts, index_t r, index_t n) const {
    const index_t position = span.begin + n;
    return (group.read(facts.kept[r])[position / 32] >> (position % 32) & 1u) != 0;
  }

  /// sums(t)[i] = q . k / sqrt(d) of lane tile::first_vector_of(t) + i and token first + tile::row_of(t). Of those that
  /// are seen; the others' are unspecified.
  template <class Group, class Sums>
  RESTKV_HD void logits(Group& group, typename tile::operands& memory, const lane_facts& facts, Sums& sums,
                        index_t first) const {
    tile::sum(
        group, memory, sums, problem.head_dim,
        [&](int r, index_t c) -> double {
          if (group.read(facts.seen[r]) == 0) return 0.0;
          const index_t row = span.first_row + (first_lane + r) % problem.queries;
          return widen<double>(problem.query[b * problem.query_strides[0] + head_of(r) * problem.query_strides[1] +
                                             row * problem.query_strides[2] + c * problem.query_strides[3]]);
        },
        [&](int t) { return row_of(problem.key, first + t); }, dot_step{});
    group.for_each_thread([&](int t) {
      for (double& x : sums(t)) x = restkv::detail::verified_logit(x, problem.root);
    });
  }
  /// A token's row; null behind the sequence.
  [[nodiscard]] RESTKV_HD token_row<T> row_of(const token_chunks<T>& cache, index_t n) const noexcept {
    if (n >= span.length) return {};
    return cache.row(b, kv_head, span.begin + n);
  }
};

/// The masses of a lane, over some of its tokens.
struct verified_masses : restkv::detail::split_masses {
  position_t top_token = -1;  ///< counted from the sequence's first; -1: nothing is evicted

  RESTKV_HD void keep(double logit) noexcept { kept = restkv::detail::join(kept, {logit, 1.0}); }
  RESTKV_HD void evict(double logit, position_t token) noexcept {
    if (token < 0) return;
    if (top_token < 0 || logit > top.largest || (logit == top.largest && token < top_token)) {
      others = restkv::detail::join(others, top);
      top = {logit, 1.0};
      top_token = token;
    } else {
      others = restkv::detail::join(others, {logit, 1.0});
    }
  }
  RESTKV_HD void merge(const verified_masses& more) noexcept {
    kept = restkv::detail::join(kept, more.kept);
    evict(more.top.largest, more.top_token);
    others = restkv::detail::join(others, more.others);
  }
};

/// One split of the tokens under 16 lanes. Reads every key once for each tile of lanes.
template <element T>
struct verify_masses {
  using tile = exact_tile<T>;
  static constexpr int threads = tile::threads;
  static constexpr int parts_of_lane = threads / tile::vectors;
  static constexpr int stride = tile::rows + 1;
  struct shared {
    typename tile::operands operands;
    typename verified_block<T>::lane_facts facts;
    double logits[tile::vectors * stride];
    verified_masses parts[threads];
  };

  verified_attention<T> problem;
  verified_masses* parts;  ///< [lanes, splits]

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const verified_block<T> at(problem, block);
    at.begin_lanes(group, memory.facts);
    auto sums = group.template locals<double, tile::pairs>();
    auto masses = group.template locals<verified_masses, 1>();
    group.for_each_thread([&](int t) { masses(t)[0] = verified_masses{}; });
    for (index_t first = at.begin; first < at.end; first += token_tile) {
      at.logits(group, memory.operands, memory.facts, sums, first);
      group.for_each_thread([&](int t) {
        double* const column = memory.logits + tile::first_vector_of(t) * stride + tile::row_of(t);
        unrolled<tile::pairs>([&](auto i) { group.write(column[i * stride], sums(t)[i]); });
      });
      group.sync();
      group.for_each_thread([&](int t) {
        const int r = t / parts_of_lane;
        const position_t seen = group.read(memory.facts.seen[r]);
        for (int i = t % parts_of_lane; i < token_tile; i += parts_of_lane) {
          const auto n = static_cast<position_t>(first + i);
          if (n >= seen) break;
          const double logit = group.read(memory.logits[r * stride + i]);
          if (at.keeps(group, memory.facts, r, n)) {
            masses(t)[0].keep(logit);
          } else {
            masses(t)[0].evict(logit, n);
          }
        }
      });
      group.sync();
    }
    group.for_each_thread([&](int t) { group.write(memory.parts[t], masses(t)[0]); });
    group.sync();
    group.for_each(at.count, [&](index_t r) {
      verified_masses all;
      for (int i = 0; i < parts_of_lane; ++i) all.merge(group.read(memory.parts[r * parts_of_lane + i]));
      group.write(parts[(at.lane_base + r) * problem.splits + at.split], all);
    });
  }
};

/// The splits of each lane in ascending order. For `for_each`: item i is lane i.
struct join_masses {
  const verified_masses* parts;  ///< [lanes, splits]
  verified_masses* masses;       ///< [lanes]
  index_t splits;

  RESTKV_HD void operator()(index_t lane) const noexcept {
    verified_masses all;
    for (index_t i = 0; i < splits; ++i) all.merge(parts[lane * splits + i]);
    masses[lane] = all;
  }
};

}  // namespace restkv::kernel
