// SPDX-License-Identifier: Apache-2.0
/// @file
/// Budgets: how many tokens each head of a layer keeps. The concept, and what every allocator shares.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>
#include <restkv/selection/order_key.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <span>

namespace restkv {

/// One sequence of one layer, as an allocator sees it. Everything is counted in units of eviction: tokens, or chunks
/// and pages of `unit` tokens (`granularity`).
struct budget_problem {
  index_t heads = 0;       ///< rows of the layer's kept set
  index_t length = 0;      ///< units of the sequence, of the longest head where heads differ
  index_t candidates = 0;  ///< units per head that may be evicted: length less the protected ones
  index_t layer = 0;       ///< index of the layer
  index_t layers = 1;      ///< layers of the model
  index_t unit = 1;        ///< tokens of a unit
  /// Candidates of each head, [heads]; empty where all have `candidates`. Heads differ in a cache that was compacted
  /// with a budget for each.
  std::span<const index_t> head_candidates{};

  /// Units per head that are kept whatever the budget.
  [[nodiscard]] RESTKV_HD constexpr index_t protected_tokens() const noexcept { return length - candidates; }
  /// Candidates of head h.
  [[nodiscard]] RESTKV_HD constexpr index_t candidates_of(index_t h) const noexcept {
    return head_candidates.empty() ? candidates : head_candidates[static_cast<std::size_t>(h)];
  }
  /// Candidates of all heads together.
  [[nodiscard]] RESTKV_HD constexpr index_t all_candidates() const noexcept {
    if (head_candidates.empty()) return heads * candidates;
    index_t sum = 0;
    for (const index_t count : head_candidates) sum += count;
    return sum;
  }
};

/// Tokens kept per head, as a count or as a part of the sequence. Protected tokens (window, sinks) are included.
struct budget_size {
  index_t tokens = 1024;  ///< used where ratio is 0
  double ratio = 0.0;     ///< part of the sequence that is kept, in (0, 1]; 0 = use the count

  constexpr budget_size() = default;
  /// A count of tokens.
  constexpr budget_size(std::integral auto count) noexcept  // NOLINT(google-explicit-constructor)
      : tokens(static_cast<index_t>(count)) {}
  /// `keep_ratio(0.2)` keeps a fifth, rounded down. `keep_ratio(0)` keeps nothing, which `check` refuses.
  [[nodiscard]] static constexpr budget_size keep_ratio(double part) noexcept {
    budget_size size(0);
    size.ratio = part;
    return size;
  }

  /// Tokens for a sequence of `length`, never more than it has.
  [[nodiscard]] RESTKV_HD index_t of(index_t length) const noexcept {
    if (ratio == 0.0) return std::min(tokens, length);
    return std::min(length, static_cast<index_t>(std::floor(ratio * static_cast<double>(length))));
  }
  /// Units for a head of a problem, rounded down, never more than it has.
  [[nodiscard]] RESTKV_HD index_t of(const budget_problem& problem) const noexcept {
    return budget_size(*this, problem.unit).of(problem.length);
  }

  /// Fails on a count below 1 and on a ratio outside (0, 1]; the message begins with `owner`.
  [[nodiscard]] status check(const char* owner) const noexcept {
    if (ratio == 0.0 && tokens < 1) {
      return status::error(errc::invalid_argument, "%s keeps %lld tokens per head, must be at least 1", owner,
                           static_cast<long long>(tokens));
    }
    if (!(ratio >= 0.0 && ratio <= 1.0)) {
      return status::error(errc::invalid_argument, "%s keeps a ratio of %g, must be above 0 and at most 1", owner,
                           ratio);
    }
    return {};
  }

 private:
  /// The same budget counted in units.
  RESTKV_HD constexpr budget_size(const budget_size& size, index_t unit) noexcept
      : tokens(size.tokens / unit), ratio(size.ratio) {}
};

namespace detail {

template <class A>
concept has_tokens_per_head = requires(const A& allocator, const budget_problem& problem) {
  { allocator.tokens_per_head(problem) } -> std::convertible_to<index_t>;
};

template <class A>
concept has_most_per_head = requires(const A& allocator, const budget_problem& problem) {
  { allocator.most_per_head(problem) } -> std::convertible_to<index_t>;
};

template <class A, class Key>
concept allocates_by_keys = requires(const A& allocator, const budget_problem& problem,
                                     tensor_view<const Key, 2> keys, std::span<index_t> counts,
                                     std::span<double> scratch) { allocator.allocate(problem, keys, counts, scratch); };

}  // namespace detail

/// A budget allocator.
///
/// `tokens_per_head(problem)`: the mean number of tokens a head of this layer keeps, protected ones included; what
/// it returns is clamped to [protected, length]. `most_per_head(problem)`: the largest number one head may get, for
/// planning. `allocate(problem, keys, counts, scratch)`: sets counts[h], the candidates head h keeps, each within
/// [0, candidates_of(h)]; together they are `chosen_in_layer` exactly, where heads do not differ. A head of a ragged
/// cache with fewer candidates than its share leaves the rest to the others as far as most_per_head allows, or, where
/// all heads get the same, to nobody; never more in all. `scratch` has `heads` doubles.
///
/// An allocator whose heads do not share evenly may have `chosen_in_layer(problem)`, the candidates that all heads
/// together keep, where that is no multiple of the heads; tokens_per_head is then the mean rounded down. One that reads
/// a table of the model may have `check(problem)`, a status that says what does not fit; `select` asks for it.
///
/// `keys` are order keys of the smoothed scores, uint32 for float and uint64 for double, [heads, length]; 0 where a
/// token is protected or may not be chosen. All numbers are in the problem's units.
template <class A>
concept budget_allocator = detail::has_tokens_per_head<A> && detail::has_most_per_head<A> &&
                           detail::allocates_by_keys<A, std::uint32_t> && detail::allocates_by_keys<A, std::uint64_t>;

/// An allocator whose counts depend on nothing but which tokens hold the `deciding_keys(problem)` largest keys of all
/// heads together (0: on no key at all). Certified pruning needs that: other keys may then be bounds. All keys: an
/// allocator may say so at run time, by a number beyond heads * candidates.
template <class A>
concept ranking_budget_allocator = budget_allocator<A> && requires(const A& allocator, const budget_problem& problem) {
  { allocator.deciding_keys(problem) } -> std::convertible_to<index_t>;
};

/// An allocator that lets the heads of a layer compete in one pool: the counts follow from how many of the best
/// `pooled_keys(problem)` keys of all heads together lie in each head. `share_pool(problem, counts, scratch)`, which is
/// RESTKV_HD, turns these numbers into the heads' counts. `pools()` is false where the allocator, as it is set, looks at
/// more than that. Backends that take all rows at once need it.
template <class A>
concept pooled_budget_allocator =
    budget_allocator<A> && requires(const A& allocator, const budget_problem& problem, std::span<index_t> counts,
                                    std::span<double> scratch) {
      { allocator.pools() } -> std::same_as<bool>;
      { allocator.pooled_keys(problem) } -> std::same_as<index_t>;
      allocator.share_pool(problem, counts, scratch);
    };

namespace detail {

/// Candidates of a head that keeps `tokens` tokens, protected ones included.
[[nodiscard]] RESTKV_HD constexpr index_t chosen_of(index_t tokens, const budget_problem& problem) noexcept {
  return std::clamp<index_t>(std::min(tokens, problem.length) - problem.protected_tokens(), 0, problem.candidates);
}

}  // namespace detail

/// Candidates a head keeps on average, from what an allocator asks for.
template <budget_allocator A>
[[nodiscard]] index_t chosen_per_head(const A& allocator, const budget_problem& problem) noexcept {
  return detail::chosen_of(allocator.tokens_per_head(problem), problem);
}

/// Candidates that the heads of a layer keep together: allocator.chosen_in_layer(problem) where it has that, else heads
/// times `chosen_per_head`; never more than there are.
template <budget_allocator A>
[[nodiscard]] index_t chosen_in_layer(const A& allocator, const budget_problem& problem) noexcept {
  index_t chosen = 0;
  if constexpr (requires { { allocator.chosen_in_layer(problem) } -> std::convertible_to<index_t>; }) {
    chosen = allocator.chosen_in_layer(problem);
  } else {
    chosen = problem.heads * chosen_per_head(allocator, problem);
  }
  return std::clamp<index_t>(chosen, 0, problem.all_candidates());
}

/// allocator.check(problem) where it has that.
template <budget_allocator A>
[[nodiscard]] status check_problem(const A& allocator, const budget_problem& problem) noexcept {
  if constexpr (requires { { allocator.check(problem) } -> std::same_as<status>; }) return allocator.check(problem);
  return {};
}

/// Rounds non-negative shares to integers that add up to `total` exactly: every share is rounded down, and the units
/// that are left go to the largest remainders, ties to the smaller index; share i does not pass `ceiling(i)`. `shares`
/// must add up to `total` within rounding and `total` be at most the sum of the ceilings. Cost: O(n^2) in the number
/// of shares, which are heads or layers, and O(n) for each unit that a ceiling cuts off. A share that is not finite
/// counts as 0.
template <std::invocable<std::size_t> Ceiling>
RESTKV_HD void round_to_total(std::span<const double> shares, index_t total, const Ceiling& ceiling,
                              std::span<index_t> counts) noexcept {
  const auto share = [&](std::size_t i) {
    return std::isfinite(shares[i]) ? std::clamp(shares[i], 0.0, static_cast<double>(ceiling(i))) : 0.0;
  };
  index_t given = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    counts[i] = static_cast<index_t>(std::floor(share(i)));
    given += counts[i];
  }
  while (given != total) {
    // Short: the largest remainder below its ceiling gains one. Over (shares that add up to too much): the smallest
    // remainder above 0 loses one.
    std::size_t best = shares.size();
    double best_remainder = 0;
    for (std::size_t i = 0; i < shares.size(); ++i) {
      const double remainder = share(i) - static_cast<double>(counts[i]);
      if (given < total ? counts[i] >= ceiling(i) : counts[i] <= 0) continue;
      const bool better = given < total ? remainder > best_remainder : remainder < best_remainder;
      if (best == shares.size() || better) {
        best = i;
        best_remainder = remainder;
      }
    }
    if (best == shares.size()) return;  // total lies outside [0, sum of ceilings]: nothing can be moved
    const index_t step = given < total ? 1 : -1;
    counts[best] += step;
    given += step;
  }
}

/// The same with one ceiling for all shares.
inline void round_to_total(std::span<const double> shares, index_t total, index_t ceiling,
                           std::span<index_t> counts) noexcept {
  round_to_total(shares, total, [ceiling](std::size_t) { return ceiling; }, counts);
}

/// The same number for each head, as far as it has candidates.
inline void fill_counts(const budget_problem& problem, index_t chosen, std::span<index_t> counts) noexcept {
  for (std::size_t h = 0; h < counts.size(); ++h) {
    counts[h] = std::min(chosen, problem.candidates_of(static_cast<index_t>(h)));
  }
}

}  // namespace restkv
