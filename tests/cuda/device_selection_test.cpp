// SPDX-License-Identifier: Apache-2.0
// `select` on the GPU: the scores are the CPU's within rounding, the sets are those that the CPU chooses from the same
// scores, bit by bit; captured in a graph, on two streams at once, within its workspace. Without a GPU: what is
// refused, and that a launch which fails is a status.
#include "cuda/device_selection.hpp"
#include "support/catch.hpp"
#include "support/random_layer.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>

using namespace restkv_test;
using namespace restkv;

namespace {

#define RESTKV_NEEDS_DEVICE() \
  if (!has_device()) SKIP("no GPU was found")

/// The Eigen backend with scores and drifts that somebody else computed.
class given_backend : public eigen_backend {
 public:
  explicit given_backend(const selection_outcome<float>& given) : eigen_backend(1, {.pruning = false}), given_(given) {}

  template <class Request, element T>
  status token_scores(const Request&, const layer_view<T>&, scratch<Request>&, tensor_view<float, 3> out) const {
    for (index_t b = 0; b < given_.batch; ++b) {
      for (index_t h = 0; h < given_.heads; ++h) {
        const auto row = given_.scores_of(b, h);
        for (index_t n = 0; n < given_.tokens; ++n) out(b, h, n) = row[static_cast<std::size_t>(n)];
      }
    }
    return {};
  }
  template <class Request, element T>
  status window_drift(const Request& request, const layer_view<T>&, std::span<const index_t>, scratch<Request>&,
                      tensor_view<double, 2> out) const {
    const index_t group = request.shape.query_heads / given_.heads;
    for (index_t b = 0; b < given_.batch; ++b) {
      for (index_t h = 0; h < request.shape.query_heads; ++h) {
        out(b, h) = given_.drift[static_cast<std::size_t>(b * given_.heads + h / group)];
      }
    }
    return {};
  }

 private:
  const selection_outcome<float>& given_;
};

/// |a - b| within what float arithmetic over `terms` terms may differ, relative to the larger.
bool close(double a, double b, double largest, index_t terms) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  constexpr double eps = 1.0 / (1 << 23);
  return a == b || std::fabs(a - b) <=
                       8 * static_cast<double>(terms) * eps * std::max({std::fabs(a), std::fabs(b), 1e-3 * largest});
}

constexpr auto by_kernels = [](const auto& policy, const auto& layer, const device_run& how) {
  return select_on_device(policy, layer, how);
};

template <class Policy, class T, class Select>
void compare(const Policy& policy, const layer_view<T>& layer, const device_run& how,
             const Select& select_tokens_there) {
  const auto found = select_tokens_there(policy, layer, how);
  INFO(found.result.message());
  REQUIRE(found.result.ok());
  if (!how.with_details) {
    device_run seen = how;
    seen.with_details = true;
    CHECK(select_tokens_there(policy, layer, seen).kept == found.kept);
    return;
  }
  given_backend same_scores(found);
  const auto chosen = select_tokens(same_scores, policy, layer);
  REQUIRE(chosen.result.ok());
  CHECK(chosen.kept == found.kept);
  eigen_backend eigen(1, {.pruning = false});
  const auto expected = select_tokens(eigen, policy, layer);
  REQUIRE(expected.result.ok());
  double largest = 0;
  for (const float score : expected.score) largest = std::isfinite(score) ? std::max<double>(largest, score) : largest;
  index_t differences = 0;
  for (std::size_t i = 0; i < expected.score.size(); ++i) {
    differences += close(expected.score[i], found.score[i], largest, layer.key.extent(3) + 32) ? 0 : 1;
  }
  CHECK(differences == 0);
  for (std::size_t i = 0; i < expected.drift.size(); ++i) {
    CHECK(expected.drift[i] == Approx(found.drift[i]).margin(1e-6));  // sums of positions: exact but for ties
  }
}

template <class T>
void compare_policies(const layer_view<T>& layer, index_t budget, const device_run& how) {
  before_policy before{.window = 16};
  before.budget.budget = budget;
  before.protect = {.sink = 2, .recent = 3};
  compare(before, layer, how, by_kernels);
  before.score.order = query_order::after;
  compare(before, layer, how, by_kernels);
  if constexpr (std::is_same_v<T, bfloat16>) {
    paper_policy paper{.window = 16};
    paper.spatial = {.min_width = 5, .scale = 3.0f};
    paper.budget.budget = budget;
    paper.score.order = query_order::after;
    compare(paper, layer, how, by_kernels);
  }
  if constexpr (std::is_same_v<T, half>) {
    observed_policy observed{.window = 16};
    observed.budget.budget = budget;
    observed.granularity.tokens = 4;
    compare(observed, layer, how, by_kernels);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("the device chooses what the CPU chooses from the same scores", "", float, half, bfloat16) {
  RESTKV_NEEDS_DEVICE();
  random_engine random(11);
  for (int turn = 0; turn < 12; ++turn) {
    const layer_recipe recipe{.batch = pick(random, 1, 3),
                              .kv_heads = pick(random, 1, 3),
                              .group = index_t{1} << pick(random, 0, 2),
                              .head_dim = turn % 3 == 0 ? 128 : 16 * pick(random, 1, 6),
                              .tokens = turn % 4 == 0 ? pick(random, 4000, 9000) : pick(random, 40, 700),
                              .query_rows = 24,
                              .hidden = 96,
                              .padded = chance(random, 50),
                              .pad = chance(random, 50) ? padding::left : padding::right,
                              .masked_percent = chance(random, 30) ? 5 : 0};
    const random_layer<TestType> layer(random, recipe);
    CAPTURE(turn, recipe.tokens, recipe.head_dim, recipe.group);
    compare_policies(layer.view(), recipe.tokens / 3 + 25, {.with_details = true});
    compare_policies(layer.view(), recipe.tokens / 3 + 25, {.with_details = false});  // pruned
  }
}

TEST_CASE("Thrust chooses on the device what the CPU chooses from the same scores") {
  RESTKV_NEEDS_DEVICE();
  random_engine random(16);
  for (int turn = 0; turn < 6; ++turn) {
    const random_layer<bfloat16> layer(random, {.batch = 2,
                                                .kv_heads = 2,
                                                .group = 2,
                                                .head_dim = 64,
                                                .tokens = pick(random, 40, 900),
                                                .query_rows = 24,
                                                .hidden = 96,
                                                .padded = chance(random, 50)});
    before_policy policy{.window = 16};
    policy.budget.budget = 60;
    CAPTURE(turn);
    compare(policy, layer.view(), {.with_details = true},
            [](const auto& p, const auto& l, const device_run& how) { return select_by_thrust(p, l, how); });
  }
}

TEST_CASE("a selection is captured in a graph and replayed") {
  RESTKV_NEEDS_DEVICE();
  random_engine random(12);
  const random_layer<bfloat16> layer(
      random, {.batch = 2, .kv_heads = 2, .group = 4, .head_dim = 64, .tokens = 3000, .query_rows = 32, .hidden = 96});
  compare_policies(layer.view(), 300, {.with_details = true, .in_graph = true});
  compare_policies(layer.view(), 300, {.with_details = false, .in_graph = true});
}

TEST_CASE("selections on several streams at once do not disturb each other") {
  RESTKV_NEEDS_DEVICE();
  random_engine random(13);
  const random_layer<half> layer(
      random, {.batch = 2, .kv_heads = 4, .group = 2, .head_dim = 128, .tokens = 5000, .query_rows = 32, .hidden = 96});
  compare_policies(layer.view(), 500, {.with_details = true, .streams = 4});
  compare_policies(layer.view(), 500, {.with_details = false, .streams = 4});
}

TEST_CASE("what the CPU refuses is refused before a launch, in the same words") {
  random_engine random(14);
  random_layer<float> whole(
      random,
      {.batch = 2, .kv_heads = 2, .group = 2, .head_dim = 8, .tokens = 60, .query_rows = 16, .masked_percent = 90});
  before_policy good{.window = 8};
  good.budget.budget = 20;
  good.protect = {.sink = 1, .recent = 2};
  layer_view<float> clean = whole.view();
  clean.keep_mask = {};
  const problem_shape shape = shape_of(clean);
  const std::vector<std::int32_t> long_lengths{61, 5};
  const std::vector<std::int32_t> head_lengths{1, 2, 3, 99};
  int refused = 0;
  const auto check = [&](const before_policy& policy, const problem_shape& of, const layer_view<float>& layer) {
    eigen_backend eigen;
    plan<before_policy> made;
    status expected = make_plan(eigen, policy, of, made);
    if (expected.ok()) {
      std::vector<std::byte> memory(made.workspace_bytes);
      kept_tokens kept;
      expected = select(eigen, made, layer, workspace(memory.data(), memory.size()), kept);
    }
    REQUIRE(!expected.ok());
    const status found = plan_and_select_on_device(policy, of, layer);
    CHECK(found.code() == expected.code());
    CHECK(std::string(found.message()) == expected.message());
    ++refused;
  };
  const auto with_policy = [&](const auto& change) {
    before_policy policy = good;
    change(policy);
    check(policy, shape, clean);
  };
  const auto with_layer = [&](const auto& change) {
    layer_view<float> layer = clean;
    change(layer);
    check(good, shape, layer);
  };
  with_policy([](auto& policy) { policy.window = 0; });
  with_policy([](auto& policy) { policy.spatial.width = 4; });
  with_policy([](auto& policy) { policy.budget.floor = 2; });
  with_policy([](auto& policy) { policy.budget.budget = 3; });
  with_policy([](auto& policy) { policy.score.tau = -1; });
  with_policy([](auto& policy) { policy.protect.sink = -1; });
  problem_shape bad_shape = shape;
  bad_shape.kv_heads = 3;
  check(good, bad_shape, clean);
  bad_shape = shape;
  bad_shape.tokens = 59;
  check(good, bad_shape, clean);
  with_layer([](auto& layer) { layer.key = {}; });
  with_layer([](auto& layer) { layer.value = {}; });
  with_layer([](auto& layer) { layer.metric = {}; });
  with_layer([](auto& layer) { layer.query.data = nullptr; });
  with_layer([](auto& layer) { layer.query = layer.query.slice(2, 0, 7); });
  with_layer([](auto& layer) { layer.query = layer.query.slice(3, 0, 7); });
  with_layer([&](auto& layer) { layer.lengths = {long_lengths.data(), {2}}; });
  with_layer([&](auto& layer) { layer.lengths = {long_lengths.data(), {1}}; });
  with_layer([&](auto& layer) { layer.head_lengths = {head_lengths.data(), {2, 2}}; });
  with_layer([&](auto& layer) { layer.keep_mask = whole.view().keep_mask; });
  CHECK(refused == 18);
  const status small = plan_and_select_on_device(good, shape, clean, 0.9);
  CHECK(small.code() == errc::workspace_too_small);
}

TEST_CASE("without a device a launch fails with a status that holds CUDA's error") {
  if (has_device()) SKIP("there is a GPU");
  random_engine random(15);
  const random_layer<float> layer(random, {.tokens = 60});
  before_policy policy{.window = 8};
  policy.budget.budget = 20;
  policy.protect = {.sink = 1, .recent = 2};
  const status outcome = plan_and_select_on_device(policy, shape_of(layer.view()), layer.view());
  INFO(outcome.message());
  CHECK(outcome.code() == errc::device_failure);
  CHECK(std::string(outcome.message()).find("CUDA error") != std::string::npos);
}
