// SPDX-License-Identifier: Apache-2.0
// The drift of attention and the window it shapes, against the description: sort every row of attention, pair the front
// half's rows with the rear half's, rank by rank, and average the differences of positions.
#include "oracle/deletion_oracle.hpp"
#include "support/catch.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>

#include <numeric>

using namespace restkv_test;
using namespace restkv;

namespace {

/// Positions of the `count` largest of a row, in ascending order of value; of equal ones the smaller position is
/// larger.
std::vector<index_t> ranked(const oracle::reals& row, index_t count) {
  std::vector<index_t> order(row.size());
  std::iota(order.begin(), order.end(), index_t{0});
  std::sort(order.begin(), order.end(), [&](index_t a, index_t b) {
    const auto left = row[static_cast<std::size_t>(a)];
    const auto right = row[static_cast<std::size_t>(b)];
    return left < right || (left == right && a > b);
  });
  return {order.end() - count, order.end()};
}

double naive_drift(const oracle::problem& p, index_t head, index_t count) {
  const index_t pairs = p.window / 2;
  std::vector<std::vector<index_t>> tops;
  for (index_t i = 0; i < p.window; ++i) {
    oracle::reals row = oracle::softmax(oracle::logits_of(p, head, i));
    row.resize(static_cast<std::size_t>(p.length));  // tokens the query does not see have attention 0
    tops.push_back(ranked(row, count));
  }
  double sum = 0;
  for (index_t pair = 0; pair < pairs; ++pair) {
    for (index_t rank = 0; rank < count; ++rank) {
      const auto r = static_cast<std::size_t>(rank);
      sum += static_cast<double>(tops[static_cast<std::size_t>(pair)][r]) -
             static_cast<double>(tops[static_cast<std::size_t>(pairs + pair)][r]);
    }
  }
  return pairs * count == 0 ? 0.0 : sum / static_cast<double>(pairs * count);
}

/// A layer whose logits are exact in every arithmetic, so that nobody disagrees about ties: whole numbers of `levels`
/// kinds, or all different for levels = 0, times small powers of two, plus a slope that moves over the window.
arranged_layer<float> exact_layer(const layer_sizes& sizes, index_t window, index_t levels, unsigned seed) {
  arranged_layer<float> layer(sizes, seed);
  random_engine random(seed);
  for (index_t h = 0; h < sizes.kv_heads; ++h) {
    std::vector<index_t> order(static_cast<std::size_t>(sizes.tokens));
    std::iota(order.begin(), order.end(), index_t{0});
    std::shuffle(order.begin(), order.end(), random);
    for (index_t n = 0; n < sizes.tokens; ++n) {
      layer.key(0, h, n, 0) =
          static_cast<float>(levels > 0 ? pick(random, 0, levels - 1) : order[static_cast<std::size_t>(n)]) / 32.0f;
      layer.key(0, h, n, 1) = levels > 0 ? static_cast<float>(n / 16) : static_cast<float>(n);
      // A head_dim of 2 would do, but its root is irrational.
      layer.key(0, h, n, 2) = layer.key(0, h, n, 3) = 0.0f;
    }
  }
  for (index_t h = 0; h < sizes.query_heads; ++h) {
    for (index_t i = 0; i < sizes.queries; ++i) {
      layer.query(0, h, i, 0) = static_cast<float>(pick(random, 0, 1) * 2 - 1);
      layer.query(0, h, i, 1) = static_cast<float>(2 * i < 2 * sizes.queries - window ? h - 2 : 2 - h) / 64.0f;
    }
  }
  return layer;
}

using policy_t = eviction_policy<snap_kv, mean, adaptive_window, uniform>;

}  // namespace

TEST_CASE("the drift is the mean difference of positions, rank by rank, of rows paired over the window") {
  reference_backend reference;
  eigen_backend eigen;
  index_t moved = 0;
  for (const index_t window : {1, 2, 5, 8}) {
    for (const index_t levels : {0, 2, 7}) {
      const layer_sizes sizes{.query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 120, .queries = 9};
      const auto layer = exact_layer(sizes, window, levels, static_cast<unsigned>(window + 10 * levels));
      const oracle::problem p = oracle::problem_of(layer, 0, window, false);
      for (const index_t budget :
           {window, window + 1, window + 10, sizes.tokens - 3, sizes.tokens, sizes.tokens + 50}) {
        policy_t policy{.score = {},
                        .window = window,
                        .temporal = {},
                        .spatial = {.min_width = 3, .scale = 2.5f},
                        .group = group_reduce::none,
                        .budget = {budget},
                        .protect = {.sink = 0, .recent = 0}};
        CAPTURE(window, levels, budget);
        const auto exact = select_tokens(reference, policy, layer.view());
        const auto fast = select_tokens(eigen, policy, layer.view());
        policy.group = group_reduce::mean;
        const auto grouped = select_tokens(eigen, policy, layer.view());
        REQUIRE(exact.result.ok());
        REQUIRE(fast.result.ok());
        REQUIRE(grouped.result.ok());
        const index_t count = std::min(budget, sizes.tokens) - window;
        std::vector<double> drifts;
        for (index_t h = 0; h < 4; ++h) drifts.push_back(naive_drift(p, h, count));
        for (std::size_t h = 0; h < 4; ++h) {
          CHECK(exact.drift[h] == Approx(drifts[h]).margin(1e-9));
          CHECK(fast.drift[h] == Approx(drifts[h]).margin(1e-9));
          moved += std::fabs(drifts[h]) > 2.5 ? 1 : 0;
        }
        for (std::size_t h = 0; h < 2; ++h) {
          CHECK(grouped.drift[h] == Approx((drifts[2 * h] + drifts[2 * h + 1]) / 2).margin(1e-9));
        }
      }
    }
  }
  CHECK(moved > 50);  // drifts that make a window wider and shift it
}

TEST_CASE("the adaptive window averages the scores that the formulas of width and shift name") {
  reference_backend reference;
  eigen_backend eigen;
  const index_t window = 6;
  const layer_sizes sizes{.query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 400, .queries = 6};
  const auto layer = exact_layer(sizes, window, 0, 3);
  const index_t past = sizes.tokens - window;
  index_t widest = 0;
  index_t lowest = 0;
  index_t highest = 0;
  for (const float scale : {0.5f, 3.0f, 40.0f, 1000.0f}) {
    for (const drift_shift rule : {drift_shift::released, drift_shift::centred}) {
      const policy_t policy{.score = {},
                            .window = window,
                            .temporal = {},
                            .spatial = {.min_width = 5, .scale = scale, .shift_rule = rule},
                            .group = group_reduce::none,
                            .budget = {40},
                            .protect = {.sink = 0, .recent = 0}};
      const auto exact = select_tokens(reference, policy, layer.view());
      const auto fast = select_tokens(eigen, policy, layer.view());
      REQUIRE(exact.result.ok());
      REQUIRE(fast.result.ok());
      for (index_t h = 0; h < 4; ++h) {
        const double t = exact.drift[static_cast<std::size_t>(h)];
        const auto k = std::max<index_t>(5, 2 * static_cast<index_t>(std::floor(std::fabs(t) / double{scale})) + 1);
        const auto s = static_cast<index_t>(rule == drift_shift::centred ? std::trunc(t / double{scale})
                                            : t > 0                      ? std::floor(t / double{scale})
                                                                         : std::floor(t / double{scale}) + 1);
        widest = std::max(widest, k);
        lowest = std::min(lowest, s);
        highest = std::max(highest, s);
        const auto score = exact.scores_of(0, h);
        double largest = 0;
        double exact_error = 0;
        double fast_error = 0;
        for (index_t n = 0; n < past; ++n) {
          double sum = 0;
          for (index_t u = -(k / 2); u <= k / 2; ++u) {
            sum += score[static_cast<std::size_t>(std::clamp<index_t>(n + s + u, 0, past - 1))];
          }
          const double mean = sum / static_cast<double>(k);
          const auto at = static_cast<std::size_t>(n);
          largest = std::max(largest, mean);
          exact_error = std::max(exact_error, std::fabs(exact.smoothed_of(0, h)[at] - mean));
          fast_error = std::max(fast_error, std::fabs(double{fast.smoothed_of(0, h)[at]} - mean));
        }
        CAPTURE(scale, t, k, s);
        CHECK(exact_error <= 1e-12 * largest);
        CHECK(fast_error <= 1e-4 * largest);
      }
    }
  }
  CHECK(widest > 129);  // beyond that the backends slide the window instead of adding it up anew
  CHECK(lowest < -3);
  CHECK(highest > 3);
}
