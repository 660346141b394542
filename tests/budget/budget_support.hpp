// SPDX-License-Identifier: Apache-2.0
// What the budget tests share: random problems with their order keys, and what every allocator promises.
#pragma once

#include "support/check_error.hpp"
#include "support/random.hpp"

#include <restkv/budget/budget.hpp>

#include <limits>
#include <type_traits>

namespace restkv_test {

using restkv::budget_problem;
using restkv::order_key;
using restkv::tensor_view;

template <class Key>
using score_of = std::conditional_t<sizeof(Key) == 4, float, double>;

enum class score_kind { normal, equal, few_values, all_nan, all_lowest, mixed };

template <class Real>
Real random_score(random_engine& random, score_kind kind) {
  constexpr Real infinity = std::numeric_limits<Real>::infinity();
  switch (kind) {
    case score_kind::normal: return static_cast<Real>(std::fabs(normal(random)));
    case score_kind::equal: return Real(0.25);
    case score_kind::few_values: return static_cast<Real>(pick(random, 0, 4));
    case score_kind::all_nan: return std::numeric_limits<Real>::quiet_NaN();
    case score_kind::all_lowest: return -infinity;
    case score_kind::mixed: break;
  }
  const index_t draw = pick(random, 0, 9);
  if (draw == 0) return std::numeric_limits<Real>::quiet_NaN();
  if (draw == 1) return infinity;
  if (draw == 2) return -infinity;
  if (draw == 3) return std::numeric_limits<Real>::denorm_min();
  if (draw == 4) return -Real(0);
  return static_cast<Real>(normal(random));
}

/// One sequence of one layer: the keys of its heads, 0 where a token is protected.
template <class Key>
struct random_problem {
  budget_problem problem{};
  std::vector<Key> keys;                 // [heads, length]
  std::vector<index_t> head_candidates;  // [heads], where heads differ

  random_problem(random_engine& random, score_kind kind) {
    problem.heads = pick(random, 1, 5);
    problem.length = chance(random, 10) ? 0 : pick(random, 1, 60);
    problem.layers = pick(random, 1, 8);
    problem.layer = pick(random, 0, problem.layers - 1);
    const index_t protect = chance(random, 10) ? problem.length : pick(random, 0, problem.length);
    std::vector<bool> is_protected(static_cast<std::size_t>(problem.length));
    std::fill_n(is_protected.begin(), protect, true);
    std::shuffle(is_protected.begin(), is_protected.end(), random);
    problem.candidates = problem.length - protect;
    for (index_t h = 0; h < problem.heads; ++h) {
      for (index_t n = 0; n < problem.length; ++n) {
        const auto score = random_score<score_of<Key>>(random, kind);
        keys.push_back(is_protected[static_cast<std::size_t>(n)] ? Key{restkv::excluded_key} : order_key(score));
      }
    }
  }

  /// Makes the sequence one of pages, and its cache one that was compacted: some heads lose candidates, as the longest
  /// does not.
  void make_ragged(random_engine& random) {
    problem.unit = pick(random, 1, 4);
    const index_t longest = pick(random, 0, problem.heads - 1);
    for (index_t h = 0; h < problem.heads; ++h) {
      index_t left = problem.candidates;
      for (index_t n = 0; n < problem.length && h != longest; ++n) {
        Key& key = keys[static_cast<std::size_t>(h * problem.length + n)];
        if (key == restkv::excluded_key || !chance(random, 60)) continue;
        key = restkv::excluded_key;
        --left;
      }
      head_candidates.push_back(left);
    }
    problem.head_candidates = head_candidates;
  }

  [[nodiscard]] tensor_view<const Key, 2> view() const { return {keys.data(), {problem.heads, problem.length}}; }
};

template <class Allocator, class Key>
std::vector<index_t> allocate(const Allocator& allocator, const budget_problem& problem,
                              const tensor_view<const Key, 2>& keys) {
  std::vector<index_t> counts(static_cast<std::size_t>(problem.heads), -99);
  std::vector<double> scratch(counts.size());
  allocator.allocate(problem, keys, std::span<index_t>(counts), std::span<double>(scratch));
  return counts;
}

/// Every count within [0, candidates of the head], all of them together what the layer keeps; no more than that where
/// heads differ.
template <class Allocator>
void check_promises(const Allocator& allocator, const budget_problem& problem, const std::vector<index_t>& counts) {
  CAPTURE(problem.heads, problem.length, problem.candidates, problem.layer, problem.layers, counts);
  index_t total = 0;
  for (std::size_t h = 0; h < counts.size(); ++h) {
    const index_t count = counts[h];
    CHECK(count >= 0);
    CHECK(count <= problem.candidates_of(static_cast<index_t>(h)));
    CHECK(problem.protected_tokens() + count <=
          std::max(allocator.most_per_head(problem), problem.protected_tokens()));
    total += count;
  }
  const index_t wanted = restkv::chosen_in_layer(allocator, problem);
  if (problem.head_candidates.empty()) {
    CHECK(total == wanted);
  } else {
    CHECK(total <= wanted);
  }
}

/// A plan is made for the longest sequence without a mask. No shorter or masked one may get more than it reserves.
template <class Allocator>
void check_plan_holds(random_engine& random, const Allocator& allocator) {
  const index_t layers = pick(random, 1, 12);
  budget_problem longest{.heads = pick(random, 1, 4),
                         .length = pick(random, 1, 400),
                         .layer = pick(random, 0, layers - 1),
                         .layers = layers};
  const index_t fixed = pick(random, 0, std::min<index_t>(longest.length, 20));
  longest.candidates = longest.length - fixed;
  const index_t capacity = std::clamp(allocator.most_per_head(longest), fixed, longest.length);
  for (int trial = 0; trial < 20; ++trial) {
    budget_problem shorter = longest;
    shorter.length = pick(random, 0, longest.length);
    shorter.candidates = std::max<index_t>(0, shorter.length - fixed);
    if (chance(random, 30)) shorter.candidates = pick(random, 0, shorter.candidates);
    if (shorter.protected_tokens() > capacity) continue;  // more protected than the plan holds: select says so
    const index_t per_head = allocator.tokens_per_head(shorter);
    CAPTURE(longest.length, fixed, capacity, shorter.length, shorter.candidates, shorter.layer, layers, per_head);
    if (shorter.length <= per_head) {
      CHECK(shorter.length <= capacity);  // keeps everything
      continue;
    }
    std::vector<std::uint32_t> keys(static_cast<std::size_t>(shorter.heads * shorter.length));
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const auto n = static_cast<index_t>(i) % shorter.length;
      const auto head = static_cast<index_t>(i) / shorter.length;
      // The first head holds the best scores, so that it gets as much as it can.
      keys[i] = n < shorter.candidates ? order_key(static_cast<float>(head == 0 ? 2 : 1)) : restkv::excluded_key;
    }
    const tensor_view<const std::uint32_t, 2> view(keys.data(), {shorter.heads, shorter.length});
    const auto counts = allocate(allocator, shorter, view);
    for (const index_t count : counts) CHECK(shorter.protected_tokens() + count <= capacity);
  }
}

}  // namespace restkv_test
