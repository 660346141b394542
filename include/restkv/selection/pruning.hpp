// SPDX-License-Identifier: Apache-2.0
/// @file
/// Certified pruning: which tokens must be scored so that the kept set is the one that scoring all of them gives.
///
/// A row holds, after smoothing, a score where every token in the smoother's reach was scored, and an upper bound on it
/// elsewhere. Choose as if bounds were scores. When everything chosen is a score, whatever was left out has a bound that
/// lost, and so does its score: the choice is certain. Otherwise more tokens are scored and the choice is repeated. The
/// same holds for the counts of an allocator that depend on which keys are the largest of the layer.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/selection/top_k.hpp>

namespace restkv::detail {

/// True when nothing about a policy's parts but the backend's bounds stands in the way of pruning. Bounds come from
/// distances: there are none for a score that does not say that it grows with them, nor for one of whole heads.
template <class Backend, class Policy>
inline constexpr bool may_prune = monotone_in_distance<decltype(Policy::score)>() &&
                                  bounding_backend<Backend, score_request_of<Policy>> &&
                                  !rescores<decltype(Policy::rescoring)> &&
                                  monotone_spatial_smoother<decltype(Policy::spatial)> &&
                                  ranking_budget_allocator<decltype(Policy::budget)>;

/// One head's row while pruning. `keys` are order keys of smoothed scores and bounds, over the whole sequence; the
/// others, over the tokens that scores are defined for.
template <std::unsigned_integral Key>
struct pruning_row {
  const Key* keys = nullptr;
  index_t length = 0;
  token_state* states = nullptr;
  std::uint8_t* settled = nullptr;  ///< 1: the key is that of a score
  index_t past = 0;
  token_reach reach{};

  [[nodiscard]] index_t first_of(index_t n) const noexcept { return std::clamp<index_t>(n + reach.first, 0, past - 1); }
  [[nodiscard]] index_t last_of(index_t n) const noexcept { return std::clamp<index_t>(n + reach.last, 0, past - 1); }
  [[nodiscard]] Key settled_key(index_t n) const noexcept {
    return n < past && settled[n] != 0 ? keys[n] : Key{excluded_key};
  }

  /// Says of each token whether its key is that of a score. Cost: one pass, whatever the reach.
  void settle() const noexcept {
    index_t begin = 0;
    index_t end = 0;     // [begin, end) has been counted
    index_t bounds = 0;  // tokens there that are not scored
    const auto is_bound = [&](index_t n) { return states[n] == token_state::scored ? index_t{0} : index_t{1}; };
    for (index_t n = 0; n < past; ++n) {
      const index_t first = first_of(n);
      for (const index_t last = last_of(n); end <= last; ++end) bounds += is_bound(end);
      for (; begin < first; ++begin) bounds -= is_bound(begin);
      settled[n] = bounds == 0 ? 1 : 0;
    }
  }

  /// Marks what must be scored before the `count` largest keys are certain, and the keys from `deciding` on with them
  /// (the largest Key: none); those from `enough` on are marked at once. Returns how many tokens were marked.
  index_t want(index_t count, Key deciding, Key enough) const noexcept {
    const auto key_at = [this](index_t, index_t n) { return keys[n]; };
    const auto chosen = find_pivot<Key>(1, length, key_at, count);
    const Key needed = count > 0 ? std::min(chosen.key, deciding) : deciding;
    bool certain = true;
    for (index_t n = 0; n < past && certain; ++n) {
      certain = settled[n] != 0 || keys[n] == excluded_key || keys[n] < needed;
    }
    if (certain) return 0;
    Key threshold = enough;
    if (count > 0) {
      // The count-th largest score so far: no score below it can be chosen. Where there are fewer scores, the first
      // round: some more than asked for, since bounds are not in the order of scores.
      const auto scores = find_pivot<Key>(1, past, [this](index_t, index_t n) { return settled_key(n); }, count);
      threshold = std::min(threshold, scores.key != excluded_key
                                          ? scores.key
                                          : find_pivot<Key>(1, length, key_at, first_round(count)).key);
    }
    index_t marked = 0;
    index_t done = 0;  // tokens before it have been marked or passed over
    for (index_t n = 0; n < past; ++n) {
      if (settled[n] != 0 || keys[n] == excluded_key || keys[n] < threshold) continue;
      const index_t last = last_of(n);
      for (index_t i = std::max(done, first_of(n)); i <= last; ++i) {
        if (states[i] != token_state::bounded) continue;
        states[i] = token_state::wanted;
        ++marked;
      }
      done = std::max(done, last + 1);
    }
    return marked;
  }

  /// Tokens to score in the first round, for `count` to be chosen.
  [[nodiscard]] static constexpr index_t first_round(index_t count) noexcept { return count + count / 16 + 8; }
};

/// The keys from which on a layer's allocator must see scores: {the deciding_keys-th largest key of all heads, and the
/// key down to which tokens are scored at once for it}.
template <std::unsigned_integral Key>
struct deciding_pivots {
  Key deciding = static_cast<Key>(~Key(0));
  Key enough = static_cast<Key>(~Key(0));
};

template <std::unsigned_integral Key>
[[nodiscard]] deciding_pivots<Key> find_deciding(std::span<const pruning_row<Key>> rows, index_t count) noexcept {
  if (count <= 0 || rows.empty()) return {};
  const auto heads = static_cast<index_t>(rows.size());
  const auto key_at = [&](index_t h, index_t n) { return rows[static_cast<std::size_t>(h)].keys[n]; };
  const auto settled_at = [&](index_t h, index_t n) { return rows[static_cast<std::size_t>(h)].settled_key(n); };
  const index_t length = rows[0].length;
  const auto scores = find_pivot<Key>(heads, rows[0].past, settled_at, count);
  return {find_pivot<Key>(heads, length, key_at, count).key,
          scores.key != excluded_key
              ? scores.key
              : find_pivot<Key>(heads, length, key_at, pruning_row<Key>::first_round(count)).key};
}

}  // namespace restkv::detail
