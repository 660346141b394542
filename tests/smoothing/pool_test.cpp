// SPDX-License-Identifier: Apache-2.0
#include "smoothing/row_support.hpp"

using namespace restkv_test;
using restkv::average_pool;
using restkv::errc;
using restkv::max_pool;
using restkv::no_pool;

namespace {

static_assert(restkv::monotone_spatial_smoother<no_pool> && restkv::monotone_spatial_smoother<average_pool> &&
              restkv::monotone_spatial_smoother<max_pool>);
static_assert(!restkv::needs_drift<average_pool>());

index_t random_width(random_engine& random, index_t length) { return 2 * pick(random, 0, length + 3) + 1; }

}  // namespace

TEMPLATE_TEST_CASE("no_pool copies the row", "", float, double) {
  random_engine random(1);
  for (const index_t length : {0, 1, 2, 50}) {
    const auto in = random_row<TestType>(random, length);
    CHECK(smooth(no_pool{}, in) == in);
  }
}

TEMPLATE_TEST_CASE("average_pool is the zero-padded mean over its width", "", float, double) {
  random_engine random(2);
  for (int trial = 0; trial < 400; ++trial) {
    const index_t length = trial < 30 ? trial % 3 : pick(random, 0, 80);
    const auto in = random_row<TestType>(random, length);
    const average_pool pool{.width = static_cast<int>(random_width(random, length))};
    row<double> expected(in.size());
    for (index_t n = 0; n < length; ++n) {
      double sum = 0;
      for (index_t i = n - pool.width / 2; i <= n + pool.width / 2; ++i) {
        if (i >= 0 && i < length) sum += static_cast<double>(in[static_cast<std::size_t>(i)]);
      }
      expected[static_cast<std::size_t>(n)] = sum / pool.width;
    }
    CAPTURE(trial, pool.width);
    check_close(smooth(pool, in), expected, expected, pool.width);
    check_monotone_within_reach(random, pool, in, 0);
  }
}

TEMPLATE_TEST_CASE("long rows are averaged like short ones", "", float, double) {
  random_engine random(3);
  const auto in = random_row<TestType>(random, 3000);
  for (const int width : {1, 5, 511, 1001}) {
    const auto out = smooth(average_pool{.width = width}, in);
    row<double> expected(in.size());
    for (index_t n = 0; n < 3000; ++n) {
      for (index_t i = std::max<index_t>(0, n - width / 2); i <= std::min<index_t>(2999, n + width / 2); ++i) {
        expected[static_cast<std::size_t>(n)] += static_cast<double>(in[static_cast<std::size_t>(i)]) / width;
      }
    }
    CAPTURE(width);
    check_close(out, expected, expected, width);
  }
}

TEMPLATE_TEST_CASE("max_pool is the largest value over its width", "", float, double) {
  random_engine random(4);
  for (int trial = 0; trial < 400; ++trial) {
    const index_t length = trial < 30 ? trial % 3 : pick(random, 0, 80);
    auto in = random_row<TestType>(random, length);
    for (auto& value : in) value = chance(random, 50) ? -value : value;
    const max_pool pool{.width = static_cast<int>(random_width(random, length))};
    const auto out = smooth(pool, in);
    bool good = true;
    for (index_t n = 0; n < length; ++n) {
      TestType largest = -std::numeric_limits<TestType>::infinity();
      for (index_t i = n - pool.width / 2; i <= n + pool.width / 2; ++i) {
        if (i >= 0 && i < length) largest = std::max(largest, in[static_cast<std::size_t>(i)]);
      }
      good = good && out[static_cast<std::size_t>(n)] == largest;
    }
    CAPTURE(trial, pool.width, length);
    CHECK(good);
    check_monotone_within_reach(random, pool, in, 0);
  }
}

TEST_CASE("max_pool has the values that OpenVINO's tests of cache eviction state") {
  // Their window of 3 looks ahead: its output n is the centred window's output n + 1.
  const auto check = [](const row<float>& in, const row<float>& ahead) {
    const auto out = smooth(max_pool{.width = 3}, in);
    for (std::size_t n = 0; n + 1 < in.size(); ++n) CHECK(out[n + 1] == ahead[n]);
    CHECK(out[0] == std::max(in[0], in[1]));
  };
  check({1.5f, -0.8f, 4.1f, 7.7f, 3.6f, -7.4f}, {4.1f, 7.7f, 7.7f, 7.7f, 3.6f, -7.4f});
  check({-0.9f, 1.4f, 6.4f, -9.0f, 8.1f, 2.6f}, {6.4f, 6.4f, 8.1f, 8.1f, 8.1f, 2.6f});
}

TEMPLATE_TEST_CASE("a NaN reaches the outputs whose window contains it and no others", "", average_pool, max_pool) {
  random_engine random(5);
  for (int trial = 0; trial < 300; ++trial) {
    const index_t length = pick(random, 1, 60);
    auto in = random_row<float>(random, length);
    const index_t damaged = pick(random, 0, length - 1);
    in[static_cast<std::size_t>(damaged)] = std::numeric_limits<float>::quiet_NaN();
    TestType pool;
    pool.width = static_cast<int>(random_width(random, length / 2));
    const auto out = smooth(pool, in);
    bool good = true;
    for (index_t n = 0; n < length; ++n) {
      good = good && std::isnan(out[static_cast<std::size_t>(n)]) == (std::abs(n - damaged) <= pool.width / 2);
    }
    CAPTURE(length, damaged, pool.width);
    CHECK(good);
  }
}

TEST_CASE("a width far beyond the row is no more work than the row") {
  random_engine random(6);
  const auto in = random_row<double>(random, 400);
  double sum = 0;
  double largest = 0;
  for (const double value : in) {
    sum += value;
    largest = std::max(largest, value);
  }
  constexpr int width = std::numeric_limits<int>::max();
  const double mean = sum / width;
  for (const double value : smooth(average_pool{.width = width}, in)) CHECK(value == Approx(mean).epsilon(1e-12));
  for (const double value : smooth(max_pool{.width = width}, in)) CHECK(value == largest);
}

TEST_CASE("widths must be odd and at least 1") {
  for (const int width : {1, 3, 21, 99999}) {
    CHECK(average_pool{.width = width}.check().ok());
    CHECK(max_pool{.width = width}.check().ok());
  }
  for (const int width : {0, -1, -3, 2, 20, std::numeric_limits<int>::min()}) {
    CAPTURE(width);
    const index_t magnitude = std::abs(index_t{width});
    check_error(average_pool{.width = width}.check(), errc::invalid_argument, {magnitude, 1}, "average_pool.width");
    check_error(max_pool{.width = width}.check(), errc::invalid_argument, {magnitude, 1}, "max_pool.width");
  }
}
