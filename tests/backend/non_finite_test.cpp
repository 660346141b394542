// SPDX-License-Identifier: Apache-2.0
// NaN and infinities in keys, queries and values: a valid kept set whatever happens, the same on both backends, and no
// more damage than there must be.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"
#include "support/damaged_places.hpp"
#include "support/layer_metric.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>

using namespace restkv_test;
using namespace restkv;

namespace {

constexpr index_t window = damaged_window;
constexpr index_t budget = 40;
const layer_sizes& sizes = damaged_sizes;
constexpr index_t past = damaged_past;

template <class Score, class Temporal>
eviction_policy<Score, Temporal, any_spatial, uniform> make_policy(const Score& score, const Temporal& temporal,
                                                                   const any_spatial& spatial) {
  return {.score = score,
          .window = window,
          .temporal = temporal,
          .spatial = spatial,
          .group = group_reduce::l2,
          .budget = {budget},
          .protect = {.sink = 0, .recent = 0}};
}

template <class Real>
void check_valid(const selection_outcome<Real>& outcome) {
  INFO(outcome.result.message());
  REQUIRE(outcome.result.ok());
  for (index_t h = 0; h < outcome.heads; ++h) {
    const auto& kept = outcome.kept_of(0, h);
    REQUIRE(static_cast<index_t>(kept.size()) == budget);
    CHECK(std::adjacent_find(kept.begin(), kept.end(), std::greater_equal<>{}) == kept.end());
    CHECK(kept.front() >= 0);
    for (index_t i = 0; i < window; ++i) CHECK(kept[static_cast<std::size_t>(budget - window + i)] == past + i);
  }
}

/// Scores that are NaN.
template <class Real>
index_t count_nan(const selection_outcome<Real>& outcome, index_t h) {
  const auto row = outcome.scores_of(0, h).first(static_cast<std::size_t>(past));
  return std::count_if(row.begin(), row.end(), [](Real score) { return std::isnan(score); });
}

template <class Score, class Temporal>
void check_damage(const arranged_layer<float>& layer, const Score& score, const Temporal& temporal) {
  reference_backend reference;
  eigen_backend eigen;
  for (const any_spatial& spatial : {any_spatial{no_pool{}}, any_spatial{average_pool{}},
                                     any_spatial{adaptive_window{.min_width = 3, .scale = 7.0f}}}) {
    CAPTURE(spatial.choice.index());
    const auto policy = make_policy(score, temporal, spatial);
    const auto exact = select_tokens(reference, policy, layer.view());
    const auto fast = select_tokens(eigen, policy, layer.view());
    check_valid(exact);
    check_valid(fast);
    CHECK(fast.kept == exact.kept);
    CHECK(select_tokens(eigen, policy, layer.view(), false).kept == fast.kept);
    for (index_t h = 0; h < 2; ++h) CHECK(count_nan(fast, h) == count_nan(exact, h));
  }
}

}  // namespace

TEST_CASE("damaged inputs: both backends keep the same valid set") {
  for (const place& where : places) {
    for (const float bad : {not_a_number, infinity, -infinity}) {
      arranged_layer<float> layer(sizes, 5);
      const output_metric metric = attach_metric(layer);
      where.damage(layer, bad);
      for (const auto order : {query_order::before, query_order::after}) {
        for (const auto how : {restkv::metric::identity, restkv::metric::projection}) {
          CAPTURE(where.name, bad, int(order), int(how));
          const rest_kv score{.order = order, .metric_of_distance = how};
          check_damage(layer, score, any_temporal{mean{}});
          check_damage(layer, score, any_temporal{last{}});
          check_damage(layer, score, maximum{});
        }
      }
      CAPTURE(where.name, bad);
      check_damage(layer, snap_kv{}, any_temporal{});
    }
  }
}

TEST_CASE("a key that is not a number gets no attention and changes nobody else's score") {
  eigen_backend backend;
  const auto order = GENERATE(query_order::before, query_order::after);
  const auto policy = make_policy(rest_kv{.order = order}, any_temporal{ema{0.3f}}, {});
  for (const index_t damaged : {index_t{0}, index_t{40}, index_t{96}, past - 1}) {
    CAPTURE(damaged);
    arranged_layer<float> layer(sizes, 6);
    const output_metric metric = attach_metric(layer);
    for (index_t h = 0; h < 2; ++h) layer.key(0, h, damaged, 5) = not_a_number;
    const auto with = select_tokens(backend, policy, layer.view());
    // The same layer without the token.
    const index_t cuts[] = {damaged, damaged + 1};
    auto keys = cut_tokens(layer.key, cuts);
    auto values = cut_tokens(layer.value, cuts);
    keys.erase(keys.begin() + 1);
    values.erase(values.begin() + 1);
    layer_view<float> shorter = layer.view();
    shorter.key = {keys.data(), 2};
    shorter.value = {values.data(), 2};
    const auto without = select_tokens(backend, policy, shorter);
    REQUIRE(with.result.ok());
    REQUIRE(without.result.ok());
    for (index_t h = 0; h < 2; ++h) {
      CHECK(with.scores_of(0, h)[static_cast<std::size_t>(damaged)] == 0.0f);
      float largest = 0;
      float error = 0;
      for (index_t n = 0; n < past - 1; ++n) {
        const float expected = without.scores_of(0, h)[static_cast<std::size_t>(n)];
        const float got = with.scores_of(0, h)[static_cast<std::size_t>(n < damaged ? n : n + 1)];
        largest = std::max(largest, expected);
        const float difference = std::fabs(got - expected);
        error = difference <= error ? error : difference;
      }
      CHECK(error <= 1e-5f * largest);
    }
  }
}

TEST_CASE("a query that is not a number looks at everything alike") {
  reference_backend reference;
  eigen_backend eigen;
  const auto policy = make_policy(rest_kv{}, any_temporal{mean{}}, {});
  arranged_layer<float> damaged(sizes, 7);
  const output_metric metric = attach_metric(damaged);
  arranged_layer<float> zero(sizes, 7);
  zero.metric = metric.view();
  damaged.query(0, 2, 4, 3) = not_a_number;
  for (index_t c = 0; c < sizes.head_dim; ++c) zero.query(0, 2, 4, c) = 0.0f;
  const auto check = [&](auto& backend, double tolerance) {
    const auto got = select_tokens(backend, policy, damaged.view());
    const auto expected = select_tokens(backend, policy, zero.view());
    for (index_t h = 0; h < 2; ++h) {
      for (std::size_t n = 0; n < static_cast<std::size_t>(past); ++n) {
        CHECK(static_cast<double>(got.scores_of(0, h)[n]) ==
              Approx(static_cast<double>(expected.scores_of(0, h)[n])).epsilon(tolerance));
      }
    }
    CHECK(got.kept == expected.kept);
  };
  check(reference, 1e-12);
  check(eigen, 1e-5);
}

TEST_CASE("damage stays in its KV head") {
  eigen_backend backend;
  for (const place& where : places) {
    for (const float bad : {not_a_number, infinity}) {
      CAPTURE(where.name, bad);
      arranged_layer<float> layer(sizes, 8);
      const output_metric metric = attach_metric(layer);
      const auto policy = make_policy(rest_kv{}, any_temporal{}, {});
      const auto before = select_tokens(backend, policy, layer.view());
      where.damage(layer, bad);
      const auto after = select_tokens(backend, policy, layer.view());
      const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
      CHECK(std::equal(before.scores_of(0, 0).begin(), before.scores_of(0, 0).end(), after.scores_of(0, 0).begin(),
                       same));
      CHECK(before.kept_of(0, 0) == after.kept_of(0, 0));
    }
  }
}

TEST_CASE("where every score is NaN the first tokens are kept") {
  eigen_backend backend;
  arranged_layer<float> layer(sizes, 9);
  const output_metric metric = attach_metric(layer);
  const auto policy = make_policy(rest_kv{}, any_temporal{}, {});
  layer.value(0, 1, 77, 0) = not_a_number;
  const auto outcome = select_tokens(backend, policy, layer.view());
  REQUIRE(outcome.result.ok());
  CHECK(count_nan(outcome, 0) == 0);
  CHECK(count_nan(outcome, 1) == past);
  for (index_t i = 0; i < budget - window; ++i) CHECK(outcome.kept_of(0, 1)[static_cast<std::size_t>(i)] == i);
}
