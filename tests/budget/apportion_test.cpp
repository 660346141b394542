// SPDX-License-Identifier: Apache-2.0
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/budget/apportion.hpp>

#include <limits>
#include <numeric>
#include <vector>

using namespace restkv_test;

namespace {

std::vector<index_t> apportioned(const std::vector<double>& weights, const std::vector<index_t>& ceilings,
                                 index_t total) {
  std::vector<index_t> counts(weights.size(), -99);
  restkv::apportion(weights, ceilings, total, counts);
  return counts;
}

/// One unit after the other to the largest weight / (count + 1/2), ties to the smaller index.
std::vector<index_t> by_quotients(const std::vector<double>& weights, const std::vector<index_t>& ceilings,
                                  index_t total) {
  std::vector<index_t> counts(weights.size());
  for (; total > 0; --total) {
    std::size_t best = weights.size();
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (counts[i] >= ceilings[i] || !(weights[i] > 0)) continue;
      const auto quotient = [&](std::size_t k) { return weights[k] / (static_cast<double>(counts[k]) + 0.5); };
      if (best == weights.size() || quotient(i) > quotient(best)) best = i;
    }
    if (best == weights.size()) break;
    ++counts[best];
  }
  return counts;
}

index_t sum_of(const std::vector<index_t>& counts) { return std::accumulate(counts.begin(), counts.end(), index_t{0}); }

}  // namespace

TEST_CASE("apportion is the divisor method with standard rounding") {
  // Quotients of 1/2, 3/2, ...: 53, 24 and 23 of 100 divide 7 seats as 4, 2, 1 (24 / 1.5 = 16 beats 23 / 1.5).
  CHECK(apportioned({53, 24, 23}, {99, 99, 99}, 7) == std::vector<index_t>{3, 2, 2});
  CHECK(apportioned({53, 24, 23}, {99, 99, 99}, 10) == std::vector<index_t>{6, 2, 2});
  CHECK(apportioned({1, 1, 1}, {5, 5, 5}, 4) == std::vector<index_t>{2, 1, 1});
  CHECK(apportioned({1, 1, 1}, {1, 5, 5}, 8) == std::vector<index_t>{1, 4, 3});
  CHECK(apportioned({1, 0, 3}, {4, 9, 4}, 12) == std::vector<index_t>{4, 4, 4});
  CHECK(apportioned({1, 0, 3}, {4, 9, 4}, 100) == std::vector<index_t>{4, 9, 4});
  CHECK(apportioned({}, {}, 5).empty());
  CHECK(apportioned({0, 0}, {5, 5}, 5) == std::vector<index_t>{3, 2});
  random_engine random(1);
  for (int trial = 0; trial < 3000; ++trial) {
    const auto size = static_cast<std::size_t>(pick(random, 1, 12));
    std::vector<double> weights(size);
    std::vector<index_t> ceilings(size);
    const bool exact = chance(random, 50);  // quotients that tie
    for (std::size_t i = 0; i < size; ++i) {
      weights[i] = exact ? static_cast<double>(pick(random, 1, 8)) : std::exp(3 * normal(random));
      ceilings[i] = pick(random, 0, 60);
    }
    const index_t total = pick(random, 0, sum_of(ceilings));
    CAPTURE(weights, ceilings, total);
    CHECK(apportioned(weights, ceilings, total) == by_quotients(weights, ceilings, total));
  }
}

TEST_CASE("apportion is exact and within the ceilings whatever the weights") {
  random_engine random(2);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  for (int trial = 0; trial < 3000; ++trial) {
    const auto size = static_cast<std::size_t>(pick(random, 1, 10));
    std::vector<double> weights(size);
    std::vector<index_t> ceilings(size);
    for (std::size_t i = 0; i < size; ++i) {
      const double kinds[] = {std::numeric_limits<double>::quiet_NaN(),
                              infinity,
                              -infinity,
                              -1,
                              0,
                              1e308,
                              5e-324,
                              1,
                              1e-200,
                              uniform_real(random, 0, 10)};
      weights[i] = kinds[pick(random, 0, 9)];
      ceilings[i] = pick(random, 0, 200);
    }
    const index_t total = pick(random, 0, sum_of(ceilings) + 20);
    const auto counts = apportioned(weights, ceilings, total);
    CAPTURE(weights, ceilings, total, counts);
    CHECK(sum_of(counts) == std::min(total, sum_of(ceilings)));
    for (std::size_t i = 0; i < size; ++i) {
      CHECK(counts[i] >= 0);
      CHECK(counts[i] <= ceilings[i]);
    }
  }
}

TEST_CASE("apportion: nobody gets more when another joins or the total falls") {
  random_engine random(3);
  for (int trial = 0; trial < 2000; ++trial) {
    std::vector<double> weights;
    std::vector<index_t> ceilings;
    std::vector<index_t> before;
    index_t total = pick(random, 0, 400);
    for (index_t i = pick(random, 1, 12); i > 0; --i) {
      weights.push_back(chance(random, 10) ? 0.0 : std::exp(2 * normal(random)));
      ceilings.push_back(pick(random, 0, 100));
      total = std::max<index_t>(0, total - pick(random, 0, 5));
      const auto counts = apportioned(weights, ceilings, total);
      for (std::size_t k = 0; k < before.size(); ++k) CHECK(counts[k] <= before[k]);
      before = counts;
    }
  }
}
