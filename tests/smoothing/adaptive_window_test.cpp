// SPDX-License-Identifier: Apache-2.0
#include "smoothing/row_support.hpp"

#include <restkv/smoothing/adaptive_window.hpp>

using namespace restkv_test;
using restkv::adaptive_window;
using restkv::drift_shift;
using restkv::errc;

namespace {

static_assert(restkv::monotone_spatial_smoother<adaptive_window> && restkv::needs_drift<adaptive_window>());

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// out[n] = mean over u of in[clamp(n + s + u)], by the definition, and the same of |in|.
template <class Real>
std::pair<row<double>, row<double>> by_definition(const row<Real>& in, index_t width, index_t shift) {
  const auto length = static_cast<index_t>(in.size());
  row<double> mean(in.size());
  row<double> magnitude(in.size());
  for (index_t n = 0; n < length; ++n) {
    for (index_t u = -(width / 2); u <= width / 2; ++u) {
      const auto value =
          static_cast<double>(in[static_cast<std::size_t>(std::clamp<index_t>(n + shift + u, 0, length - 1))]);
      mean[static_cast<std::size_t>(n)] += value / static_cast<double>(width);
      magnitude[static_cast<std::size_t>(n)] += std::fabs(value) / static_cast<double>(width);
    }
  }
  return {mean, magnitude};
}

template <class Real>
void check_against_definition(random_engine& random, const adaptive_window& smoother, const row<Real>& in,
                              double drift) {
  const index_t width = smoother.width(drift);
  const index_t shift = smoother.shift(drift);
  CAPTURE(width, shift, drift, in.size());
  const auto [mean, magnitude] = by_definition(in, width, shift);
  check_close(smooth(smoother, in, drift), mean, magnitude, width);
  check_monotone_within_reach(random, smoother, in, drift);
}

}  // namespace

TEST_CASE("width and shift follow the drift, the sign oddity of the release included") {
  const adaptive_window smoother{.min_width = 5, .scale = 2000};
  const adaptive_window centred{.min_width = 5, .scale = 2000, .shift_rule = drift_shift::centred};
  struct sample {
    double drift;
    index_t width;
    index_t released;
    index_t centred;
  };
  for (const sample& s : {sample{0, 5, 1, 0}, {-0.0, 5, 1, 0}, {1e-9, 5, 0, 0}, {-1e-9, 5, 0, 0}, {1999, 5, 0, 0},
                          {2000, 5, 1, 1}, {-2000, 5, 0, -1}, {-1999, 5, 0, 0}, {-2001, 5, -1, -1}, {3999.9, 5, 1, 1},
                          {4000, 5, 2, 2}, {-4000, 5, -1, -2}, {-4001, 5, -2, -2}, {6000, 7, 3, 3}, {-6000, 7, -2, -3},
                          {5999.9, 5, 2, 2}, {20000, 21, 10, 10}, {-20001, 21, -10, -10}}) {
    CAPTURE(s.drift);
    CHECK(smoother.width(s.drift) == s.width);
    CHECK(smoother.shift(s.drift) == s.released);
    CHECK(centred.width(s.drift) == s.width);
    CHECK(centred.shift(s.drift) == s.centred);
  }
}

TEST_CASE("width and shift are the published formulas") {
  random_engine random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    adaptive_window smoother{.min_width = static_cast<int>(2 * pick(random, 0, 20) + 1),
                             .scale = static_cast<float>(pick(random, 1, 3000))};
    const auto scale = static_cast<double>(smoother.scale);
    // Exact multiples of the scale among them.
    const double drift = chance(random, 30) ? scale * static_cast<double>(pick(random, -30, 30))
                                            : uniform_real(random, -40 * scale, 40 * scale);
    CAPTURE(drift, smoother.scale, smoother.min_width);
    const auto steps = static_cast<index_t>(std::floor(std::fabs(drift) / scale));
    CHECK(smoother.width(drift) == std::max<index_t>(smoother.min_width, 2 * steps + 1));
    CHECK(smoother.shift(drift) == static_cast<index_t>(std::floor(drift / scale)) + (drift > 0 ? 0 : 1));
    const auto window = smoother.reach(row_context{drift});
    CHECK(window.last - window.first + 1 == smoother.width(drift));
    CHECK(window.first + window.last == 2 * smoother.shift(drift));
    smoother.shift_rule = drift_shift::centred;
    CHECK(smoother.shift(-drift) == -smoother.shift(drift));
    CHECK(std::abs(smoother.shift(drift)) == steps);
  }
}

TEST_CASE("a drift that is not finite counts as 0, and a huge one overflows nothing") {
  const adaptive_window smoother;
  for (const double drift : {not_a_number, infinity, -infinity}) {
    CHECK(smoother.width(drift) == smoother.width(0));
    CHECK(smoother.shift(drift) == smoother.shift(0));
  }
  random_engine random(2);
  const auto in = random_row<double>(random, 50);
  for (const float scale : {1e-30f, 1.0f}) {
    const adaptive_window narrow{.min_width = 3, .scale = scale};
    for (const double drift : {1e300, -1e300, 3e9, -3e9}) {
      CAPTURE(drift, scale);
      CHECK(narrow.width(drift) > 1'000'000'000);
      // Off the row on one side, or as wide as the row many times over: some mean of the row's values.
      const auto out = smooth(narrow, in, drift);
      for (const double value : out) {
        CHECK(value >= *std::min_element(in.begin(), in.end()));
        CHECK(value <= *std::max_element(in.begin(), in.end()));
      }
    }
  }
}

TEMPLATE_TEST_CASE("narrow windows are the mean of the definition", "", float, double) {
  random_engine random(3);
  for (int trial = 0; trial < 1500; ++trial) {
    const index_t length = trial < 60 ? trial % 3 : pick(random, 0, 90);
    adaptive_window smoother{.min_width = static_cast<int>(2 * pick(random, 0, 6) + 1), .scale = 10};
    smoother.shift_rule = chance(random, 50) ? drift_shift::released : drift_shift::centred;
    const double drift = chance(random, 10) ? 0.0 : uniform_real(random, -600, 600);
    CAPTURE(trial);
    check_against_definition(random, smoother, random_row<TestType>(random, length), drift);
  }
}

TEMPLATE_TEST_CASE("wide windows are the mean of the definition", "", float, double) {
  random_engine random(4);
  for (int trial = 0; trial < 300; ++trial) {
    // Around the width from which windows are summed by blocks, and around the length of the row.
    const index_t length = trial < 30 ? trial % 3 : pick(random, 1, 700);
    const index_t width = chance(random, 50) ? pick(random, 120, 140) : pick(random, 1, 2 * length + 200);
    const adaptive_window smoother{.min_width = static_cast<int>(width | 1), .scale = 100};
    const double drift = 100 * static_cast<double>(pick(random, -100, 100));
    CAPTURE(trial);
    check_against_definition(random, smoother, random_row<TestType>(random, length), drift);
  }
}

TEMPLATE_TEST_CASE("a huge value leaves no trace beyond its windows", "", float, double) {
  for (const int width : {5, 131, 301}) {
    row<TestType> in(1000, TestType(1));
    in[300] = std::numeric_limits<TestType>::max() / 2;
    const auto out = smooth(adaptive_window{.min_width = width, .shift_rule = drift_shift::centred}, in);
    for (std::size_t n = 0; n < in.size(); ++n) {
      CAPTURE(n, width);
      const bool touched = std::abs(static_cast<index_t>(n) - 300) <= width / 2;
      if (touched) {
        CHECK(std::isfinite(out[n]));
        CHECK(out[n] > TestType(1e30));
      } else {
        CHECK(out[n] == Approx(1).epsilon(1e-6));
      }
    }
  }
}

TEMPLATE_TEST_CASE("what is not finite reaches the outputs whose window contains it and no others", "", float, double) {
  random_engine random(5);
  for (int trial = 0; trial < 400; ++trial) {
    const index_t length = pick(random, 1, 500);
    auto in = random_row<TestType>(random, length);
    const index_t damaged = pick(random, 0, length - 1);
    const bool is_nan = chance(random, 50);
    in[static_cast<std::size_t>(damaged)] =
        is_nan ? std::numeric_limits<TestType>::quiet_NaN() : std::numeric_limits<TestType>::infinity();
    const adaptive_window smoother{.min_width = static_cast<int>(pick(random, 1, length + 200) | 1), .scale = 10};
    const double drift = uniform_real(random, -3000, 3000);
    const auto out = smooth(smoother, in, drift);
    const auto window = smoother.reach(row_context{drift});
    bool good = true;
    for (index_t n = 0; n < length; ++n) {
      const index_t first = std::clamp<index_t>(n + window.first, 0, length - 1);
      const index_t last = std::clamp<index_t>(n + window.last, 0, length - 1);
      const TestType value = out[static_cast<std::size_t>(n)];
      const bool inside = damaged >= first && damaged <= last;
      good = good && (inside ? (is_nan ? std::isnan(value) : std::isinf(value)) : std::isfinite(value));
    }
    CAPTURE(trial, length, damaged, window.first, window.last, is_nan);
    CHECK(good);
  }
}

TEST_CASE("parameters of adaptive_window must make sense") {
  CHECK(adaptive_window{}.check().ok());
  CHECK(adaptive_window{.min_width = 1, .scale = 0.5f}.check().ok());
  for (const int width : {0, -1, 4, 20}) {
    CAPTURE(width);
    check_error(adaptive_window{.min_width = width}.check(), errc::invalid_argument, {std::abs(width), 1},
                "adaptive_window.min_width");
  }
  for (const float scale : {0.0f, -1.0f, static_cast<float>(infinity), static_cast<float>(not_a_number)}) {
    CAPTURE(scale);
    check_error(adaptive_window{.scale = scale}.check(), errc::invalid_argument, {0}, "adaptive_window.scale");
  }
}
