// SPDX-License-Identifier: Apache-2.0
// What allocators share: sizes, rounding, and the uniform allocator.
#include "budget/budget_support.hpp"

#include <restkv/budget/uniform.hpp>

#include <numeric>

using namespace restkv_test;
using restkv::budget_size;
using restkv::errc;
using restkv::round_to_total;
using restkv::uniform;

namespace {

static_assert(restkv::budget_allocator<uniform>);

std::vector<index_t> rounded(const std::vector<double>& shares, index_t total, index_t ceiling) {
  std::vector<index_t> counts(shares.size(), -99);
  round_to_total(shares, total, ceiling, counts);
  return counts;
}

index_t sum_of(const std::vector<index_t>& counts) { return std::accumulate(counts.begin(), counts.end(), index_t{0}); }

/// Largest remainder by sorting: ties to the smaller index.
std::vector<index_t> by_sorting(const std::vector<double>& shares, index_t total) {
  std::vector<index_t> counts;
  for (const double share : shares) counts.push_back(static_cast<index_t>(std::floor(share)));
  std::vector<std::size_t> order(shares.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return shares[a] - std::floor(shares[a]) > shares[b] - std::floor(shares[b]);
  });
  const index_t left = total - sum_of(counts);
  for (std::size_t i = 0; i < static_cast<std::size_t>(left); ++i) ++counts[order[i]];
  return counts;
}

}  // namespace

TEST_CASE("a budget is a count or a part of the sequence, never more than it has") {
  const budget_size count = 100;
  CHECK(count.of(0) == 0);
  CHECK(count.of(99) == 99);
  CHECK(count.of(100) == 100);
  CHECK(count.of(5000) == 100);
  const auto fifth = budget_size::keep_ratio(0.2);
  CHECK(fifth.of(0) == 0);
  CHECK(fifth.of(4) == 0);
  CHECK(fifth.of(5) == 1);
  CHECK(fifth.of(1000) == 200);
  CHECK(budget_size::keep_ratio(1.0).of(777) == 777);
  random_engine random(1);
  for (int trial = 0; trial < 1000; ++trial) {
    const double ratio = uniform_real(random, 1e-9, 1);
    const index_t length = pick(random, 0, 1'000'000);
    const index_t kept = budget_size::keep_ratio(ratio).of(length);
    CAPTURE(ratio, length, kept);
    CHECK(kept >= 0);
    CHECK(static_cast<double>(kept) <= ratio * static_cast<double>(length));
    CHECK(static_cast<double>(kept + 1) > ratio * static_cast<double>(length));
  }
}

TEST_CASE("budgets that keep nothing or more than everything are refused") {
  CHECK(budget_size(1).check("x").ok());
  CHECK(budget_size::keep_ratio(1.0).check("x").ok());
  CHECK(budget_size::keep_ratio(1e-6).check("x").ok());
  check_error(budget_size(0).check("uniform"), errc::invalid_argument, {0, 1}, "uniform");
  check_error(budget_size(-5).check("uniform"), errc::invalid_argument, {-5, 1}, "uniform");
  // Not the count that is used where there is no ratio.
  check_error(budget_size::keep_ratio(0.0).check("ada_kv"), errc::invalid_argument, {0, 1}, "ada_kv");
  for (const double ratio : {1.5, -0.25, std::numeric_limits<double>::quiet_NaN()}) {
    CAPTURE(ratio);
    check_error(budget_size::keep_ratio(ratio).check("ada_kv"), errc::invalid_argument, {0, 1}, "ada_kv");
  }
  check_error(uniform{0}.check(), errc::invalid_argument, {0, 1}, "uniform");
}

TEST_CASE("round_to_total is the largest remainder, ties to the smaller index") {
  random_engine random(2);
  for (int trial = 0; trial < 3000; ++trial) {
    const auto size = static_cast<std::size_t>(pick(random, 1, 12));
    // Counts, from which a few parts of one unit are moved about: the sum stays whole.
    std::vector<double> shares(size);
    index_t total = 0;
    for (double& share : shares) {
      const index_t whole = pick(random, 0, 20);
      share = static_cast<double>(whole);
      total += whole;
    }
    for (index_t move = pick(random, 0, 8); move > 0; --move) {
      // Eighths are exact in binary, so ties are ties.
      const double part = static_cast<double>(pick(random, 1, 7)) / 8;
      double& from = shares[static_cast<std::size_t>(pick(random, 0, static_cast<index_t>(size) - 1))];
      double& to = shares[static_cast<std::size_t>(pick(random, 0, static_cast<index_t>(size) - 1))];
      if (from < part) continue;
      from -= part;
      to += part;
    }
    const auto counts = rounded(shares, total, 1000);
    CAPTURE(shares, total);
    CHECK(counts == by_sorting(shares, total));
    for (std::size_t i = 0; i < size; ++i) CHECK(std::fabs(static_cast<double>(counts[i]) - shares[i]) < 1);
  }
}

TEST_CASE("round_to_total reaches any total that the ceiling allows, whatever the shares") {
  random_engine random(3);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  for (int trial = 0; trial < 2000; ++trial) {
    const index_t size = pick(random, 1, 8);
    const index_t ceiling = pick(random, 0, 30);
    const index_t total = pick(random, 0, size * ceiling);
    std::vector<double> shares(static_cast<std::size_t>(size));
    for (double& share : shares) {
      const index_t kind = pick(random, 0, 7);
      share = kind == 0   ? std::numeric_limits<double>::quiet_NaN()
              : kind == 1 ? infinity
              : kind == 2 ? -infinity
              : kind == 3 ? 1e300
              : kind == 4 ? -3.5
                          : uniform_real(random, 0, 2 * static_cast<double>(ceiling));
    }
    const auto counts = rounded(shares, total, ceiling);
    CAPTURE(shares, total, ceiling, counts);
    CHECK(sum_of(counts) == total);
    for (const index_t count : counts) {
      CHECK(count >= 0);
      CHECK(count <= ceiling);
    }
  }
  CHECK(rounded({1, 1}, 100, 5) == std::vector<index_t>{5, 5});  // as near as can be, and it ends
  CHECK(rounded({3, 1}, -4, 5) == std::vector<index_t>{0, 0});
  CHECK(rounded({}, 0, 5).empty());
}

TEMPLATE_TEST_CASE("uniform gives every head the same", "", std::uint32_t, std::uint64_t) {
  random_engine random(4);
  for (int trial = 0; trial < 500; ++trial) {
    const random_problem<TestType> made(random, score_kind::mixed);
    const budget_problem& problem = made.problem;
    uniform allocator{pick(random, 1, 80)};
    if (chance(random, 30)) allocator.budget = budget_size::keep_ratio(uniform_real(random, 0.01, 1));
    const auto counts = allocate(allocator, problem, made.view());
    check_promises(allocator, problem, counts);
    const index_t wanted = allocator.budget.of(problem.length) - problem.protected_tokens();
    for (const index_t count : counts) CHECK(count == std::clamp<index_t>(wanted, 0, problem.candidates));
    check_plan_holds(random, allocator);
  }
}

TEST_CASE("budgets are counted in units, rounded down") {
  budget_problem pages{.heads = 2, .length = 10, .candidates = 8, .unit = 16};
  CHECK(budget_size(100).of(pages) == 6);
  CHECK(budget_size(15).of(pages) == 0);
  CHECK(budget_size(16 * 10).of(pages) == 10);
  CHECK(budget_size(100'000).of(pages) == 10);
  CHECK(budget_size::keep_ratio(0.55).of(pages) == 5);
  CHECK(uniform{100}.tokens_per_head(pages) == 6);
  CHECK(restkv::chosen_per_head(uniform{100}, pages) == 4);  // 2 pages are protected
  CHECK(restkv::chosen_in_layer(uniform{100}, pages) == 8);
}

TEMPLATE_TEST_CASE("uniform in a ragged cache: the same for each head, as far as it has candidates", "", std::uint32_t,
                   std::uint64_t) {
  random_engine random(5);
  for (int trial = 0; trial < 500; ++trial) {
    random_problem<TestType> made(random, score_kind::mixed);
    made.make_ragged(random);
    const budget_problem& problem = made.problem;
    const uniform allocator{pick(random, 1, 80 * problem.unit)};
    const auto counts = allocate(allocator, problem, made.view());
    check_promises(allocator, problem, counts);
    const index_t share =
        std::clamp<index_t>(allocator.budget.tokens / problem.unit - problem.protected_tokens(), 0, problem.candidates);
    for (std::size_t h = 0; h < counts.size(); ++h) CHECK(counts[h] == std::min(share, made.head_candidates[h]));
  }
}
