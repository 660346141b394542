// SPDX-License-Identifier: Apache-2.0
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/selection/order_key.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

using namespace restkv_test;
using restkv::excluded_key;
using restkv::order_key;
using restkv::order_key_t;
using restkv::score_of_key;

namespace {

template <class Real>
std::vector<Real> special_scores() {
  using limits = std::numeric_limits<Real>;
  std::vector<Real> scores;
  for (const Real x : {Real(0), limits::denorm_min(), 2 * limits::denorm_min(), std::nextafter(limits::min(), Real(0)),
                       limits::min(), Real(1) - limits::epsilon() / 2, Real(1), Real(1) + limits::epsilon(),
                       Real(3.14159), limits::max(), limits::infinity()}) {
    scores.push_back(x);
    scores.push_back(-x);
  }
  return scores;
}

/// Any bit pattern: NaNs with payloads, denormals and all.
template <class Real>
Real random_pattern(random_engine& random) {
  const std::uint64_t bits = (std::uint64_t{random()} << 32) | random();
  return std::bit_cast<Real>(static_cast<order_key_t<Real>>(bits));
}

template <class Real>
void check_pair(Real a, Real b) {
  const auto key_a = order_key(a);
  const auto key_b = order_key(b);
  const bool nan_a = std::isnan(a);
  const bool nan_b = std::isnan(b);
  const bool below = nan_a ? !nan_b : a < b;  // NaN is below every number and equal to NaN
  const bool equal = nan_a || nan_b ? nan_a && nan_b : a == b;
  if ((key_a < key_b) != below || (key_a == key_b) != equal) {
    CAPTURE(a, b, key_a, key_b);
    CHECK((key_a < key_b) == below);
    CHECK((key_a == key_b) == equal);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("keys order as scores do", "", float, double) {
  const auto special = special_scores<TestType>();
  for (const TestType a : special) {
    for (const TestType b : special) check_pair(a, b);
  }
  random_engine random(1);
  for (int trial = 0; trial < 100000; ++trial) {
    const auto a = random_pattern<TestType>(random);
    const auto other = random_pattern<TestType>(random);
    const auto b = chance(random, 20) ? std::nextafter(a, other) : other;
    check_pair(a, b);
    check_pair(a, special[static_cast<std::size_t>(pick(random, 0, static_cast<index_t>(special.size()) - 1))]);
  }
  CHECK(order_key(TestType(1)) > order_key(TestType(-1)));
  CHECK(order_key(TestType(0)) == order_key(-TestType(0)));
}

TEMPLATE_TEST_CASE("a key gives its score back, and 0 is nobody's key", "", float, double) {
  random_engine random(2);
  int wrong = 0;
  auto scores = special_scores<TestType>();
  for (int trial = 0; trial < 100000; ++trial) scores.push_back(random_pattern<TestType>(random));
  for (const TestType score : scores) {
    const auto key = order_key(score);
    const TestType back = score_of_key<TestType>(key);
    const bool good = std::isnan(score) ? std::isnan(back) && key == 1 : back == score && key > 1;
    if (!good && ++wrong < 10) UNSCOPED_INFO(score << " has key " << key << ", which gives " << back);
  }
  CHECK(wrong == 0);
  CHECK(std::isnan(score_of_key<TestType>(excluded_key)));
  CHECK(order_key(std::numeric_limits<TestType>::quiet_NaN()) == 1);
  CHECK(order_key(-std::numeric_limits<TestType>::quiet_NaN()) == 1);
  CHECK(order_key(-std::numeric_limits<TestType>::infinity()) > 1);
}

TEST_CASE("neighbouring floats have neighbouring keys") {
  // So that no two scores share a key, and no key lies between.
  float score = -std::numeric_limits<float>::infinity();
  random_engine random(3);
  for (int trial = 0; trial < 20000; ++trial) {
    score = trial % 2 == 0 ? random_pattern<float>(random) : std::nextafter(score, 0.0f);
    if (!std::isfinite(score) || score == 0) continue;
    const float next = std::nextafter(score, std::numeric_limits<float>::infinity());
    if (next == 0 || !std::isfinite(next)) continue;
    REQUIRE(order_key(next) == order_key(score) + 1);
  }
}
