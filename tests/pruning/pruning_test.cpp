// SPDX-License-Identifier: Apache-2.0
// Certified pruning: the kept set is the one that scoring every token gives, and few tokens are scored.
#include "support/catch.hpp"
#include "support/random_layer.hpp"
#include "support/selection_outcome.hpp"
#include "support/test_data.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/presets.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/select.hpp>

#include <atomic>

namespace {

using restkv::index_t;
using restkv::token_state;

/// Counts the tokens that pruning had scored.
class counting_backend : public restkv::eigen_backend {
 public:
  using eigen_backend::eigen_backend;

  template <class Request, restkv::element T>
  restkv::status exact_scores(const Request& request, const restkv::layer_view<T>& layer, scratch<Request>& scratch,
                              restkv::tensor_view<token_state, 3> states, restkv::tensor_view<float, 3> out) {
    ++rounds;
    for (index_t i = 0; i < states.size(); ++i) scored += states.data[i] == token_state::wanted ? 1 : 0;
    return eigen_backend::exact_scores(request, layer, scratch, states, out);
  }

  index_t rounds = 0;
  index_t scored = 0;
};

/// Every part may be chosen at run time, so that this compiles once.
template <class Temporal>
using any_policy = restkv::eviction_policy<restkv::rest_kv, Temporal, restkv::any_spatial, restkv::any_budget>;

template <class Temporal>
any_policy<Temporal> random_policy(restkv_test::random_engine& random, index_t tokens) {
  using restkv_test::chance;
  using restkv_test::pick;
  any_policy<Temporal> policy;
  policy.score.order = chance(random, 50) ? restkv::query_order::before : restkv::query_order::after;
  policy.score.metric_of_distance = chance(random, 70) ? restkv::metric::projection : restkv::metric::identity;
  policy.score.tau = chance(random, 30) ? 2.0f : 1.0f;
  policy.score.normalised = chance(random, 30);
  policy.window = pick(random, 1, 16);
  policy.group = static_cast<restkv::group_reduce>(pick(random, 0, 4));
  switch (pick(random, 0, 3)) {
    case 0: policy.spatial.choice = restkv::no_pool{}; break;
    case 1: policy.spatial.choice = restkv::average_pool{static_cast<int>(2 * pick(random, 0, 5) + 1)}; break;
    case 2: policy.spatial.choice = restkv::max_pool{static_cast<int>(2 * pick(random, 0, 5) + 1)}; break;
    default: policy.spatial.choice = restkv::adaptive_window{5, static_cast<float>(pick(random, 1, 60))}; break;
  }
  policy.protect = {.sink = pick(random, 0, 4), .recent = pick(random, 0, 20)};
  const index_t least = policy.protect.sink + std::max(policy.window, policy.protect.recent);
  const index_t budget = pick(random, least, least + tokens);
  switch (pick(random, 0, 2)) {
    case 0: policy.budget.choice = restkv::uniform{budget}; break;
    case 1: policy.budget.choice = restkv::pyramid{budget}; break;
    default:
      policy.budget.choice = restkv::ada_kv{.budget = budget,
                                            .floor = static_cast<float>(restkv_test::uniform_real(random, 0.0, 1.0)),
                                            .normalise = chance(random, 20)};
      break;
  }
  return policy;
}

/// Selects with and without pruning; true when pruning ran.
template <class Policy, class T>
bool check_same(const Policy& policy, const restkv::layer_view<T>& layer, bool must_succeed = true) {
  counting_backend pruned(2);
  restkv::eigen_backend complete(1, {.pruning = false});
  const auto a = restkv_test::select_tokens(pruned, policy, layer, false);
  const auto b = restkv_test::select_tokens(complete, policy, layer, false);
  INFO(a.result.message());
  INFO(b.result.message());
  CHECK(a.result.code() == b.result.code());
  if (must_succeed) CHECK(a.result.ok());
  CHECK(a.kept == b.kept);
  return pruned.rounds > 0;
}

template <class Temporal>
void check_random_policies(unsigned seed, int cases) {
  restkv_test::random_engine random(seed);
  int pruned = 0;
  for (int i = 0; i < cases; ++i) {
    restkv_test::layer_recipe recipe;
    recipe.batch = restkv_test::pick(random, 1, 2);
    recipe.group = restkv_test::pick(random, 1, 4);
    recipe.head_dim = 8 * restkv_test::pick(random, 1, 4);
    recipe.tokens = restkv_test::pick(random, 20, 400);
    recipe.hidden = restkv_test::chance(random, 30) ? recipe.head_dim / 2 : 48;  // singular metrics, too
    recipe.sharpness = restkv_test::uniform_real(random, 0.0, 6.0);
    recipe.padded = restkv_test::chance(random, 30);
    recipe.masked_percent = restkv_test::chance(random, 30) ? 5 : 0;
    restkv_test::random_layer<float> layer(random, recipe);
    const auto policy = random_policy<Temporal>(random, recipe.tokens);
    CAPTURE(i, recipe.tokens, policy.window, static_cast<int>(policy.group), static_cast<int>(policy.score.order));
    pruned += check_same(policy, layer.view(), false) ? 1 : 0;
  }
  CHECK(pruned > cases / 3);
}

}  // namespace

TEST_CASE("pruning changes no kept set, linear smoothers") {
  check_random_policies<restkv::any_temporal>(1, 300);
}

TEST_CASE("pruning changes no kept set, the maximum over queries") { check_random_policies<restkv::maximum>(2, 100); }

TEST_CASE("pruning changes no kept set when everything ties, or nothing is a number") {
  restkv_test::random_engine random(3);
  const restkv_test::layer_recipe recipe{.head_dim = 16, .tokens = 300, .query_rows = 32};
  const auto flatten = [](auto& tensor) {
    restkv_test::for_each(tensor.view(), [](float& x) { x = 0.25f; });
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (const auto order : {restkv::query_order::before, restkv::query_order::after}) {
    auto policy = restkv::presets::standard(64);
    policy.score.order = order;
    SECTION(order == restkv::query_order::before ? "before" : "after") {
      restkv_test::random_layer<float> same_keys(random, recipe);
      flatten(same_keys.key);
      check_same(policy, same_keys.view());
      restkv_test::random_layer<float> same_values(random, recipe);
      flatten(same_values.value);
      check_same(policy, same_values.view());
      flatten(same_values.key);
      check_same(policy, same_values.view());
      for (const float damage : {nan, inf, -inf, 3e38f}) {
        restkv_test::random_layer<float> damaged(random, recipe);
        damaged.key.view()(0, 0, 17, 3) = damage;
        check_same(policy, damaged.view());
        damaged.value.view()(0, 1, 101, 5) = damage;
        check_same(policy, damaged.view());
      }
      // A sink that holds nearly all attention: the centre of the outputs is its value.
      restkv_test::random_layer<float> sink(random, recipe);
      for (index_t h = 0; h < 2; ++h) {
        for (index_t c = 0; c < 16; ++c) sink.key.view()(0, h, 0, c) = 40.0f * sink.query.view()(0, 2 * h, 15, c);
      }
      check_same(policy, sink.view());
    }
  }
}

TEST_CASE("on a real prompt pruning scores a small part of the tokens, and keeps the same ones") {
  const auto file = restkv_test::open_file(restkv_test::test_data("traces/trace-8k-layer4.safetensors"));
  const std::string prefix = "layers.4.";
  const restkv_test::file_tensor<float, 3> q(file, prefix + "q");
  const restkv_test::file_tensor<float, 3> k(file, prefix + "k");
  const restkv_test::file_tensor<float, 3> v(file, prefix + "v");
  const restkv_test::file_tensor<float, 2> wo(file, prefix + "wo");
  const auto batch_of_one = [](const restkv::tensor_view<float, 3>& x) {
    return restkv::tensor_view<const float, 4>(x.data, {1, x.extent(0), x.extent(1), x.extent(2)});
  };
  restkv::output_metric metric;
  restkv::throw_if_failed(
      metric.build(restkv::tensor_view<const float, 2>(wo.view), q.view.extent(0), q.view.extent(2)));
  restkv::layer_view<float> layer{.query = batch_of_one(q.view),
                                  .key = batch_of_one(k.view),
                                  .value = batch_of_one(v.view),
                                  .metric = metric.view()};
  for (const auto order : {restkv::query_order::before, restkv::query_order::after}) {
    for (const index_t budget : {128, 1024}) {
      auto policy = restkv::presets::standard(budget);
      policy.score.order = order;
      counting_backend backend(2);
      restkv::eigen_backend complete(2, {.pruning = false});
      const auto pruned = restkv_test::select_tokens(backend, policy, layer, false);
      const auto all = restkv_test::select_tokens(complete, policy, layer, false);
      REQUIRE(pruned.result.ok());
      CHECK(pruned.kept == all.kept);
      const index_t tokens = k.view.extent(0) * k.view.extent(1);
      CAPTURE(budget, backend.scored, tokens, backend.rounds);
      CHECK(backend.rounds >= 1);
      CHECK(backend.scored < tokens / 2);
    }
  }
}

TEST_CASE("logits that are computed again give the same kept sets as those that were kept") {
  restkv_test::random_engine random(5);
  for (int i = 0; i < 60; ++i) {
    restkv_test::layer_recipe recipe{.batch = 2, .group = restkv_test::pick(random, 1, 4), .head_dim = 16, .tokens = 330};
    recipe.sharpness = i % 3 == 0 ? 60.0 : 2.0;  // also logits so far apart that shares need a second look
    recipe.padded = i % 2 == 0;
    restkv_test::random_layer<float> layer(random, recipe);
    const auto policy = random_policy<restkv::any_temporal>(random, recipe.tokens);
    restkv::eigen_backend keeps(2);
    restkv::eigen_backend forgets(2, {.kept_logits = i % 4 == 0 ? 0 : 330 * 16});
    const auto a = restkv_test::select_tokens(keeps, policy, layer.view(), i % 2 == 0);
    const auto b = restkv_test::select_tokens(forgets, policy, layer.view(), i % 2 == 0);
    CAPTURE(i);
    CHECK(a.result.code() == b.result.code());
    CHECK(a.kept == b.kept);
  }
}

TEST_CASE("details and wide smoothers turn pruning off") {
  restkv_test::random_engine random(4);
  restkv_test::random_layer<float> layer(random, {.head_dim = 16, .tokens = 600, .query_rows = 32});
  counting_backend backend(1);
  const auto policy = restkv::presets::standard(64);
  REQUIRE(restkv_test::select_tokens(backend, policy, layer.view(), true).result.ok());
  CHECK(backend.rounds == 0);
  REQUIRE(restkv_test::select_tokens(backend, policy, layer.view(), false).result.ok());
  CHECK(backend.rounds > 0);
  auto wide = policy;
  wide.spatial.width = 201;
  backend.rounds = 0;
  REQUIRE(restkv_test::select_tokens(backend, wide, layer.view(), false).result.ok());
  CHECK(backend.rounds == 0);
}
