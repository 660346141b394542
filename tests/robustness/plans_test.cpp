// SPDX-License-Identifier: Apache-2.0
// Plans for sizes near 2^31 and 2^63, of layers and of policies: a plan is refused with a text, or its workspace holds
// what its shape says. Run under the undefined-behaviour sanitizer, which sees sizes that overflow.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/budget/budget_table.hpp>
#include <restkv/budget/head_kv.hpp>
#include <restkv/model/global_budget.hpp>
#include <restkv/model/model_plan.hpp>
#include <restkv/plan.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/session/session_memory.hpp>

#include <cmath>

using namespace restkv_test;
using restkv::budget_size;
using restkv::index_t;
using restkv::problem_shape;
using restkv::status;

namespace {

constexpr index_t numbers[] = {INT64_MIN,
                               -1,
                               0,
                               1,
                               2,
                               index_t(1) << 12,
                               index_t(1) << 16,
                               (index_t(1) << 16) + 1,
                               index_t(1) << 20,
                               (index_t(1) << 31) - 1,
                               index_t(1) << 31,
                               (index_t(1) << 31) + 1,
                               index_t(1) << 32,
                               index_t(1) << 40,
                               index_t(1) << 62,
                               INT64_MAX - 1,
                               INT64_MAX};

/// Often a sensible number, else one of the list.
index_t number(random_engine& random, index_t sensible, int percent) {
  if (!chance(random, percent)) return sensible;
  return numbers[pick(random, 0, static_cast<index_t>(std::size(numbers)) - 1)];
}

problem_shape any_shape(random_engine& random) {
  const index_t heads = number(random, 2, 30);
  return {.batch = number(random, 1, 30),
          .query_heads = chance(random, 70) ? heads : number(random, 4, 60),
          .kv_heads = heads,
          .head_dim = number(random, 64, 20),
          .tokens = number(random, 1000, 40),
          .layer = number(random, 0, 10),
          .layers = number(random, 4, 20)};
}

using any_policy =
    restkv::eviction_policy<restkv::rest_kv, restkv::any_temporal, restkv::any_spatial, restkv::any_budget>;

restkv::any_budget any_budget(random_engine& random) {
  budget_size size(number(random, 100, 40));
  if (chance(random, 30)) size = budget_size::keep_ratio(chance(random, 50) ? 1.0 : 1e-9);
  switch (pick(random, 0, 3)) {
    case 0:
      return {restkv::uniform{size}};
    case 1:
      return {restkv::pyramid{.budget = size, .beta = chance(random, 50) ? 20.0f : 1e38f}};
    case 2:
      return {restkv::pyramid{.budget = size, .rounding = restkv::pyramid_rounding::released}};
    default:
      return {restkv::ada_kv{.budget = size, .floor = 0.2f}};
  }
}

any_policy a_policy(random_engine& random) {
  return {.window = number(random, 8, 20),
          .spatial = {restkv::average_pool{.width = chance(random, 80) ? 5 : 0x7fffffff}},
          .budget = any_budget(random),
          .protect = {.sink = number(random, 4, 15), .recent = number(random, 8, 15)},
          .granularity = {.tokens = number(random, 1, 20), .shared = chance(random, 20)}};
}

/// What two rows of scores of a shape take, exactly.
long double least_bytes(const problem_shape& shape, index_t heads) {
  return 8.0L * static_cast<long double>(shape.batch) * static_cast<long double>(heads) *
         static_cast<long double>(shape.tokens);
}

}  // namespace

TEST_CASE("plans of any size are refused, or their workspace holds their scores") {
  random_engine random(1);
  const restkv::eigen_backend backend(2);
  int planned = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    const problem_shape shape = any_shape(random);
    const any_policy policy = a_policy(random);
    CAPTURE(trial, shape.batch, shape.query_heads, shape.kv_heads, shape.head_dim, shape.tokens, policy.window);
    restkv::plan<any_policy> made;
    const status outcome = make_plan(backend, policy, shape, made);
    CHECK(outcome.ok() == (outcome.message()[0] == '\0'));
    if (!outcome.ok()) continue;
    ++planned;
    CHECK(static_cast<long double>(made.workspace_bytes) >= least_bytes(shape, made.heads));
    CHECK((made.capacity >= 0 && made.capacity <= shape.tokens));
  }
  CHECK(planned > 1000);
}

TEST_CASE("plans of models and sessions likewise") {
  random_engine random(2);
  const restkv::eigen_backend backend(1);
  int models = 0;
  int sessions = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    const problem_shape shape = any_shape(random);
    const any_policy policy = a_policy(random);
    CAPTURE(trial, shape.batch, shape.query_heads, shape.kv_heads, shape.head_dim, shape.tokens, shape.layers);
    const restkv::global_budget budget{.budget = number(random, 100, 40)};
    restkv::model_plan<any_policy, restkv::global_budget> model;
    status outcome = make_model_plan(backend, policy, budget, shape, model);
    CHECK(outcome.ok() == (outcome.message()[0] == '\0'));
    if (outcome.ok()) {
      ++models;
      CHECK(static_cast<long double>(model.state_bytes) >= least_bytes(shape, model.layer.heads));
    }

    const restkv::session_policy<any_policy> session{.policy = policy,
                                                     .high_water = number(random, 500, 40),
                                                     .evict_every = number(random, 0, 20),
                                                     .speculation = number(random, 0, 20)};
    restkv::session_plan<restkv::session_policy<any_policy>> made;
    outcome = restkv::make_session_plan<float>(backend, session, shape, made);
    CHECK(outcome.ok() == (outcome.message()[0] == '\0'));
    if (!outcome.ok()) continue;
    ++sessions;
    const problem_shape cache{.batch = shape.layers, .tokens = made.shape.tokens};
    CHECK(static_cast<long double>(made.memory_bytes) >=
          least_bytes(cache, shape.kv_heads) * static_cast<long double>(shape.head_dim));
  }
  CHECK(models > 100);
  CHECK(sessions > 100);
}

TEST_CASE("tables of budgets refuse views of nothing") {
  budget_size sizes[8];
  float importance[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  const restkv::budget_problem problem{.heads = 2, .length = 100, .candidates = 90, .layer = 1, .layers = 4};
  restkv::budget_table table{{sizes, 4, 2}};
  restkv::head_kv heads{.budget = 10, .importance = {importance, 4, 2}};
  REQUIRE(table.check(problem).ok());
  REQUIRE(heads.check(problem).ok());
  for (std::size_t axis = 0; axis < 2; ++axis) {
    for (const index_t bad : {INT64_MIN, index_t(-1), index_t(1) << 60, INT64_MAX}) {
      restkv::budget_table bad_table = table;
      bad_table.budgets.values.extents[axis] = bad;
      CHECK_FALSE(bad_table.check(problem).ok());
      CHECK_FALSE(bad_table.check().ok());
      CHECK(bad_table.most_per_head(problem) == problem.protected_tokens());
      restkv::head_kv bad_heads = heads;
      bad_heads.importance.values.extents[axis] = bad;
      CHECK_FALSE(bad_heads.check(problem).ok());
      CHECK(bad_heads.chosen_in_layer(problem) == 0);
    }
  }
}
