// SPDX-License-Identifier: Apache-2.0
// Random policies on random layers, on both backends: what every selection promises.
#include "policy/selection_support.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/cache/gather.hpp>
#include <restkv/reference/backend.hpp>

using namespace restkv_test;
using restkv::eigen_backend;
using restkv::errc;
using restkv::reference_backend;
using restkv::rest_kv;

namespace {

/// The order after takes an average for its temporal smoother.
rest_kv random_score(random_engine& random, const restkv::any_temporal& temporal) {
  const bool after = chance(random, 50) && restkv::is_average(temporal);
  return {.order = after ? restkv::query_order::after : restkv::query_order::before,
          .metric_of_distance = chance(random, 50) ? restkv::metric::projection : restkv::metric::identity,
          .tau = chance(random, 70) ? 1.0f : 1.7f,
          .normalised = chance(random, 20)};
}

/// Copies what was kept to a dense cache, and compares it with the cache it came from.
void check_gathered(const kept_tokens& kept, const restkv::chunked_tensor_view<const float>& cache) {
  const index_t group = kept.heads() / cache.extent(1);
  const index_t rows = kept.batch() * kept.heads() * kept.capacity();
  std::vector<float> memory(static_cast<std::size_t>(rows * cache.extent(3) + 1));
  const tensor_view<float, 4> out(memory.data(), {kept.batch(), kept.heads(), kept.capacity(), cache.extent(3)});
  const status outcome = restkv::gather_tokens(kept, cache, restkv::dense_layout{out});
  INFO(outcome.message());
  REQUIRE(outcome.ok());
  bool same = true;
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      for (index_t i = 0; i < kept.lengths(b, h); ++i) {
        const auto token = cache.from_token(kept.positions(b, h, i));
        for (index_t c = 0; c < cache.extent(3); ++c) same = same && out(b, h, i, c) == token(b, h / group, 0, c);
      }
    }
  }
  CHECK(same);
}

/// One random case. Returns whether there was something to choose.
template <class Backend>
bool check_random_selection(random_engine& random, Backend& backend) {
  const layer_recipe recipe = random_recipe(random);
  const random_layer<float> layer(random, recipe);
  auto policy = random_policy<rest_kv>(random);
  policy.score = random_score(random, policy.temporal);
  policy.window = std::min(policy.window, recipe.query_rows > 0 ? recipe.query_rows : 1);
  auto shape = restkv::shape_of(layer.view(), pick(random, 0, 3), 4);
  shape.tokens += chance(random, 30) ? pick(random, 0, 20) : 0;  // a plan for longer layers
  CAPTURE(recipe.batch, recipe.kv_heads, recipe.group, recipe.head_dim, recipe.tokens, recipe.query_rows,
          recipe.padded, static_cast<int>(recipe.pad), recipe.masked_percent, shape.tokens, shape.layer);
  CAPTURE(policy.window, policy.protect.sink, policy.protect.recent, static_cast<int>(policy.group),
          policy.temporal.choice.index(), policy.spatial.choice.index(), policy.budget.choice.index());

  restkv::plan<any_policy<rest_kv>> plan;
  const status planned = restkv::make_plan(backend, policy, shape, plan);
  const index_t fixed = std::min(shape.tokens, policy.protect.sink + policy.recent());
  const index_t budget =
      policy.budget.tokens_per_head({1, shape.tokens, shape.tokens - fixed, shape.layer, shape.layers});
  INFO("plan: " << planned.message());
  REQUIRE(planned.ok() == (budget >= fixed));
  if (!planned.ok()) {
    check_error(planned, errc::invalid_argument, {budget, fixed}, "budget");
    return false;
  }

  guarded_workspace memory(random, plan.workspace_bytes);
  details_memory<typename Backend::score_type> details(plan);
  kept_tokens kept;
  const status selected = restkv::select(backend, plan, layer.view(), memory.space(), kept, &details.view);
  INFO("select: " << selected.message());
  bool mask_protects_too_much = false;
  bool anything_to_choose = false;
  for (index_t b = 0; b < recipe.batch; ++b) {
    const expected_sequence sequence(plan, layer.view(), b);
    const index_t own = std::min(sequence.problem.length, policy.protect.sink + policy.recent());
    const index_t per_head = policy.budget.tokens_per_head(sequence.problem);
    mask_protects_too_much |= sequence.protected_tokens() > own &&
                              sequence.protected_tokens() > std::min(per_head, sequence.problem.length);
    anything_to_choose |= sequence.problem.length > per_head;
  }
  CHECK(memory.guards_stand());
  REQUIRE(selected.ok() == !mask_protects_too_much);
  if (!selected.ok()) {
    CHECK(selected.code() == errc::invalid_argument);
    CHECK(kept.positions.data == nullptr);
    return false;
  }
  check_selection(plan, layer.view(), kept, details.view.smoothed);
  check_gathered(kept, layer.view().key);
  check_gathered(kept, layer.view().value);

  // Without details, where a backend may prune, and a second time over the same memory: the same set.
  std::vector<std::vector<index_t>> first;
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) first.push_back(kept_of(kept, b, h));
  }
  kept_tokens again;
  REQUIRE(restkv::select(backend, plan, layer.view(), memory.space(), again).ok());
  CHECK(memory.guards_stand());
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      CHECK(kept_of(again, b, h) == first[static_cast<std::size_t>(b * kept.heads() + h)]);
    }
  }
  return anything_to_choose;
}

}  // namespace

TEST_CASE("a selection keeps its promises: reference") {
  random_engine random(1);
  reference_backend backend;
  int chosen = 0;
  for (int trial = 0; trial < 250; ++trial) {
    CAPTURE(trial);
    chosen += check_random_selection(random, backend) ? 1 : 0;
  }
  CHECK(chosen > 60);
}

TEST_CASE("a selection keeps its promises: Eigen") {
  random_engine random(2);
  for (const int threads : {1, 3}) {
    eigen_backend backend(threads);
    int chosen = 0;
    for (int trial = 0; trial < 500; ++trial) {
      CAPTURE(trial, threads);
      chosen += check_random_selection(random, backend) ? 1 : 0;
    }
    CHECK(chosen > 120);
  }
}

TEST_CASE("a larger uniform budget keeps what the smaller one kept") {
  random_engine random(3);
  eigen_backend backend;
  for (int trial = 0; trial < 20; ++trial) {
    layer_recipe recipe = random_recipe(random);
    recipe.tokens = 40;
    recipe.query_rows = 8;
    recipe.masked_percent = 0;
    const random_layer<float> layer(random, recipe);
    auto policy = random_policy<rest_kv>(random);
    policy.score = random_score(random, policy.temporal);
    policy.window = 4;
    policy.protect = {.sink = 2, .recent = 0};
    // The drift depends on the budget, so adaptive windows may differ; every other smoother does not know it.
    if (policy.spatial.uses_drift()) policy.spatial.choice = restkv::average_pool{};
    std::vector<std::vector<index_t>> previous;
    for (index_t budget = 6; budget <= 42; ++budget) {
      policy.budget.choice = restkv::uniform{budget};
      const auto selection = restkv::select(backend, policy, layer.view());
      std::vector<std::vector<index_t>> all;
      for (index_t b = 0; b < selection.kept().batch(); ++b) {
        for (index_t h = 0; h < selection.kept().heads(); ++h) all.push_back(kept_of(selection.kept(), b, h));
      }
      for (std::size_t i = 0; i < previous.size(); ++i) {
        CAPTURE(trial, budget, i, previous[i], all[i]);
        CHECK(std::includes(all[i].begin(), all[i].end(), previous[i].begin(), previous[i].end()));
      }
      previous = all;
    }
  }
}

TEST_CASE("a selection does not touch the layer") {
  random_engine random(4);
  eigen_backend backend(2);
  reference_backend reference;
  for (int trial = 0; trial < 30; ++trial) {
    layer_recipe recipe = random_recipe(random);
    recipe.query_rows = 16;
    const random_layer<float> layer(random, recipe);
    const guarded_tensor<float, 4> query(layer.query);
    const guarded_tensor<float, 4> key(layer.key);
    const guarded_tensor<float, 4> value(layer.value);
    const auto policy = random_policy<rest_kv>(random);
    restkv::owned_selection selection;
    static_cast<void>(selection.run(backend, policy, layer.view()));
    static_cast<void>(selection.run(reference, policy, layer.view()));
    CHECK(layer.query.same_bytes(query));
    CHECK(layer.key.same_bytes(key));
    CHECK(layer.value.same_bytes(value));
  }
}
