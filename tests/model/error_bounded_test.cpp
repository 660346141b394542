// SPDX-License-Identifier: Apache-2.0
// The smallest cache within a bound: the bound by output_error itself, one unit less beyond it, a recorded prompt.
#include "support/arranged_layer.hpp"
#include "support/check_error.hpp"
#include "support/test_data.hpp"

#include <restkv/model/error_bounded.hpp>
#include <restkv/reference/backend.hpp>

#include <set>

using namespace restkv;
using namespace restkv_test;

namespace {

using tested_policy = eviction_policy<rest_kv, mean, no_pool, uniform>;

tested_policy policy_of(index_t window) {
  tested_policy policy;
  policy.score.metric_of_distance = metric::identity;
  policy.window = window;
  policy.budget.budget = budget_size::keep_ratio(1.0);
  policy.protect = {.sink = 1, .recent = 4};
  return policy;
}

/// The first n of a layer's candidates by score, all heads together, with the protected ones; and their error.
struct ranked {
  std::vector<std::tuple<double, index_t, index_t, index_t>> order;  // -score, sequence, head, unit
  const layer_view<float>& layer;
  const tested_policy& policy;
  index_t heads = 0;

  ranked(const layer_view<float>& of, const tested_policy& by, index_t l, index_t layers) : layer(of), policy(by) {
    reference_backend backend;
    const auto plan = make_plan(backend, policy, shape_of(layer, l, layers));
    heads = plan.heads;
    std::vector<std::byte> memory(plan.workspace_bytes);
    const std::array extents{plan.shape.batch, plan.heads, plan.shape.tokens};
    std::vector<double> score(static_cast<std::size_t>(extents[0] * extents[1] * extents[2])), smoothed(score),
        drift(score);
    const selection_details<double> details{{score.data(), extents}, {smoothed.data(), extents},
                                            {drift.data(), {extents[0], extents[1]}}};
    kept_tokens kept;
    throw_if_failed(select(backend, plan, layer, workspace(memory), kept, &details));
    const index_t size = policy.granularity.tokens;
    for (index_t b = 0; b < extents[0]; ++b) {
      for (index_t h = 0; h < extents[1]; ++h) {
        const index_t length = sequence(layer, b, h * plan.shape.kv_heads / plan.heads).length;
        for (index_t u = 0; (u + 1) * size <= length - policy.recent(); ++u) {
          if (u * size < policy.protect.sink) continue;
          double sum = 0;
          for (index_t n = u * size; n < (u + 1) * size; ++n) {
            sum += smoothed[static_cast<std::size_t>((b * extents[1] + h) * extents[2] + n)];
          }
          order.emplace_back(-sum / static_cast<double>(size), b, h, u);
        }
      }
    }
    std::sort(order.begin(), order.end());
  }
  [[nodiscard]] owned_kept_tokens kept(index_t n) const {
    std::set<std::array<index_t, 3>> dropped;
    const index_t size = policy.granularity.tokens;
    for (std::size_t i = static_cast<std::size_t>(n); i < order.size(); ++i) {
      for (index_t t = 0; t < size; ++t) {
        dropped.insert({std::get<1>(order[i]), std::get<2>(order[i]), std::get<3>(order[i]) * size + t});
      }
    }
    owned_kept_tokens made(layer.key.extent(0), heads, layer.key.extent(2));
    for (index_t b = 0; b < layer.key.extent(0); ++b) {
      for (index_t h = 0; h < heads; ++h) {
        const sequence_span span = sequence(layer, b, h * layer.key.extent(1) / heads);
        for (index_t t = 0; t < span.length; ++t) {
          if (dropped.contains({b, h, t})) continue;
          made.kept().positions(b, h, made.kept().lengths(b, h)++) = static_cast<position_t>(span.begin + t);
        }
      }
    }
    return made;
  }
  [[nodiscard]] double error(index_t n, const error_bounded& bound) const {
    reference_backend backend;
    const output_errors errors = output_error(backend, kept(n), layer, std::min(bound.queries, layer.query.extent(2)));
    return bound.statistic == error_statistic::mean ? errors.mean_relative() : errors.worst_relative();
  }
};

std::vector<index_t> row_of(const const_kept_tokens& kept, index_t b, index_t h) {
  return {&kept.positions(b, h, 0), &kept.positions(b, h, 0) + kept.lengths(b, h)};
}

}  // namespace

TEST_CASE("the bound is met, and not with one unit less") {
  random_engine random(1);
  reference_backend backend;
  index_t between = 0;
  for (int trial = 0; trial < 40; ++trial) {
    arranged_layer<float> made({.batch = pick(random, 1, 2), .query_heads = 4, .kv_heads = 2, .head_dim = 6,
                                .tokens = pick(random, 12, 60), .queries = 10, .hidden = chance(random, 50) ? 12 : 0,
                                .sharpness = uniform_real(random, 0.5, 4)},
                               static_cast<unsigned>(random()));
    if (chance(random, 40)) {
      std::vector<std::int32_t> lengths(static_cast<std::size_t>(made.sizes.batch));
      for (auto& length : lengths) length = static_cast<std::int32_t>(pick(random, 0, made.sizes.tokens));
      made.pad_to(lengths, chance(random, 50) ? padding::left : padding::right);
      for (auto* tensor : {&made.key, &made.value}) {
        for (index_t i = 0; i < tensor->size(); ++i) {
          if (std::isnan(tensor->data[i])) tensor->data[i] = 3;  // padding
        }
      }
    }
    tested_policy policy = policy_of(pick(random, 1, 8));
    policy.group = chance(random, 30) ? group_reduce::none : group_reduce::l2;
    policy.granularity.tokens = chance(random, 60) ? 1 : pick(random, 2, 4);
    const error_bounded bound{.bound = uniform_real(random, 0, 0.5),
                              .statistic = chance(random, 50) ? error_statistic::mean : error_statistic::worst,
                              .queries = pick(random, 1, 12)};
    const layer_view<float> layer = made.view();
    error_bounded_selection chosen;
    const status outcome = chosen.run(backend, policy, std::span(&layer, 1), bound);
    INFO(outcome.message());
    REQUIRE(outcome.ok());
    const ranked by_hand(layer, policy, 0, 1);
    const index_t n = chosen.chosen(0);
    CAPTURE(trial, bound.bound, n, by_hand.order.size());
    REQUIRE(n <= std::ssize(by_hand.order));
    const owned_kept_tokens expected = by_hand.kept(n);
    for (index_t b = 0; b < made.sizes.batch; ++b) {
      for (index_t h = 0; h < by_hand.heads; ++h) CHECK(row_of(chosen.kept(0), b, h) == row_of(expected.kept(), b, h));
    }
    CHECK(chosen.tokens(0) == expected.kept().total());
    CHECK(chosen.error(0) == by_hand.error(n, bound));
    CHECK(chosen.error(0) <= bound.bound);
    if (n > 0) CHECK(by_hand.error(n - 1, bound) > bound.bound);
    between += n > 0 && n < std::ssize(by_hand.order) ? 1 : 0;
  }
  CHECK(between > 20);
}

TEST_CASE("bounds at the ends: nothing but what is protected, and everything that acts") {
  reference_backend backend;
  const arranged_layer<float> made({.query_heads = 4, .kv_heads = 2, .head_dim = 6, .tokens = 40, .queries = 8});
  const layer_view<float> layer = made.view();
  const tested_policy policy = policy_of(8);
  error_bounded_selection chosen;
  REQUIRE(chosen.run(backend, policy, std::span(&layer, 1), {.bound = 1e9}).ok());
  CHECK(chosen.tokens(0) == 2 * 9);
  CHECK(chosen.chosen(0) == 0);
  REQUIRE(chosen.run(backend, policy, std::span(&layer, 1), {.bound = 1e9, .least = 3}).ok());
  CHECK(chosen.tokens(0) == 2 * 12);
  REQUIRE(chosen.run(backend, policy, std::span(&layer, 1), {.bound = 0}).ok());
  CHECK(chosen.tokens(0) == 2 * 40);
  CHECK(chosen.error(0) == 0.0);
  CHECK(chosen.evaluations() <= 8);  // 62 candidates
  REQUIRE(chosen.run(backend, policy, std::span<const layer_view<float>>{}, {}).ok());
  CHECK(chosen.layers() == 0);
  for (const layer_sizes sizes : {layer_sizes{.batch = 0, .tokens = 20, .queries = 8},
                                  layer_sizes{.tokens = 0, .queries = 0}, layer_sizes{.tokens = 1, .queries = 1}}) {
    const arranged_layer<float> small(sizes);
    const layer_view<float> view = small.view();
    REQUIRE(chosen.run(backend, policy, std::span(&view, 1), {.bound = 0.05}).ok());
    CHECK(chosen.tokens(0) == sizes.batch * 2 * sizes.tokens);
    CHECK(chosen.error(0) == 0.0);
  }
  check_error(chosen.run(backend, policy, std::span(&layer, 1), {.bound = -1}), errc::invalid_argument, {-1, 0},
              "bound");
  check_error(chosen.run(backend, policy, std::span(&layer, 1), {.queries = 0}), errc::invalid_argument, {0, 1},
              "queries");
  check_error(chosen.run(backend, policy, std::span(&layer, 1), {.least = -2}), errc::invalid_argument, {-2, 0},
              "least");
}

TEST_CASE("one bound for a model: the mean of the layers' errors, not with one unit less") {
  reference_backend backend;
  std::vector<arranged_layer<float>> made;
  for (unsigned seed = 1; seed < 5; ++seed) {
    made.emplace_back(layer_sizes{.query_heads = 4, .kv_heads = 2, .head_dim = 6, .tokens = 50, .queries = 8,
                                  .hidden = 12, .sharpness = 0.8 * seed}, seed);
  }
  std::vector<layer_view<float>> layers;
  for (const auto& layer : made) layers.push_back(layer.view());
  const tested_policy policy = policy_of(8);
  for (const bool relative : {true, false}) {
    const error_bounded bound{.bound = 0.05, .scope = error_scope::model, .relative_to_output = relative};
    error_bounded_selection chosen;
    REQUIRE(chosen.run(backend, policy, std::span<const layer_view<float>>(layers), bound).ok());
    // All candidates in one order.
    std::vector<std::tuple<double, std::size_t, std::size_t>> order;
    std::vector<ranked> by_hand;
    for (std::size_t l = 0; l < 4; ++l) {
      by_hand.emplace_back(layers[l], policy, static_cast<index_t>(l), 4);
      const output_errors whole = output_error(backend, by_hand[l].kept(std::ssize(by_hand[l].order)), layers[l]);
      double squares = 0;
      for (index_t i = 0; i < 8; ++i) squares += whole.layer_output_norm()(0, i) * whole.layer_output_norm()(0, i);
      for (std::size_t i = 0; i < by_hand[l].order.size(); ++i) {
        order.emplace_back(std::get<0>(by_hand[l].order[i]) / (relative ? std::sqrt(squares) : 1), l, i);
      }
    }
    std::sort(order.begin(), order.end());
    const auto mean_error = [&](index_t n) {
      std::array<index_t, 4> counts{};
      for (index_t i = 0; i < n; ++i) ++counts[std::get<1>(order[static_cast<std::size_t>(i)])];
      double sum = 0;
      for (std::size_t l = 0; l < 4; ++l) sum += by_hand[l].error(counts[l], bound) / 4;
      return sum;
    };
    index_t n = 0;
    for (index_t l = 0; l < 4; ++l) n += chosen.chosen(l);
    CHECK(n > 0);
    CHECK(n < std::ssize(order));
    CHECK(chosen.mean_error() == Approx(mean_error(n)).epsilon(1e-12));
    CHECK(chosen.mean_error() <= 0.05);
    CHECK(mean_error(n - 1) > 0.05);
  }
}

// One KV head of the recorded layer and its query heads.
TEST_CASE("a recorded prompt within 1, 5 and 10 per cent") {
  const safetensors_file trace = open_file(example_data("trace-2k.safetensors"));
  reference_backend backend;
  const std::string name = "layers.10.";
  const file_tensor<float, 3> q(trace, name + "q"), k(trace, name + "k"), v(trace, name + "v");
  const file_tensor<float, 2> wo(trace, name + "wo");
  const file_tensor<float, 3> future_q(trace, name + "q_future"), future_k(trace, name + "k_future"),
      future_v(trace, name + "v_future");
  layer_view<float> layer;
  layer.query = batched(q.view).slice(1, 3, 3);
  layer.key = batched(k.view).slice(1, 1, 1);
  layer.value = batched(v.view).slice(1, 1, 1);
  layer.projection = tensor_view<const float, 2>(wo.view).slice(1, 3 * 64, 3 * 64);
  const future_view<float> future{batched(future_q.view).slice(1, 3, 3), batched(future_k.view).slice(1, 1, 1),
                                  batched(future_v.view).slice(1, 1, 1)};
  tested_policy policy = policy_of(32);
  policy.protect = {};
  double tokens_before = 1e9;
  for (const double bound : {0.01, 0.05, 0.1}) {
    error_bounded_selection chosen;
    REQUIRE(chosen.run(backend, policy, std::span<const layer_view<float>>(&layer, 1), {.bound = bound, .queries = 16})
                .ok());
    const double window = output_error(backend, chosen.kept(0), layer, 16).mean_relative();
    const double later = future_error(backend, chosen.kept(0), layer, future).mean_relative();
    CAPTURE(bound, window, later, chosen.tokens(0));
    CHECK(window <= bound);
    CHECK(window == chosen.error(0));
    CHECK(window > 0.9 * bound);  // no token is wasted
    CHECK(later < 3 * bound);
    CHECK(chosen.evaluations() <= 20);  // 2016 candidates
    CHECK(static_cast<double>(chosen.tokens(0)) < 0.8 * tokens_before);
    tokens_before = static_cast<double>(chosen.tokens(0));
  }
}
