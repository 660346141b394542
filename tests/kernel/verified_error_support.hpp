// SPDX-License-Identifier: Apache-2.0
// How far two computations of the same output errors in double may lie apart, and the comparison by it.
#pragma once

#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/verify/output_error.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace restkv_test {

using namespace restkv;

/// Bounds for one query head of a sequence, from u = 2^-53, its d channels and N tokens.
///
/// A logit is a sum of d exact products, divided and multiplied once: off by (d + 4) u |q||k|/sqrt(d) at most, and an
/// exponential by that relatively, and a few u. So is each weight; a sum of N of them, in whatever order, adds N u.
/// Two computations then differ in every mass and share by rho = 4 (d + 4) u |q||k|/sqrt(d) + 4 (N + 16) u relatively
/// (numerator and denominator, both computations). A weighted mean of values moves by 2 rho V, V being the longest
/// value, so with A the evicted mass
///
///     o = mean                             2 rho V
///     o' - o = A (o' - m)                  A (rho 2 V + 2 rho 2 V) <= 6 rho A V
///     a/(1-a) ||o - v||                    odds (4 rho 2 V + 2 rho V); the odds of the others sum to 2 A at most, the
///                                          top one's cost is a_T ||o without T - v_T||: 30 rho A V together
///
/// and behind a matrix W at most |W| (Frobenius) times that, where products with W add (d + 4) u of |W| times the
/// vector, which is in rho. Square forms through G = W^T W are off by 4 (d + 4) u |W|^2 times the vectors' squares; the
/// root r of one by min(sqrt(e), e / r) then. The verifier forms a difference first where a square falls below 1e-8 of
/// its terms, so that e / r <= 1e4 sqrt(e's scale) 4 (d + 4) u.
struct error_bounds {
  double rho = 0;
  double form = 0;    ///< 4 (d + 4) u
  double value = 0;   ///< V
  double weight = 0;  ///< |W[h]|

  template <element T>
  error_bounds(const layer_view<T>& layer, index_t b, index_t h) {
    constexpr double u = 0x1p-53;
    const index_t kv_head = h / (layer.query.extent(1) / layer.key.extent(1));
    const index_t d = layer.key.extent(3);
    const sequence_span span = sequence(layer, b, kv_head);
    const auto longest = [&](const auto& cache, index_t head, index_t begin, index_t count) {
      double most = 0;
      for (index_t n = begin; n < begin + count; ++n) {
        const auto row = cache(n);
        double square = 0;
        for (index_t c = 0; c < d; ++c) square += widen<double>(row(b, head, 0, c)) * widen<double>(row(b, head, 0, c));
        most = std::max(most, std::sqrt(square));
      }
      return most;
    };
    const double query = longest([&](index_t n) { return layer.query.slice(2, n, 1); }, h, 0, layer.query.extent(2));
    const double key = longest([&](index_t n) { return layer.key.from_token(n); }, kv_head, span.begin, span.length);
    value = longest([&](index_t n) { return layer.value.from_token(n); }, kv_head, span.begin, span.length);
    const auto width = static_cast<double>(d);
    rho = 4 * (width + 4) * u * query * key / std::sqrt(width) + 4 * static_cast<double>(span.length + 16) * u;
    form = 4 * (width + 4) * u;
    if (!layer.metric.missing()) {
      double trace = 0;
      for (index_t c = 0; c < d; ++c) trace += layer.metric.gram(h, c, c);
      weight = std::sqrt(trace);
    }
  }

  [[nodiscard]] static double of_root(double root, double error) {
    return std::min(std::sqrt(error), root > 0 ? error / root : std::sqrt(error));
  }
};

/// Every figure within its bound of the other's; the largest part of a bound that a difference took.
template <element T>
[[nodiscard]] double compare_errors(const output_errors& expected, const output_errors& found,
                                    const layer_view<T>& layer) {
  REQUIRE(found.batch() == expected.batch());
  REQUIRE(found.query_heads() == expected.query_heads());
  REQUIRE(found.queries() == expected.queries());
  CHECK(found.projected() == expected.projected());
  REQUIRE(found.head_projected().empty() == expected.head_projected().empty());
  double largest = 0;
  const auto check = [&](double wanted, double got, double bound) {
    CAPTURE(wanted, got, bound);
    const bool close = std::fabs(wanted - got) <= bound;
    if (!close) CHECK(close);
    if (bound > 0) largest = std::max(largest, std::fabs(wanted - got) / bound);
  };
  const bool has_metric = !expected.head_projected().empty();
  for (index_t b = 0; b < expected.batch(); ++b) {
    CHECK(found.rows(b) == expected.rows(b));
    for (index_t i = 0; i < expected.queries(); ++i) {
      double change = 0;
      double output = 0;
      double predicted = 0;
      for (index_t h = 0; h < expected.query_heads(); ++h) {
        CAPTURE(b, h, i);
        const error_bounds of(layer, b, h);
        const double mass = expected.evicted_mass()(b, h, i);
        const bool exists = i >= expected.queries() - expected.rows(b);
        const double moved = exists ? of.rho * of.value : 0.0;
        check(expected.evicted_mass()(b, h, i), found.evicted_mass()(b, h, i), of.rho * mass);
        check(expected.head_output_norm()(b, h, i), found.head_output_norm()(b, h, i), 2 * moved);
        check(expected.head()(b, h, i), found.head()(b, h, i), 6 * moved * mass);
        check(expected.head_predicted()(b, h, i), found.head_predicted()(b, h, i), 30 * moved * mass);
        double through = 1;
        if (has_metric) {
          through = of.weight;
          const double root = expected.head_projected()(b, h, i);
          const double by_form =
              expected.projected()
                  ? 0.0
                  : error_bounds::of_root(root, of.form * std::pow(2 * of.weight * of.value * mass, 2));
          check(root, found.head_projected()(b, h, i), 6 * moved * mass * through + by_form);
          const double of_sum = (30 * moved + 2 * 1e4 * of.form * 2 * of.value) * mass * through;
          check(expected.head_projected_predicted()(b, h, i), found.head_projected_predicted()(b, h, i), of_sum);
          predicted += expected.projected() ? of_sum : 30 * moved * mass;
        } else {
          predicted += 30 * moved * mass;
        }
        if (!expected.projected()) through = 1;
        change += 6 * moved * mass * through;
        output += 2 * moved * through;
      }
      CAPTURE(b, i);
      check(expected.layer()(b, i), found.layer()(b, i), change);
      check(expected.layer_output_norm()(b, i), found.layer_output_norm()(b, i), output);
      check(expected.layer_predicted()(b, i), found.layer_predicted()(b, i), predicted);
    }
  }
  return largest;
}

}  // namespace restkv_test
