// SPDX-License-Identifier: Apache-2.0
#include "budget/budget_support.hpp"

#include <restkv/budget/ada_kv.hpp>

#include <numeric>

using namespace restkv_test;
using restkv::ada_kv;
using restkv::budget_size;
using restkv::errc;

namespace {

static_assert(restkv::budget_allocator<ada_kv>);

/// How many of the layer's `total` best candidates each head has, by sorting (score, head, token). `scores` are the
/// keys, or whatever they were turned into.
template <class Score, class Key>
std::vector<index_t> best_by_sorting(const random_problem<Key>& made, const std::vector<Score>& scores, index_t total) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < made.keys.size(); ++i) {
    if (made.keys[i] != restkv::excluded_key) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
  std::vector<index_t> counts(static_cast<std::size_t>(made.problem.heads));
  for (std::size_t i = 0; i < std::min(order.size(), static_cast<std::size_t>(total)); ++i) {
    ++counts[order[i] / static_cast<std::size_t>(made.problem.length)];
  }
  return counts;
}

/// The counts of the published formula before rounding: count (1 - floor) + base floor.
std::vector<double> mixed(const std::vector<index_t>& counts, index_t base, float floor) {
  std::vector<double> shares;
  for (const index_t count : counts) {
    shares.push_back(static_cast<double>(count) * (1.0 - static_cast<double>(floor)) +
                     static_cast<double>(base) * static_cast<double>(floor));
  }
  return shares;
}

ada_kv random_allocator(random_engine& random) {
  ada_kv allocator{.budget = pick(random, 1, 70)};
  if (chance(random, 30)) allocator.budget = budget_size::keep_ratio(uniform_real(random, 0.01, 1));
  const float floors[] = {0.0f, 0.2f, 0.5f, 1.0f, static_cast<float>(uniform_real(random, 0, 1))};
  allocator.floor = floors[pick(random, 0, 4)];
  return allocator;
}

const auto every_kind = {score_kind::normal,  score_kind::equal,      score_kind::few_values,
                         score_kind::all_nan, score_kind::all_lowest, score_kind::mixed};

}  // namespace

TEMPLATE_TEST_CASE("ada_kv is the competition of all heads, by sorting", "", std::uint32_t, std::uint64_t) {
  random_engine random(1);
  for (int trial = 0; trial < 300; ++trial) {
    for (const score_kind kind : every_kind) {
      const random_problem<TestType> made(random, kind);
      ada_kv allocator = random_allocator(random);
      const auto counts = allocate(allocator, made.problem, made.view());
      check_promises(allocator, made.problem, counts);
      const index_t base = restkv::chosen_per_head(allocator, made.problem);
      const auto best = best_by_sorting(made, made.keys, made.problem.heads * base);
      const auto shares = mixed(best, base, allocator.floor);
      CAPTURE(trial, static_cast<int>(kind), allocator.floor, base, best, counts);
      for (std::size_t h = 0; h < counts.size(); ++h) {
        CHECK(std::fabs(static_cast<double>(counts[h]) - shares[h]) < 1.0 + 1e-9);
        // No head gets less than the floor's part of a uniform budget.
        CHECK(static_cast<double>(counts[h]) >= std::floor(static_cast<double>(allocator.floor) *
                                                           static_cast<double>(base) * (1 - 1e-9)));
      }
      allocator.floor = 0;
      CHECK(allocate(allocator, made.problem, made.view()) == best);
      allocator.floor = 1;
      for (const index_t count : allocate(allocator, made.problem, made.view())) CHECK(count == base);
    }
  }
}

TEST_CASE("ties at the cut go to the smaller head") {
  budget_problem problem{.heads = 3, .length = 4, .candidates = 4};
  const std::vector<std::uint32_t> equal(12, order_key(1.0f));
  const tensor_view<const std::uint32_t, 2> keys(equal.data(), {3, 4});
  CHECK(allocate(ada_kv{.budget = 1, .floor = 0}, problem, keys) == std::vector<index_t>{3, 0, 0});
  CHECK(allocate(ada_kv{.budget = 2, .floor = 0}, problem, keys) == std::vector<index_t>{4, 2, 0});
  CHECK(allocate(ada_kv{.budget = 4, .floor = 0}, problem, keys) == std::vector<index_t>{4, 4, 4});
  // 3 (1 - 0.5) + 0.5 and twice 0.5: the unit that is left goes to the first of the equal remainders.
  CHECK(allocate(ada_kv{.budget = 1, .floor = 0.5f}, problem, keys) == std::vector<index_t>{2, 1, 0});
}

TEST_CASE("NaN scores lose against every number") {
  constexpr float nan_score = std::numeric_limits<float>::quiet_NaN();
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  std::vector<std::uint32_t> keys;
  for (const float score : {nan_score, nan_score, nan_score, lowest, lowest, lowest}) keys.push_back(order_key(score));
  budget_problem problem{.heads = 2, .length = 3, .candidates = 3};
  const tensor_view<const std::uint32_t, 2> view(keys.data(), {2, 3});
  CHECK(allocate(ada_kv{.budget = 1, .floor = 0}, problem, view) == std::vector<index_t>{0, 2});
  CHECK(allocate(ada_kv{.budget = 2, .floor = 0}, problem, view) == std::vector<index_t>{1, 3});
}

TEMPLATE_TEST_CASE("normalise scales a head by the part of its sum that its best tokens hold", "", std::uint32_t,
                   std::uint64_t) {
  random_engine random(2);
  using real = score_of<TestType>;
  for (int trial = 0; trial < 500; ++trial) {
    const random_problem<TestType> made(random, chance(random, 70) ? score_kind::normal : score_kind::few_values);
    ada_kv allocator = random_allocator(random);
    allocator.normalise = true;
    const index_t base = restkv::chosen_per_head(allocator, made.problem);
    const auto length = static_cast<std::size_t>(made.problem.length);
    std::vector<double> scaled(made.keys.size());
    bool near_tie = false;
    for (std::size_t h = 0; h < static_cast<std::size_t>(made.problem.heads); ++h) {
      std::vector<double> row;
      for (std::size_t n = 0; n < length; ++n) {
        const TestType key = made.keys[h * length + n];
        if (key != restkv::excluded_key) row.push_back(static_cast<double>(restkv::score_of_key<real>(key)));
      }
      std::sort(row.rbegin(), row.rend());
      const double all = std::accumulate(row.begin(), row.end(), 0.0);
      const double best = std::accumulate(row.begin(), row.begin() + std::min<index_t>(base, std::ssize(row)), 0.0);
      for (std::size_t n = 0; n < length; ++n) {
        const TestType key = made.keys[h * length + n];
        if (key == restkv::excluded_key) continue;
        scaled[h * length + n] = all > 0 ? static_cast<double>(restkv::score_of_key<real>(key)) * (best / all) : 0;
      }
    }
    // Sums in another order: leave alone what is decided by the last bits.
    auto sorted = scaled;
    std::sort(sorted.rbegin(), sorted.rend());
    const auto cut = static_cast<std::size_t>(made.problem.heads * base);
    if (cut > 0 && cut < sorted.size()) near_tie = sorted[cut - 1] - sorted[cut] <= 1e-9 * sorted[cut - 1];
    const auto counts = allocate(allocator, made.problem, made.view());
    check_promises(allocator, made.problem, counts);
    if (near_tie) continue;
    allocator.floor = 0;
    CAPTURE(trial, base, made.problem.heads, made.problem.length);
    CHECK(allocate(allocator, made.problem, made.view()) ==
          best_by_sorting(made, scaled, made.problem.heads * base));
  }
}

TEMPLATE_TEST_CASE("normalise keeps every promise on scores that are no numbers", "", std::uint32_t, std::uint64_t) {
  random_engine random(3);
  for (int trial = 0; trial < 300; ++trial) {
    for (const score_kind kind : every_kind) {
      const random_problem<TestType> made(random, kind);
      ada_kv allocator = random_allocator(random);
      allocator.normalise = true;
      check_promises(allocator, made.problem, allocate(allocator, made.problem, made.view()));
    }
  }
}

TEMPLATE_TEST_CASE("in a ragged cache the heads with candidates take what the others leave", "", std::uint32_t,
                   std::uint64_t) {
  random_engine random(5);
  index_t all_used = 0;
  for (int trial = 0; trial < 600; ++trial) {
    random_problem<TestType> made(random, chance(random, 70) ? score_kind::normal : score_kind::mixed);
    made.make_ragged(random);
    const budget_problem& problem = made.problem;
    ada_kv allocator = random_allocator(random);
    allocator.budget.tokens *= problem.unit;
    const auto counts = allocate(allocator, problem, made.view());
    check_promises(allocator, problem, counts);
    const index_t base = restkv::chosen_per_head(allocator, problem);
    const index_t most = allocator.most_per_head(problem) - problem.protected_tokens();
    index_t room = 0;
    for (const index_t candidates : made.head_candidates) room += std::min(candidates, most);
    CAPTURE(trial, base, most, made.head_candidates, counts, allocator.floor);
    CHECK(std::accumulate(counts.begin(), counts.end(), index_t{0}) == std::min(problem.heads * base, room));
    all_used += problem.heads * base <= room ? 1 : 0;
    if (allocator.floor != 0) continue;
    const auto best = best_by_sorting(made, made.keys, problem.heads * base);
    if (std::all_of(best.begin(), best.end(), [&](index_t count) { return count <= most; })) CHECK(counts == best);
  }
  CHECK(all_used > 300);
}

TEST_CASE("a plan for the longest sequence holds every shorter one") {
  random_engine random(4);
  for (int trial = 0; trial < 1000; ++trial) check_plan_holds(random, random_allocator(random));
}

TEST_CASE("the floor must lie in [0, 1]") {
  CHECK(ada_kv{}.check().ok());
  CHECK(ada_kv{.floor = 0}.check().ok());
  CHECK(ada_kv{.floor = 1}.check().ok());
  for (const float floor : {-0.1f, 1.1f, std::numeric_limits<float>::quiet_NaN()}) {
    CAPTURE(floor);
    check_error(ada_kv{.floor = floor}.check(), errc::invalid_argument, {0, 1}, "ada_kv.floor");
  }
  check_error(ada_kv{.budget = -1}.check(), errc::invalid_argument, {-1, 1}, "ada_kv");
}
