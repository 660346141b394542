// SPDX-License-Identifier: Apache-2.0
// What the tests of spatial smoothers share: rows of scores, and the properties every smoother has.
#pragma once

#include "support/check_error.hpp"
#include "support/random.hpp"

#include <restkv/smoothing/spatial.hpp>

#include <cmath>
#include <limits>

namespace restkv_test {

using restkv::row_context;

template <class Real>
using row = std::vector<Real>;

/// A row as scores are: many near 0, a few huge ones.
template <class Real>
row<Real> random_row(random_engine& random, index_t length) {
  row<Real> scores(static_cast<std::size_t>(length));
  for (Real& score : scores) {
    score = static_cast<Real>(std::fabs(normal(random)) * (chance(random, 5) ? 1e6 : 1e-3));
  }
  return scores;
}

template <class Smoother, class Real>
row<Real> smooth(const Smoother& smoother, const row<Real>& in, double drift = 0) {
  row<Real> out(in.size(), Real(-77));  // no smoother may leave an element as it was
  smoother(std::span<const Real>(in), std::span<Real>(out), row_context{drift});
  return out;
}

/// Raises one value at a time: no output falls, and none changes whose reach does not contain the value.
template <class Real, class Smoother>
void check_monotone_within_reach(random_engine& random, const Smoother& smoother, const row<Real>& in, double drift) {
  const auto length = static_cast<index_t>(in.size());
  if (length == 0) return;
  const restkv::token_reach reach = smoother.reach(row_context{drift});
  const row<Real> before = smooth(smoother, in, drift);
  row<Real> raised = in;
  const index_t at = pick(random, 0, length - 1);
  Real& value = raised[static_cast<std::size_t>(at)];
  value = chance(random, 50) ? std::nextafter(value, std::numeric_limits<Real>::max()) : value * 2 + 1;
  const row<Real> after = smooth(smoother, raised, drift);
  bool rises = true;
  bool stays = true;
  for (index_t n = 0; n < length; ++n) {
    const index_t first = std::clamp<index_t>(n + reach.first, 0, length - 1);
    const index_t last = std::clamp<index_t>(n + reach.last, 0, length - 1);
    const auto i = static_cast<std::size_t>(n);
    rises = rises && after[i] >= before[i];
    stays = stays && ((at >= first && at <= last) || after[i] == before[i]);
  }
  CAPTURE(length, at, drift, reach.first, reach.last);
  CHECK(rises);
  CHECK(stays);
}

/// Compares with an expected row; each element may be off by count additions' rounding on values of that magnitude.
template <class Real>
void check_close(const row<Real>& got, const row<double>& expected, const row<double>& magnitude, index_t additions) {
  REQUIRE(got.size() == expected.size());
  const double unit = static_cast<double>(std::numeric_limits<Real>::epsilon()) * static_cast<double>(additions + 4);
  bool close = true;
  for (std::size_t n = 0; n < got.size(); ++n) {
    const bool good = std::fabs(static_cast<double>(got[n]) - expected[n]) <= unit * magnitude[n];
    if (!good && close) UNSCOPED_INFO("at " << n << " of " << got.size() << ": " << got[n] << ", not " << expected[n]);
    close = close && good;
  }
  CHECK(close);
}

}  // namespace restkv_test
