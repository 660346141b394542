// SPDX-License-Identifier: Apache-2.0
#include "budget/budget_support.hpp"

#include <restkv/budget/pyramid.hpp>

using namespace restkv_test;
using restkv::budget_size;
using restkv::errc;
using restkv::pyramid;
using restkv::pyramid_rounding;

namespace {

static_assert(restkv::budget_allocator<pyramid>);

/// Tokens chosen per head in every layer.
std::vector<index_t> shares_of(const pyramid& allocator, budget_problem problem) {
  std::vector<index_t> shares;
  for (problem.layer = 0; problem.layer < problem.layers; ++problem.layer) {
    shares.push_back(allocator.tokens_per_head(problem) - problem.protected_tokens());
  }
  return shares;
}

budget_problem random_model(random_engine& random) {
  budget_problem problem{.heads = pick(random, 1, 4), .length = pick(random, 1, 5000), .layers = pick(random, 1, 80)};
  problem.candidates = problem.length - pick(random, 0, std::min<index_t>(problem.length, 64));
  return problem;
}

pyramid random_pyramid(random_engine& random, pyramid_rounding rounding) {
  pyramid allocator{.beta = chance(random, 30) ? 20.0f : static_cast<float>(uniform_real(random, 1, 50)),
                    .rounding = rounding};
  allocator.budget = chance(random, 30) ? budget_size::keep_ratio(uniform_real(random, 0.01, 1))
                                        : budget_size(pick(random, 1, 3000));
  return allocator;
}

}  // namespace

TEST_CASE("the released rounding is the published formula") {
  random_engine random(1);
  for (int trial = 0; trial < 3000; ++trial) {
    const budget_problem problem = random_model(random);
    const index_t beta = pick(random, 1, 40);
    const pyramid allocator{.budget = pick(random, 1, 3000), .beta = static_cast<float>(beta),
                            .rounding = pyramid_rounding::released};
    const index_t mean = allocator.budget.of(problem.length) - problem.protected_tokens();  // B - w
    if (mean < 0) continue;
    const auto shares = shares_of(allocator, problem);
    for (index_t layer = 0; layer < problem.layers; ++layer) {
      index_t expected = mean;
      if (problem.length > allocator.budget.of(problem.length) && problem.layers > 1) {
        index_t least = mean / beta;
        index_t most = 2 * mean - least;
        if (most >= problem.candidates) {
          most = problem.candidates;
          least = 2 * mean - most;
        }
        expected = most - layer * ((most - least) / (problem.layers - 1));
      }
      CAPTURE(problem.length, problem.candidates, problem.layers, layer, mean, beta);
      CHECK(shares[static_cast<std::size_t>(layer)] == expected);
    }
  }
}

TEST_CASE("the exact rounding adds up to the layers' total and stays on the ramp") {
  random_engine random(2);
  for (int trial = 0; trial < 3000; ++trial) {
    const budget_problem problem = random_model(random);
    const pyramid allocator = random_pyramid(random, pyramid_rounding::exact);
    const index_t mean = std::max<index_t>(0, allocator.budget.of(problem.length) - problem.protected_tokens());
    if (allocator.budget.of(problem.length) < problem.protected_tokens()) continue;
    const auto shares = shares_of(allocator, problem);
    CAPTURE(problem.length, problem.candidates, problem.layers, mean, allocator.beta);
    double most = 2.0 * static_cast<double>(mean) - static_cast<double>(mean) / static_cast<double>(allocator.beta);
    most = problem.layers == 1 ? static_cast<double>(mean) : std::min(most, static_cast<double>(problem.candidates));
    const double least = 2.0 * static_cast<double>(mean) - most;
    index_t total = 0;
    for (index_t layer = 0; layer < problem.layers; ++layer) {
      const index_t share = shares[static_cast<std::size_t>(layer)];
      const double depth = static_cast<double>(layer) / static_cast<double>(std::max<index_t>(problem.layers - 1, 1));
      CHECK(share >= 0);
      CHECK(share <= problem.candidates);
      CHECK(std::fabs(static_cast<double>(share) - (most + depth * (least - most))) < 1.0 + 1e-6);
      total += share;
    }
    CHECK(total == problem.layers * mean);
  }
}

TEST_CASE("kvpress: the ramp is over the protected tokens too") {
  const auto kept = [](index_t length, index_t window, index_t layers, double ratio, float beta) {
    const pyramid allocator{
        .budget = budget_size::keep_ratio(ratio), .beta = beta, .rounding = pyramid_rounding::kvpress};
    std::vector<index_t> counts;
    budget_problem problem{.heads = 1, .length = length, .candidates = length - window, .layers = layers};
    for (problem.layer = 0; problem.layer < layers; ++problem.layer) {
      counts.push_back(allocator.tokens_per_head(problem));
      CHECK(counts.back() <= allocator.most_per_head(problem));
    }
    return counts;
  };
  // n = 500: least 25, most 975 passes 936: 936 and 64.
  CHECK(kept(1000, 64, 5, 0.5, 20) == std::vector<index_t>{936, 718, 500, 282, 64});
  CHECK(kept(1000, 65, 5, 0.5, 20) == std::vector<index_t>{935, 718, 500, 282, 65});
  // n = 100: least 5 is below the window: uniform.
  CHECK(kept(1000, 64, 4, 0.1, 20) == std::vector<index_t>{100, 100, 100, 100});
  // n = 102.5: 51.25 to 153.75, half-way 102.5: to the even number.
  CHECK(kept(205, 8, 3, 0.5, 2) == std::vector<index_t>{154, 102, 51});
  CHECK(kept(207, 8, 3, 0.5, 2) == std::vector<index_t>{155, 104, 52});

  random_engine random(6);
  index_t ramps = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    const index_t window = pick(random, 0, 64);
    const index_t length = window + pick(random, 1, 3000);
    const index_t layers = pick(random, 2, 60);
    const double ratio = uniform_real(random, 0.05, 1);
    const auto beta = static_cast<float>(pick(random, 1, 30));
    const auto counts = kept(length, window, layers, ratio, beta);
    index_t total = 0;
    for (const index_t count : counts) {
      CHECK(count >= 0);
      CHECK(count <= length);
      total += count;
    }
    // The mean over the layers is the budget, apart from rounding.
    CHECK(std::fabs(static_cast<double>(total) / static_cast<double>(layers) - ratio * static_cast<double>(length)) <=
          0.51);
    ramps += counts.front() > counts.back() + 1 ? 1 : 0;
  }
  CHECK(ramps > 300);
}

TEST_CASE("beta 1 is uniform, and the largest beta leaves the last layer nothing") {
  const budget_problem problem{.heads = 2, .length = 1000, .candidates = 968, .layers = 10};
  for (const auto rounding : {pyramid_rounding::exact, pyramid_rounding::released}) {
    for (const index_t share : shares_of({.budget = 132, .beta = 1.0f, .rounding = rounding}, problem)) {
      CHECK(share == 100);
    }
    const auto steep = shares_of({.budget = 132, .beta = 1e30f, .rounding = rounding}, problem);
    CHECK(steep.front() >= 188);  // 2 m less at most N - 1 for the integer slope
    CHECK(steep.back() <= 10);
    for (std::size_t layer = 1; layer < steep.size(); ++layer) CHECK(steep[layer] <= steep[layer - 1]);
  }
}

TEST_CASE("a budget below the protected tokens is reported as it is") {
  // select and make_plan compare it with what is protected; a pyramid must not hide that.
  const budget_problem problem{.heads = 2, .length = 1000, .candidates = 900, .layer = 2, .layers = 10};
  for (const auto rounding : {pyramid_rounding::exact, pyramid_rounding::released}) {
    CHECK(pyramid{.budget = 40, .rounding = rounding}.tokens_per_head(problem) == 40);
    CHECK(pyramid{.budget = 100, .rounding = rounding}.tokens_per_head(problem) == 100);
  }
}

TEMPLATE_TEST_CASE("a pyramid gives every head of a layer the layer's share", "", std::uint32_t, std::uint64_t) {
  random_engine random(3);
  for (int trial = 0; trial < 500; ++trial) {
    const random_problem<TestType> made(random, score_kind::mixed);
    const pyramid allocator =
        random_pyramid(random, chance(random, 50) ? pyramid_rounding::exact : pyramid_rounding::released);
    const auto counts = allocate(allocator, made.problem, made.view());
    check_promises(allocator, made.problem, counts);
    for (const index_t count : counts) CHECK(count == counts[0]);
  }
}

TEST_CASE("a pyramid of pages, and of heads that differ") {
  random_engine random(5);
  for (int trial = 0; trial < 500; ++trial) {
    random_problem<std::uint32_t> made(random, score_kind::mixed);
    made.make_ragged(random);
    const pyramid allocator =
        random_pyramid(random, chance(random, 50) ? pyramid_rounding::exact : pyramid_rounding::released);
    const auto counts = allocate(allocator, made.problem, made.view());
    check_promises(allocator, made.problem, counts);
    // In units, the problem is that of a sequence of as many tokens and a budget of as many.
    pyramid of_units = allocator;
    if (allocator.budget.ratio == 0) of_units.budget = allocator.budget.tokens / made.problem.unit;
    budget_problem tokens = made.problem;
    tokens.unit = 1;
    const index_t share = restkv::chosen_per_head(of_units, tokens);
    for (std::size_t h = 0; h < counts.size(); ++h) CHECK(counts[h] == std::min(share, made.head_candidates[h]));
  }
}

TEST_CASE("a plan for the longest sequence holds every shorter one") {
  random_engine random(4);
  for (int trial = 0; trial < 2000; ++trial) {
    const pyramid_rounding roundings[] = {pyramid_rounding::exact, pyramid_rounding::released,
                                          pyramid_rounding::kvpress};
    check_plan_holds(random, random_pyramid(random, roundings[pick(random, 0, 2)]));
  }
}

TEST_CASE("beta must be a number of at least 1") {
  CHECK(pyramid{}.check().ok());
  for (const float beta : {0.5f, 0.0f, -1.0f, std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN()}) {
    CAPTURE(beta);
    check_error(pyramid{.beta = beta}.check(), errc::invalid_argument, {1}, "pyramid.beta");
  }
  check_error(pyramid{.budget = 0}.check(), errc::invalid_argument, {0, 1}, "pyramid");
}
