// SPDX-License-Identifier: Apache-2.0
/// @file
/// Certified pruning on a bulk backend: its element-wise steps. Nothing is read back, so the rounds are counted
/// beforehand where the host's `selection_run` repeats them until the choice is certain.
///
/// A score never passes its bound, and smoothing keeps that. So the k-th largest of the smoothed scores that are known
/// is a threshold: k scores are not below it, and whoever's smoothed bound is below it is not among the k largest. Once
/// everything that reaches the threshold is scored, whatever changes later stays below it, and the k largest are those
/// that scoring all tokens gives, ties included. With fewer than k known scores the threshold is 0: all are scored.
#pragma once

#include <restkv/selection/bulk_steps.hpp>
#include <restkv/selection/pruning.hpp>

namespace restkv::detail::bulk {

/// wanted[row] = the units that decide about a row which chooses counts[row]; 0 where it chooses all. For each row.
struct want_counts {
  bulk_rows rows;
  const index_t* counts;
  index_t* wanted;
  bool first;  ///< of the first round: some more, since bounds are not in the order of scores

  RESTKV_HD void operator()(index_t row) const noexcept {
    const index_t count = counts[row] < rows.span_of(row).candidates ? counts[row] : 0;
    wanted[row] = first && count > 0 ? pruning_row<std::uint32_t>::first_round(count) : count;
  }
};

/// wanted[row] = an even share of the units that are chosen from a pool, rounded up. For each row.
struct want_even_shares {
  const index_t* pooled;  ///< [batch]
  index_t heads;          ///< of a pool
  index_t* wanted;

  RESTKV_HD void operator()(index_t row) const noexcept { wanted[row] = (pooled[row / heads] + heads - 1) / heads; }
};

/// Marks the tokens that must be scored so that all keys from a threshold on are those of scores. A row's threshold is
/// the lower of its own pivot and its pool's. A smoother that reaches too far to be certain of wants every token. For
/// each (row, token).
template <class Spatial>
struct mark_wanted {
  Spatial spatial;
  const std::uint32_t* keys;
  token_state* states;
  const double* drift;
  bulk_rows rows;
  index_t tokens;                                   ///< most of a row
  const top_k_pivot<std::uint32_t>* pivots;         ///< of rows; null: none
  const top_k_pivot<std::uint32_t>* pooled_pivots;  ///< of rows_per_pool rows each; null: none
  index_t rows_per_pool;
  bool first;  ///< no state is known

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / tokens;
    const index_t i = item % tokens;
    const index_t past = rows.span_of(row).past;
    if (i >= past) return;
    token_state& state = states[row * rows.stride + i];
    if (!first && state == token_state::scored) return;
    std::uint32_t threshold = ~std::uint32_t{0};
    if (pivots != nullptr) threshold = pivots[row].key;
    if (pooled_pivots != nullptr) threshold = std::min(threshold, pooled_pivots[row / rows_per_pool].key);
    const token_reach reach = spatial.reach(row_context{.drift = drift[row]});
    bool wanted = reach.last - reach.first >= widest_direct_reach;
    // The tokens n that read token i: clamp(n + reach.first) <= i <= clamp(n + reach.last).
    index_t n = i == 0 ? 0 : std::max<index_t>(0, i - reach.last);
    const index_t last = i == past - 1 ? past - 1 : std::min(past - 1, i - reach.first);
    for (; n <= last && !wanted; ++n) {
      const std::uint32_t key = keys[row * rows.stride + n];
      wanted = key != excluded_key && key >= threshold;
    }
    state = wanted ? token_state::wanted : token_state::bounded;
  }
};

/// settled[u] = the key of token u where it is that of a score, 0 elsewhere. For each (row, token).
template <class Spatial>
struct settle_keys {
  Spatial spatial;
  const std::uint32_t* keys;
  const token_state* states;
  std::uint32_t* settled;
  const double* drift;
  bulk_rows rows;
  index_t tokens;  ///< most of a row

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / tokens;
    const index_t n = item % tokens;
    const bulk_span& span = rows.span_of(row);
    if (n >= span.length) return;
    const index_t at = row * rows.stride;
    const token_reach reach = spatial.reach(row_context{.drift = drift[row]});
    bool known = n < span.past && keys[at + n] != excluded_key;
    for (index_t u = reach.first; u <= reach.last && known; ++u) {
      known = states[at + std::clamp<index_t>(n + u, 0, span.past - 1)] == token_state::scored;
    }
    settled[at + n] = known ? keys[at + n] : std::uint32_t{excluded_key};
  }
};

}  // namespace restkv::detail::bulk
