// SPDX-License-Identifier: Apache-2.0
// What make_plan and select refuse, and that they change nothing then.
#include "policy/selection_support.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>

#include <functional>

using namespace restkv_test;
using restkv::eigen_backend;
using restkv::errc;
using restkv::problem_shape;
using restkv::reference_backend;
using restkv::rest_kv;

namespace {

using policy_type = any_policy<rest_kv>;
using plan_type = restkv::plan<policy_type>;

policy_type good_policy() {
  policy_type policy;
  policy.window = 8;
  policy.spatial.choice = restkv::average_pool{};
  policy.budget.choice = restkv::uniform{20};
  policy.protect = {.sink = 3, .recent = 5};
  return policy;
}
constexpr problem_shape good_shape{.batch = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 60};

/// Plans; on failure the plan must still be what it was.
template <class Backend>
status planned(const Backend& backend, const policy_type& policy, const problem_shape& shape) {
  plan_type plan;
  plan.capacity = -123;
  const status outcome = restkv::make_plan(backend, policy, shape, plan);
  CHECK((plan.capacity == -123) == !outcome.ok());
  return outcome;
}

}  // namespace

TEST_CASE("make_plan names a bad parameter of any part") {
  const reference_backend backend;
  struct fault {
    const char* word;
    std::vector<index_t> numbers;
    std::function<void(policy_type&)> damage;
  };
  for (const fault& f : std::vector<fault>{
           {"rest_kv.tau", {-1, 64}, [](policy_type& p) { p.score.tau = -1; }},
           {"rest_kv.tau", {65, 64}, [](policy_type& p) { p.score.tau = 65; }},
           {"ema.alpha", {2, 1}, [](policy_type& p) { p.temporal.choice = restkv::ema{.alpha = 2}; }},
           {"average_pool.width", {4, 1}, [](policy_type& p) { p.spatial.choice = restkv::average_pool{.width = 4}; }},
           {"max_pool.width", {0, 1}, [](policy_type& p) { p.spatial.choice = restkv::max_pool{.width = 0}; }},
           {"adaptive_window.scale", {0},
            [](policy_type& p) { p.spatial.choice = restkv::adaptive_window{.scale = 0}; }},
           {"uniform", {0, 1}, [](policy_type& p) { p.budget.choice = restkv::uniform{0}; }},
           {"pyramid.beta", {0, 1}, [](policy_type& p) { p.budget.choice = restkv::pyramid{.beta = 0}; }},
           {"ada_kv.floor", {3, 0, 1}, [](policy_type& p) { p.budget.choice = restkv::ada_kv{.floor = 3}; }},
           {"sink", {-1, 5}, [](policy_type& p) { p.protect.sink = -1; }},
           {"recent", {3, -2}, [](policy_type& p) { p.protect.recent = -2; }},
           {"sink", {std::numeric_limits<index_t>::max()},
            [](policy_type& p) { p.protect.sink = std::numeric_limits<index_t>::max(); }},
           {"window", {0, 1, 1024}, [](policy_type& p) { p.window = 0; }},
           {"window", {1025, 1, 1024}, [](policy_type& p) { p.window = 1025; }},
       }) {
    policy_type policy = good_policy();
    f.damage(policy);
    CAPTURE(f.word, f.numbers);
    check_error(planned(backend, policy, good_shape), errc::invalid_argument, f.numbers, f.word);
  }
  CHECK(planned(backend, good_policy(), good_shape).ok());
}

TEST_CASE("make_plan names a shape that cannot be, with both numbers") {
  const reference_backend backend;
  struct fault {
    errc code;
    std::vector<index_t> numbers;
    std::function<void(problem_shape&)> damage;
  };
  constexpr index_t most_tokens = std::numeric_limits<position_t>::max();
  constexpr index_t most = std::numeric_limits<index_t>::max();
  for (const fault& f : std::vector<fault>{
           {errc::shape_mismatch, {8, 3}, [](problem_shape& s) { s.query_heads = 8, s.kv_heads = 3; }},
           {errc::shape_mismatch, {0, 2}, [](problem_shape& s) { s.query_heads = 0; }},
           {errc::shape_mismatch, {4, 0}, [](problem_shape& s) { s.kv_heads = 0; }},
           {errc::shape_mismatch, {-4, -2}, [](problem_shape& s) { s.query_heads = -4, s.kv_heads = -2; }},
           {errc::invalid_argument, {65538, 65536}, [](problem_shape& s) { s.query_heads = 65538; }},
           {errc::invalid_argument, {most - 1, 65536}, [](problem_shape& s) { s.query_heads = most - 1, s.batch = 0; }},
           {errc::invalid_argument, {0, 1, 4096}, [](problem_shape& s) { s.head_dim = 0; }},
           {errc::invalid_argument, {4097, 4096}, [](problem_shape& s) { s.head_dim = 4097; }},
           {errc::invalid_argument, {-1, 60}, [](problem_shape& s) { s.batch = -1; }},
           {errc::invalid_argument, {2, -60}, [](problem_shape& s) { s.tokens = -60; }},
           {errc::invalid_argument, {most_tokens + 1, most_tokens},
            [](problem_shape& s) { s.tokens = most_tokens + 1; }},
           {errc::invalid_argument, {5, 4}, [](problem_shape& s) { s.layer = 5, s.layers = 4; }},
           {errc::invalid_argument, {4, 4}, [](problem_shape& s) { s.layer = 4, s.layers = 4; }},
           {errc::invalid_argument, {-1, 4}, [](problem_shape& s) { s.layer = -1, s.layers = 4; }},
           {errc::invalid_argument, {0, 0}, [](problem_shape& s) { s.layers = 0; }},
           {errc::invalid_argument, {most, 4, 60}, [](problem_shape& s) { s.batch = most; }},
       }) {
    problem_shape shape = good_shape;
    f.damage(shape);
    CAPTURE(f.numbers);
    check_error(planned(backend, good_policy(), shape), f.code, f.numbers);
  }
}

TEST_CASE("the largest shapes either get a size or a reason, without overflow") {
  random_engine random(1);
  const eigen_backend backend;
  const auto extent = [&](int bits) { return index_t(1) << pick(random, 0, bits); };
  int fits = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    problem_shape shape{.batch = chance(random, 10) ? 0 : extent(62), .kv_heads = extent(20), .head_dim = extent(13)};
    shape.query_heads = shape.kv_heads * extent(6);
    shape.tokens = extent(32);
    auto policy = good_policy();
    policy.window = pick(random, 1, 1024);
    policy.budget.choice = restkv::ada_kv{.budget = extent(40) + 1100};
    policy.group = chance(random, 50) ? restkv::group_reduce::none : restkv::group_reduce::l2;
    fits += planned(backend, policy, shape).ok() ? 1 : 0;
  }
  CHECK(fits > 100);
  CHECK(fits < 1900);
}

TEST_CASE("a budget below the protected tokens is refused, with both numbers and what protects them") {
  const reference_backend backend;
  const restkv::budget_size sizes[] = {restkv::budget_size(10), restkv::budget_size::keep_ratio(10.5 / 60)};
  for (const auto& size : sizes) {
    for (int kind = 0; kind < 3; ++kind) {
      auto policy = good_policy();
      if (kind == 0) policy.budget.choice = restkv::uniform{size};
      if (kind == 1) policy.budget.choice = restkv::pyramid{.budget = size};
      if (kind == 2) policy.budget.choice = restkv::ada_kv{.budget = size};
      CAPTURE(kind, size.ratio);
      check_error(planned(backend, policy, good_shape), errc::invalid_argument, {10, 11, 3, 8}, "sinks");
      policy.protect.sink = 2;
      CHECK(planned(backend, policy, good_shape).ok());
      policy.protect.sink = 3;
      problem_shape shape = good_shape;
      shape.tokens = size.ratio > 0 ? 64 : 9;  // 11 of 64 by ratio; all 9
      CHECK(planned(backend, policy, shape).ok());
    }
  }
}

TEMPLATE_TEST_CASE("a workspace that is too small is refused with both sizes", "", reference_backend, eigen_backend) {
  random_engine random(2);
  TestType backend;
  const random_layer<float> layer(random, {.batch = 2, .tokens = 60, .query_rows = 8});
  const auto plan = restkv::make_plan(backend, good_policy(), restkv::shape_of(layer.view()));
  REQUIRE(plan.workspace_bytes > 64);
  const guarded_tensor<float, 4> key(layer.key);
  for (int trial = 0; trial < 60; ++trial) {
    // The last 64 bytes are for the alignment of any address: not needed when the buffer is aligned.
    const auto bytes = static_cast<std::size_t>(pick(random, 0, static_cast<index_t>(plan.workspace_bytes) - 65));
    guarded_workspace memory(random, bytes);
    kept_tokens kept;
    kept.lengths.extents = {77, 78};
    check_error(restkv::select(backend, plan, layer.view(), memory.space(), kept), errc::workspace_too_small,
                {static_cast<index_t>(bytes), static_cast<index_t>(plan.workspace_bytes)});
    CHECK(memory.guards_stand());
    CHECK((kept.lengths.extents[0] == 77 && kept.positions.data == nullptr));
    CHECK(layer.key.same_bytes(key));
  }
  kept_tokens kept;
  check_error(restkv::select(backend, plan, layer.view(), restkv::workspace(nullptr, 1 << 30), kept),
              errc::workspace_too_small, {0, static_cast<index_t>(plan.workspace_bytes)}, "null");
  check_error(restkv::select(backend, plan, layer.view(), restkv::workspace(), kept), errc::workspace_too_small,
              {static_cast<index_t>(plan.workspace_bytes)}, "no memory");
}

TEST_CASE("select names a layer that does not fit its plan, and changes nothing") {
  random_engine random(3);
  eigen_backend backend;
  const layer_recipe recipe{.batch = 2, .tokens = 60, .query_rows = 8};
  random_layer<float> layer(random, recipe);
  const auto plan = restkv::make_plan(backend, good_policy(), restkv::shape_of(layer.view()));
  std::vector<std::uint8_t> mask(120);
  struct fault {
    errc code;
    std::vector<index_t> numbers;
    const char* word;
    std::function<void(layer_view<float>&)> damage;
  };
  const random_layer<float> longer(random, {.batch = 2, .tokens = 61, .query_rows = 8});
  const random_layer<float> wider(random, {.batch = 2, .head_dim = 9, .tokens = 60, .query_rows = 8});
  for (const fault& f : std::vector<fault>{
           {errc::shape_mismatch, {61, 60}, "key", [&](layer_view<float>& l) { l.key = longer.view().key; }},
           {errc::shape_mismatch, {9, 8}, "value", [&](layer_view<float>& l) { l.value = wider.view().value; }},
           {errc::shape_mismatch, {7, 8}, "query", [](layer_view<float>& l) { l.query = l.query.slice(2, 0, 7); }},
           {errc::missing_input, {}, "value", [](layer_view<float>& l) { l.value = {}; }},
           {errc::missing_input, {}, "metric", [](layer_view<float>& l) { l.metric = {}; }},
           {errc::shape_mismatch, {2, 50, 60}, "keep_mask",
            [&](layer_view<float>& l) { l.keep_mask = {mask.data(), {2, 50}}; }},
           {errc::invalid_argument, {1, 20, 41}, "mask",
            [&](layer_view<float>& l) {  // 11 by their place, 30 by the mask
              std::fill_n(mask.begin() + 60 + 10, 30, std::uint8_t{1});
              l.keep_mask = {mask.data(), {2, 60}};
            }},
       }) {
    layer_view<float> bad = layer.view();
    f.damage(bad);
    guarded_workspace memory(random, plan.workspace_bytes);
    kept_tokens kept;
    kept.lengths.extents = {77, 78};
    CAPTURE(f.word);
    check_error(restkv::select(backend, plan, bad, memory.space(), kept), f.code, f.numbers, f.word);
    CHECK((kept.lengths.extents[0] == 77 && kept.positions.data == nullptr));
    CHECK(memory.guards_stand());
    CHECK_THROWS_AS(restkv::select(backend, plan, bad, memory.space()), restkv::error);
  }
}

TEST_CASE("details without room are refused before they are written") {
  random_engine random(4);
  eigen_backend backend;
  const random_layer<float> layer(random, {.batch = 2, .tokens = 60, .query_rows = 8});
  const auto plan = restkv::make_plan(backend, good_policy(), restkv::shape_of(layer.view()));
  guarded_workspace memory(random, plan.workspace_bytes);
  kept_tokens kept;
  details_memory<float> good(plan);
  CHECK(restkv::select(backend, plan, layer.view(), memory.space(), kept, &good.view).ok());
  struct fault {
    std::vector<index_t> numbers;
    const char* word;
    std::function<void(restkv::selection_details<float>&)> damage;
  };
  for (const fault& f : std::vector<fault>{
           {{0, 2}, "details.score", [](auto& d) { d.score = {}; }},
           {{59, 60}, "details.score", [](auto& d) { d.score.extents[2] = 59; }},
           {{1, 2}, "details.smoothed", [](auto& d) { d.smoothed.extents[0] = 1; }},
           {{0, 2}, "details.smoothed", [](auto& d) { d.smoothed.data = nullptr; }},
           {{1, 2}, "details.drift", [](auto& d) { d.drift.extents[1] = 1; }},
       }) {
    restkv::selection_details<float> bad = good.view;
    f.damage(bad);
    check_error(restkv::select(backend, plan, layer.view(), memory.space(), kept, &bad), errc::shape_mismatch,
                f.numbers, f.word);
  }
}

TEST_CASE("a plan that was never made is refused") {
  random_engine random(5);
  reference_backend backend;
  const random_layer<float> layer(random, {});
  const plan_type plan;
  kept_tokens kept;
  CHECK_FALSE(restkv::select(backend, plan, layer.view(), restkv::workspace(nullptr, 0), kept).ok());
}

TEST_CASE("the throwing wrappers throw what the others return") {
  const reference_backend backend;
  auto policy = good_policy();
  policy.window = 0;
  try {
    static_cast<void>(restkv::make_plan(backend, policy, good_shape));
    FAIL("nothing was thrown");
  } catch (const restkv::error& e) {
    CHECK(e.code() == errc::invalid_argument);
    CHECK(std::string(e.what()) == planned(backend, policy, good_shape).message());
  }
}
