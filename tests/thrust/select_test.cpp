// SPDX-License-Identifier: Apache-2.0
// Whole selections on Thrust keep what the CPU keeps: damaged inputs, masks, shared heads, chunks, policies row by row.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"
#include "support/damaged_places.hpp"
#include "support/layer_metric.hpp"
#include "support/random_layer.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/thrust/backend.cuh>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/score/value_range.hpp>

using namespace restkv;
using namespace restkv_test;

namespace {

using cpp_backend = thrust_backend<thrust_cpp>;

using policy_t = eviction_policy<rest_kv, any_temporal, any_spatial, any_budget>;

template <class Real>
index_t count_nan(const selection_outcome<Real>& outcome, index_t h, index_t past) {
  const auto row = outcome.scores_of(0, h).first(static_cast<std::size_t>(past));
  return std::count_if(row.begin(), row.end(), [](Real score) { return std::isnan(score); });
}

}  // namespace

TEST_CASE("damaged inputs: Thrust keeps the reference's valid set") {
  const layer_sizes& sizes = damaged_sizes;
  constexpr index_t past = damaged_past;
  for (int place = 0; place < 9; ++place) {
    for (const float bad : {not_a_number, infinity, -infinity}) {
      arranged_layer<float> layer(sizes, 5);
      const output_metric metric = attach_metric(layer);
      for (index_t n = 0; n < (place == 3 ? past : 0); ++n) layer.key(0, 1, n, 2) = bad;  // all keys of the past
      for (index_t n = 0; n < (place == 4 ? sizes.tokens : 0); ++n) layer.value(0, 1, n, 1) = bad;
      if (place == 0) layer.key(0, 1, 40, 3) = bad;
      if (place == 1) layer.key(0, 1, 147, 2) = bad;  // of the window
      if (place == 2) layer.query(0, 3, 5, 1) = bad;
      if (place == 5) layer.value(0, 1, 40, 3) = bad;
      if (place == 6) layer.value(0, 1, 147, 3) = bad;
      if (place == 7) layer.value(0, 1, 0, 0) = bad;
      if (place == 8) layer.value(0, 1, 40, 7) = bad;  // the last channel, where the factor of W_O has no zeros
      for (const auto order : {query_order::before, query_order::after}) {
        for (const auto how : {metric::identity, metric::projection}) {
          for (const any_temporal& temporal : {any_temporal{mean{}}, any_temporal{last{}}, any_temporal{maximum{}}}) {
            const policy_t policy{.score = {.order = order, .metric_of_distance = how},
                                  .window = 5,
                                  .temporal = temporal,
                                  .spatial = {adaptive_window{.min_width = 3, .scale = 7.0f}},
                                  .group = group_reduce::l2,
                                  .budget = {uniform{40}},
                                  .protect = {.sink = 0, .recent = 0}};
            reference_backend reference;
            cpp_backend thrust;
            const auto exact = select_tokens(reference, policy, layer.view());
            const auto got = select_tokens(thrust, policy, layer.view());
            CAPTURE(place, bad, int(order), int(how), temporal.choice.index());
            REQUIRE(exact.result.ok());
            REQUIRE(got.result.ok());
            CHECK(got.kept == exact.kept);
            CHECK(select_tokens(thrust, policy, layer.view(), false).kept == got.kept);
            for (index_t h = 0; h < 2; ++h) CHECK(count_nan(got, h, past) == count_nan(exact, h, past));
          }
        }
      }
    }
  }
}

TEST_CASE("policies of every kind keep on Thrust what they keep in the reference") {
  random_engine random(41);
  index_t heads = 0;
  index_t same = 0;
  for (int i = 0; i < 80; ++i) {
    layer_recipe recipe{.batch = pick(random, 1, 3),
                        .kv_heads = pick(random, 1, 3),
                        .group = chance(random, 50) ? 1 : 4,
                        .head_dim = pick(random, 1, 20),
                        .tokens = pick(random, 0, 150),
                        .hidden = pick(random, 1, 30),
                        .strided = chance(random, 50),
                        .chunks = pick(random, 1, 3),
                        .padded = chance(random, 50),
                        .pad = chance(random, 50) ? padding::left : padding::right,
                        .masked_percent = chance(random, 40) ? 10 : 0};
    const index_t window = pick(random, 1, 8);
    recipe.query_rows = std::min(window, recipe.tokens) + pick(random, 0, 3);
    const random_layer<float> layer(random, recipe);
    policy_t policy{.window = window, .group = group_reduce::l2, .protect = {.sink = pick(random, 0, 3), .recent = 0}};
    const index_t budget = window + 4 + recipe.tokens * pick(random, 0, 10) / 10;
    policy.budget.choice = uniform{budget};
    if (chance(random, 40)) policy.budget.choice = ada_kv{.budget = budget, .normalise = chance(random, 50)};
    if (chance(random, 30)) policy.group = group_reduce::none;
    if (chance(random, 40)) policy.spatial.choice = adaptive_window{.min_width = 3, .scale = 9.0f};
    if (chance(random, 30)) policy.granularity.tokens = pick(random, 2, 5);
    if (chance(random, 30) && policy.group != group_reduce::none) policy.granularity.shared = true;
    if (chance(random, 40)) policy.score.order = query_order::after;
    reference_backend reference;
    cpp_backend thrust;
    const auto exact = select_tokens(reference, policy, layer.view());
    const auto got = select_tokens(thrust, policy, layer.view());
    CAPTURE(i, recipe.tokens, recipe.batch, window, budget, policy.granularity.tokens, policy.granularity.shared,
            exact.result.message(), got.result.message());
    REQUIRE(exact.result.code() == got.result.code());
    if (!exact.result.ok()) continue;
    for (std::size_t row = 0; row < exact.kept.size(); ++row) {
      ++heads;
      same += got.kept[row] == exact.kept[row] ? 1 : 0;
      // Another set only by near ties: it has the same number of tokens, ascending.
      CHECK(std::adjacent_find(got.kept[row].begin(), got.kept[row].end(), std::greater_equal<>{}) ==
            got.kept[row].end());
    }
  }
  CAPTURE(heads, same);
  CHECK(heads > 200);
  CHECK(same >= heads - heads / 100);
}

TEST_CASE("a policy of whole heads is selected row by row on Thrust") {
  random_engine random(42);
  for (int i = 0; i < 20; ++i) {
    const random_layer<bfloat16> layer(random, {.batch = 2, .tokens = pick(random, 1, 100), .padded = true});
    const eviction_policy<value_range, mean, any_spatial, any_budget> policy{.budget = {uniform{20}},
                                                                             .protect = {.sink = 2, .recent = 5}};
    reference_backend reference;
    cpp_backend thrust;
    const auto exact = select_tokens(reference, policy, layer.view());
    const auto got = select_tokens(thrust, policy, layer.view());
    REQUIRE(exact.result.ok());
    REQUIRE(got.result.ok());
    CHECK(got.kept == exact.kept);
  }
}
