// SPDX-License-Identifier: Apache-2.0
/// @file
/// One decode step of running scores: what a query gave to each token is folded into what the token was worth before.
#pragma once

#include <restkv/core/tensor_view.hpp>
#include <restkv/kernel/group.hpp>
#include <restkv/session/running.hpp>

namespace restkv::kernel {

/// running(q, n) = fold(running(q, n), score(q, n), observers(h, n)) for every query head q of KV head h and every
/// token n that the query gave a score to, then observers(h, n) + 1. Blocks: [kv_heads, tiles of `threads` tokens].
/// Cost: one read of the scores, one read and write of the running scores.
template <running_score Running, memory_space S>
struct update_running {
  static constexpr int threads = 256;
  struct shared {};

  Running reduction;
  tensor_view<const float, 2, S> scores;        ///< [query_heads, tokens]
  tensor_view<const position_t, 1, S> lengths;  ///< tokens of each head, [kv_heads]
  index_t unscored;                             ///< tokens at the end of each head that have no score
  tensor_view<double, 2, S> running;            ///< [query_heads, capacity]
  tensor_view<std::int32_t, 2, S> observers;    ///< [kv_heads, capacity]
  index_t tiles;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    const index_t h = block / tiles;
    const index_t first = block % tiles * threads;
    const index_t left = lengths(h) - unscored - first;
    const index_t count = left < threads ? left : index_t{threads};
    if (count <= 0) return;
    const index_t heads = running.extent(0) / observers.extent(0);
    group.for_each(count * heads, [&](index_t i) {
      const index_t q = h * heads + i / count;
      const index_t n = first + i % count;
      const index_t seen_by = group.read(observers(h, n));
      double& kept = running(q, n);
      const double before = seen_by == 0 ? 0.0 : group.read(kept);
      group.write(kept, reduction.fold(before, static_cast<double>(scores(q, n)), seen_by));
    });
    group.sync();
    group.for_each(count, [&](index_t i) {
      std::int32_t& seen_by = observers(h, first + i);
      group.write(seen_by, group.read(seen_by) + 1);
    });
  }
};

/// Folds one query's scores into the running ones of a layer, all heads at once. capacity: tokens that a head may have.
/// For what moves when tokens are evicted use `compact_in_place`: the running scores of a KV head's query heads are the
/// channels of one token.
template <class Executor, running_score Running, memory_space S>
void fold_scores(Executor& executor, const Running& reduction, const tensor_view<const float, 2, S>& scores,
                 const tensor_view<const position_t, 1, S>& lengths, index_t unscored,
                 const tensor_view<double, 2, S>& running, const tensor_view<std::int32_t, 2, S>& observers) {
  using body = update_running<Running, S>;
  const index_t most = std::min(running.extent(1), scores.extent(1));
  const index_t tiles = (most + body::threads - 1) / body::threads;
  executor.launch(body{reduction, scores, lengths, unscored, running, observers, tiles}, observers.extent(0) * tiles);
}

}  // namespace restkv::kernel
