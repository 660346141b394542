// SPDX-License-Identifier: Apache-2.0
// `select` allocates nothing. Counted are operator new and, through its own hook, Eigen's aligned memory.

// Before any Eigen header: its allocations assert while they are forbidden, and its assertions stay on.
void eigen_assertion_failed();
#define EIGEN_RUNTIME_NO_MALLOC
#define eigen_assert(condition) ((condition) ? void() : eigen_assertion_failed())

#include "policy/selection_support.hpp"
#include "support/allocation_counter.hpp"
#include "support/layer_metric.cpp"  // here, so that all of the program's Eigen is compiled with the hook

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/compact.hpp>

void eigen_assertion_failed() {
  if (!restkv_test::counting_allocations) std::abort();
  ++restkv_test::allocations;
}

using namespace restkv_test;
using restkv::eigen_backend;
using restkv::rest_kv;

namespace {

/// Allocations of any thread while `body` runs, Eigen's among them.
template <class Body>
long eigen_allocations_of(const Body& body) {
  Eigen::internal::set_is_malloc_allowed(false);
  const long count = allocations_of(body);
  Eigen::internal::set_is_malloc_allowed(true);
  return count;
}

}  // namespace

TEST_CASE("the counter counts") {
  std::vector<int> keep;
  CHECK(eigen_allocations_of([&] { keep.resize(1000); }) == 1);
  CHECK(eigen_allocations_of([] { Eigen::VectorXf(1000).setZero(); }) > 0);
  CHECK(eigen_allocations_of([] {}) == 0);
}

TEST_CASE("planning, selecting and compacting allocate nothing") {
  random_engine random(1);
  for (const int threads : {1, 2}) {
    eigen_backend backend(threads);
    for (int trial = 0; trial < 120; ++trial) {
      layer_recipe recipe = random_recipe(random, 200);
      recipe.query_rows = 16;
      const random_layer<float> layer(random, recipe);
      auto policy = random_policy<rest_kv>(random);
      policy.score.order = chance(random, 50) ? restkv::query_order::before : restkv::query_order::after;
      policy.score.metric_of_distance = chance(random, 70) ? restkv::metric::projection : restkv::metric::identity;
      CAPTURE(trial, threads);

      restkv::plan<any_policy<rest_kv>> plan;
      status outcome;
      const auto shape = restkv::shape_of(layer.view());
      CHECK(eigen_allocations_of([&] { outcome = restkv::make_plan(backend, policy, shape, plan); }) == 0);
      if (!outcome.ok()) continue;
      guarded_workspace memory(random, plan.workspace_bytes);
      details_memory<float> details(plan);
      kept_tokens kept;
      CHECK(eigen_allocations_of(
                [&] { outcome = restkv::select(backend, plan, layer.view(), memory.space(), kept); }) == 0);
      CHECK(eigen_allocations_of([&] {
              outcome = restkv::select(backend, plan, layer.view(), memory.space(), kept, &details.view);
            }) == 0);
      if (!outcome.ok() || policy.group == restkv::group_reduce::none) continue;
      CHECK(eigen_allocations_of([&] {
              outcome = restkv::compact_in_place(kept, layer.key.view(), layer.value.view(),
                                                 restkv::backend_loop{backend});
            }) == 0);
      CHECK(outcome.ok());
    }
  }
}

TEST_CASE("a failing selection allocates nothing either") {
  random_engine random(2);
  eigen_backend backend(2);
  const random_layer<float> layer(random, {});
  auto policy = random_policy<rest_kv>(random);
  policy.window = 8;
  policy.budget.choice = restkv::uniform{40};
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer.view()));
  kept_tokens kept;
  status outcome;
  CHECK(eigen_allocations_of(
            [&] { outcome = restkv::select(backend, plan, layer.view(), restkv::workspace(nullptr, 0), kept); }) == 0);
  CHECK_FALSE(outcome.ok());
}
