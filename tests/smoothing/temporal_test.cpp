// SPDX-License-Identifier: Apache-2.0
#include "support/check_error.hpp"
#include "support/random.hpp"

#include <restkv/smoothing/temporal.hpp>

#include <limits>

using namespace restkv_test;
using restkv::ema;
using restkv::errc;
using restkv::last;
using restkv::maximum;
using restkv::mean;
using restkv::sum;

namespace {

static_assert(restkv::linear_temporal_smoother<mean> && restkv::linear_temporal_smoother<sum> &&
              restkv::linear_temporal_smoother<ema> && restkv::linear_temporal_smoother<last>);
static_assert(restkv::temporal_smoother<maximum> && !restkv::linear_temporal_smoother<maximum>);

template <class Real>
std::vector<Real> random_rows(random_engine& random, index_t count) {
  std::vector<Real> rows(static_cast<std::size_t>(count));
  for (Real& row : rows) row = static_cast<Real>(normal(random));
  return rows;
}

template <class Real, class Smoother>
Real reduce(const Smoother& smoother, const std::vector<Real>& rows) {
  return smoother(std::span<const Real>(rows));
}

/// |sum of weights[i] rows[i]| may be off by this much, whatever the order of summation.
template <class Real>
double rounding_bound(const std::vector<Real>& rows) {
  double magnitude = 0;
  for (const Real row : rows) magnitude += std::fabs(static_cast<double>(row));
  return static_cast<double>(rows.size() + 4) * static_cast<double>(std::numeric_limits<Real>::epsilon()) * magnitude;
}

}  // namespace

TEST_CASE("the exponential moving average has the published check values") {
  const std::vector<double> rows{10, 20, 30, 40, 50};
  CHECK(reduce(ema{.alpha = 0.9f}, rows) == Approx(48.889).epsilon(1e-6));
  CHECK(reduce(ema{.alpha = 0.3f}, rows) == Approx(32.269).epsilon(1e-6));
  CHECK(reduce(ema{.alpha = 2.0f / 6.0f}, rows) == Approx(33.9506).epsilon(1e-6));
  CHECK(reduce(ema{.alpha = 1.0f}, rows) == 50);
  // alpha 0.3 puts 94 % of the weight on the newest 8 of 32 rows.
  double newest = 0;
  for (int i = 24; i < 32; ++i) newest += ema{}.weight(i, 32);
  CHECK(newest == Approx(0.94).margin(0.005));
}

TEMPLATE_TEST_CASE("the exponential moving average is the recursion it is named for", "", float, double) {
  random_engine random(1);
  for (int trial = 0; trial < 500; ++trial) {
    const auto rows = random_rows<TestType>(random, pick(random, 1, 64));
    const ema smoother{.alpha = static_cast<float>(uniform_real(random, 0.01, 1))};
    double running = static_cast<double>(rows[0]);
    for (std::size_t i = 1; i < rows.size(); ++i) {
      const double alpha = static_cast<double>(smoother.alpha);
      running = alpha * static_cast<double>(rows[i]) + (1 - alpha) * running;
    }
    CAPTURE(rows.size(), smoother.alpha);
    CHECK(std::fabs(static_cast<double>(reduce(smoother, rows)) - running) <= rounding_bound(rows));
  }
}

TEMPLATE_TEST_CASE("linear smoothers are the sum of their weights times the rows", "", float, double) {
  random_engine random(2);
  for (int trial = 0; trial < 300; ++trial) {
    const auto rows = random_rows<TestType>(random, pick(random, 1, 40));
    const int count = static_cast<int>(rows.size());
    CAPTURE(count);
    const auto check = [&](const auto& smoother, double total) {
      double expected = 0;
      double weights = 0;
      for (int i = 0; i < count; ++i) {
        expected += smoother.weight(i, count) * static_cast<double>(rows[static_cast<std::size_t>(i)]);
        weights += smoother.weight(i, count);
        CHECK(smoother.weight(i, count) >= 0);
      }
      const double scale = std::max(1.0, total);
      CHECK(std::fabs(static_cast<double>(reduce(smoother, rows)) - expected) <= scale * rounding_bound(rows));
      CHECK(weights == Approx(total).epsilon(1e-12));
    };
    check(mean{}, 1);
    check(last{}, 1);
    check(sum{}, count);
    check(ema{.alpha = 0.3f}, 1);
    check(ema{.alpha = 1.0f}, 1);
    check(ema{.alpha = static_cast<float>(uniform_real(random, 1e-6, 1))}, 1);
  }
}

TEMPLATE_TEST_CASE("mean, sum, last and maximum are what they are called", "", float, double) {
  random_engine random(3);
  for (int trial = 0; trial < 300; ++trial) {
    const auto rows = random_rows<TestType>(random, pick(random, 1, 40));
    double total = 0;
    TestType largest = rows[0];
    for (const TestType row : rows) {
      total += static_cast<double>(row);
      if (row > largest) largest = row;
    }
    const auto count = static_cast<double>(rows.size());
    CHECK(std::fabs(static_cast<double>(reduce(sum{}, rows)) - total) <= rounding_bound(rows));
    CHECK(std::fabs(static_cast<double>(reduce(mean{}, rows)) - total / count) <= rounding_bound(rows) / count);
    CHECK(reduce(last{}, rows) == rows.back());
    CHECK(reduce(maximum{}, rows) == largest);
  }
}

TEMPLATE_TEST_CASE("a NaN row makes the result NaN, except for the newest row alone", "", float, double) {
  random_engine random(4);
  for (int trial = 0; trial < 100; ++trial) {
    auto rows = random_rows<TestType>(random, pick(random, 1, 20));
    const auto damaged = static_cast<std::size_t>(pick(random, 0, static_cast<index_t>(rows.size()) - 1));
    rows[damaged] = std::numeric_limits<TestType>::quiet_NaN();
    CHECK(std::isnan(reduce(maximum{}, rows)));
    CHECK(std::isnan(reduce(mean{}, rows)));
    CHECK(std::isnan(reduce(sum{}, rows)));
    CHECK(std::isnan(reduce(ema{}, rows)));
    CHECK(std::isnan(reduce(last{}, rows)) == (damaged + 1 == rows.size()));
  }
}

TEMPLATE_TEST_CASE("a smoother never falls when a row grows", "", float, double) {
  random_engine random(5);
  for (int trial = 0; trial < 2000; ++trial) {
    const auto rows = random_rows<TestType>(random, pick(random, 1, 32));
    auto raised = rows;
    auto& row = raised[static_cast<std::size_t>(pick(random, 0, static_cast<index_t>(rows.size()) - 1))];
    row = chance(random, 50) ? std::nextafter(row, TestType(1e9)) : row + static_cast<TestType>(pick(random, 0, 2));
    CHECK(reduce(mean{}, raised) >= reduce(mean{}, rows));
    CHECK(reduce(sum{}, raised) >= reduce(sum{}, rows));
    CHECK(reduce(ema{}, raised) >= reduce(ema{}, rows));
    CHECK(reduce(last{}, raised) >= reduce(last{}, rows));
    CHECK(reduce(maximum{}, raised) >= reduce(maximum{}, rows));
  }
}

TEST_CASE("no rows give 0") {
  const std::vector<float> none;
  CHECK(reduce(mean{}, none) == 0);
  CHECK(reduce(sum{}, none) == 0);
  CHECK(reduce(ema{}, none) == 0);
  CHECK(reduce(last{}, none) == 0);
  CHECK(reduce(maximum{}, none) == 0);
}

TEST_CASE("alpha must lie in (0, 1]") {
  CHECK(ema{.alpha = 1.0f}.check().ok());
  CHECK(ema{.alpha = 1e-6f}.check().ok());
  for (const float alpha : {0.0f, -0.5f, 1.5f, std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN()}) {
    CAPTURE(alpha);
    check_error(ema{.alpha = alpha}.check(), errc::invalid_argument, {0, 1}, "ema.alpha");
  }
  CHECK(std::string(ema{.alpha = 1.5f}.check().message()).find("1.5") != std::string::npos);
}
