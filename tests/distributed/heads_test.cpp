// SPDX-License-Identifier: Apache-2.0
// Heads on several ranks: the kept sets of one process, for every policy; the bytes of the documented sums; and an end
// of every selection, whatever fails where.
#include "distributed/golden_layers.hpp"
#include "distributed/rank_support.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/distributed/heads.hpp>
#include <restkv/distributed/output_error.hpp>
#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>

using namespace restkv_test;
using restkv::eigen_backend;
using restkv::errc;
using restkv::group_reduce;
using restkv::reference_backend;
namespace presets = restkv::presets;

namespace {

/// One rank's part of a selection over heads.
template <class Backend, class Policy, class T, class Ranks>
rank_outcome select_part(const Policy& policy, const layer_view<T>& layer, const restkv::problem_shape& shape,
                         Ranks& communicator) {
  distributed::counting_communicator ranks(communicator);
  rank_outcome outcome;
  index_t count = 0;
  const auto heads = distributed::even_part(shape.kv_heads, ranks.rank(), ranks.size(), count);
  const part_of_heads<T> part(layer, heads.first, count);
  restkv::problem_shape local = shape;
  local.kv_heads = count;
  local.query_heads = count * shape.group();
  Backend backend;
  distributed::heads_plan<Policy> plan;
  outcome.result = distributed::make_heads_plan(backend, policy, local, heads, ranks.size(), plan);
  if (!outcome.result.ok()) return outcome;
  std::vector<std::byte> memory(plan.workspace_bytes, std::byte{0xff});
  kept_tokens kept;
  outcome.result =
      distributed::select_heads(backend, plan, part.view, ranks, restkv::workspace(memory.data(), memory.size()), kept);
  if (outcome.result.ok()) outcome.take(kept);
  outcome.said = ranks.counted();
  return outcome;
}

/// The ranks' outcomes, put together: rows in the order of one process.
template <class Backend, class Policy, class T>
std::vector<rank_outcome> select_on_ranks(index_t ranks, const Policy& policy, const layer_view<T>& layer,
                                          const restkv::problem_shape& shape) {
  std::vector<rank_outcome> outcomes(static_cast<std::size_t>(ranks));
  on_ranks(ranks, [&](auto& communicator) {
    outcomes[static_cast<std::size_t>(communicator.rank())] = select_part<Backend>(policy, layer, shape, communicator);
  });
  return outcomes;
}

std::vector<std::vector<position_t>> put_together(const std::vector<rank_outcome>& outcomes, index_t batch) {
  std::vector<std::vector<position_t>> rows;
  for (index_t b = 0; b < batch; ++b) {
    for (const rank_outcome& outcome : outcomes) {
      const std::size_t heads = outcome.kept.size() / static_cast<std::size_t>(batch);
      for (std::size_t h = 0; h < heads; ++h) rows.push_back(outcome.kept[static_cast<std::size_t>(b) * heads + h]);
    }
  }
  return rows;
}

/// One process and 1 to 4 ranks agree; returns whether anything was selected.
template <class Backend, class Policy, class T>
bool check_ranks(const Policy& policy, const layer_view<T>& layer) {
  const restkv::problem_shape shape = restkv::shape_of(layer, 1, 4);
  const rank_outcome alone = select_alone<Backend>(policy, layer, shape);
  for (index_t ranks = 1; ranks <= std::min<index_t>(4, shape.kv_heads); ++ranks) {
    const auto outcomes = select_on_ranks<Backend>(ranks, policy, layer, shape);
    CAPTURE(ranks, shape.batch, shape.kv_heads, shape.tokens, alone.result.message());
    for (const rank_outcome& outcome : outcomes) {
      CAPTURE(outcome.result.message());
      REQUIRE(outcome.result.ok() == alone.result.ok());
    }
    if (!alone.result.ok()) continue;
    REQUIRE(put_together(outcomes, shape.batch) == alone.kept);
  }
  return alone.result.ok();
}

template <class Backend, class Score>
void check_random_policies(unsigned seed, int trials) {
  random_engine random(seed);
  int selected = 0;
  for (int trial = 0; trial < trials; ++trial) {
    layer_recipe recipe = random_recipe(random);
    recipe.kv_heads = pick(random, 1, 5);
    any_policy<Score> policy = random_policy<Score>(random);
    if (chance(random, 30)) policy.granularity.tokens = pick(random, 2, 5);
    if (chance(random, 40)) policy.granularity.shared = policy.group != group_reduce::none;
    random_layer<float> layer(random, recipe);
    if (chance(random, 20)) for_each(layer.key.view(), [](float& x) { x = 0; });  // all tokens tie
    CAPTURE(trial, policy.granularity.shared, policy.granularity.tokens);
    selected += check_ranks<Backend>(policy, layer.view()) ? 1 : 0;
  }
  CHECK(selected > trials / 3);
}

}  // namespace

TEST_CASE("random policies keep the same on one rank and on four") {
  check_random_policies<eigen_backend, restkv::rest_kv>(1, 250);
  check_random_policies<reference_backend, restkv::snap_kv>(2, 150);
}

TEST_CASE("the layers of the release's case files keep the same on one rank and on two") {
  for_each_golden_layer([](const golden_layer& layer) { CHECK(check_ranks<eigen_backend>(layer.policy, layer.view)); });
}

TEST_CASE("presets keep the same on one rank and on four") {
  random_engine random(4);
  const layer_recipe recipe{.batch = 2, .kv_heads = 4, .group = 2, .tokens = 90, .query_rows = 90, .padded = true};
  for (int trial = 0; trial < 3; ++trial) {
    const random_layer<float> layer(random, recipe);
    const restkv::budget_size size(48);
    const auto check = [&](auto policy) {
      CHECK(check_ranks<reference_backend>(policy, layer.view()));
      policy.granularity.shared = policy.group != group_reduce::none;
      CHECK(check_ranks<reference_backend>(policy, layer.view()));
    };
    check(presets::critical_ada_kv(size));  // a rescorer after the budget
    check(presets::defensive_kv(size));     // weights that are shares of the layer's heads
    check(presets::keyformer(size));        // noise by the index of the head
    check(presets::leverage_score(size));   // a random matrix a head
    CHECK(check_ranks<eigen_backend>(presets::random(size), layer.view()));  // numbers by the index of the head
  }
}

namespace {

/// A policy whose heads compete, a layer of 4 KV heads, and what the ranks say.
struct counted_problem {
  random_engine random{5};
  random_layer<float> layer{random, {.batch = 2, .kv_heads = 4, .group = 2, .tokens = 80, .query_rows = 16}};
  restkv::problem_shape shape = restkv::shape_of(layer.view());
  restkv::eviction_policy<restkv::snap_kv, restkv::mean, restkv::average_pool> policy{.window = 16};

  counted_problem() {
    policy.budget.budget = 40;
    policy.protect.recent = 16;
  }
  template <class Policy>
  [[nodiscard]] distributed::traffic said(index_t ranks, const Policy& asked) const {
    const auto outcomes = select_on_ranks<eigen_backend>(ranks, asked, layer.view(), shape);
    for (const rank_outcome& outcome : outcomes) {
      REQUIRE(outcome.result.ok());
      REQUIRE(outcome.said == outcomes.front().said);  // everybody says as much
    }
    return outcomes.front().said;
  }
};

}  // namespace

TEST_CASE("the ranks say as much as the documented sums") {
  const counted_problem problem;
  constexpr std::uint64_t batch = 2;
  constexpr std::uint64_t heads = 4;
  constexpr std::uint64_t past = 64;
  for (std::uint64_t ranks = 2; ranks <= 4; ++ranks) {
    CAPTURE(ranks);
    const auto count = static_cast<index_t>(ranks);
    // Heads that do not compete.
    restkv::eviction_policy<restkv::snap_kv, restkv::mean, restkv::average_pool, restkv::pyramid> alone{.window = 16};
    alone.budget.budget = 40;
    CHECK(problem.said(count, alone) == distributed::traffic{});
    // AdaKV: twice 8 bytes that all can go on, and for each sequence 4 histograms and 16 bytes a head.
    CHECK(problem.said(count, problem.policy) ==
          distributed::traffic{.all_reduce = {2 + batch * 5, 2 * 8 + batch * (4 * 2048 + 16 * heads)},
                               .all_gather = {1, 32}});
    // A shared set: its row of scores once a rank.
    auto shared = problem.policy;
    shared.granularity.shared = true;
    CHECK(problem.said(count, shared) == distributed::traffic{.all_reduce = {2, 2 * 8},
                                                              .all_gather = {1, 32},
                                                              .broadcast = {ranks * batch, ranks * batch * past * 4}});
  }
}

TEST_CASE("a rank that fails at any call leaves nobody waiting") {
  const counted_problem problem;
  auto policy = problem.policy;
  for (const bool shared : {false, true}) {
    policy.granularity.shared = shared;
    const auto calls = static_cast<index_t>(problem.said(3, policy).calls());
    for (index_t call = 0; call < calls; ++call) {
      std::vector<rank_outcome> outcomes(3);
      const auto begin = std::chrono::steady_clock::now();
      on_ranks(3, [&](auto& communicator) {
        failing_communicator ranks(communicator, communicator.rank() == 1 ? call : 1000);
        outcomes[static_cast<std::size_t>(communicator.rank())] =
            select_part<eigen_backend>(policy, problem.layer.view(), problem.shape, ranks);
      });
      CAPTURE(shared, call, calls);
      CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(5));
      for (const rank_outcome& outcome : outcomes) {
        CHECK(outcome.result.code() == errc::communication_failure);
        CHECK(outcome.kept.empty());
      }
    }
  }
}

TEST_CASE("what is wrong on one rank is an error on all") {
  const counted_problem problem;
  const auto outcomes_of = [&](const auto& damage) {
    std::vector<rank_outcome> outcomes(3);
    on_ranks(3, [&](auto& communicator) {
      restkv::layer_view<float> layer = problem.layer.view();
      restkv::problem_shape shape = problem.shape;
      auto policy = problem.policy;
      if (communicator.rank() == 1) damage(layer, shape, policy);
      outcomes[static_cast<std::size_t>(communicator.rank())] =
          select_part<eigen_backend>(policy, layer, shape, communicator);
    });
    return outcomes;
  };
  const auto no_query = outcomes_of([](auto& layer, auto&, auto&) { layer.query.data = nullptr; });
  CHECK(no_query[1].result.code() == errc::missing_input);
  CHECK(no_query[0].result.code() == errc::communication_failure);
  CHECK(no_query[2].result.code() == errc::communication_failure);
  for (const auto& outcome : outcomes_of([](auto&, auto&, auto& policy) { policy.window = 8; })) {
    CHECK(outcome.result.code() == errc::shape_mismatch);
    CHECK(std::string(outcome.result.message()).find("rank 1 has another problem than rank 0") == 0);
  }
  for (const auto& outcome : outcomes_of([](auto&, auto&shape, auto&) { shape.kv_heads = 3, shape.query_heads = 6; })) {
    CHECK(outcome.result.code() == errc::shape_mismatch);
    CHECK(std::string(outcome.result.message()).find("rank 1 divides 3 KV heads, rank 0 4") == 0);
  }
}

TEST_CASE("the error of a layer is that of one process") {
  random_engine random(8);
  const random_layer<float> layer(random, {.batch = 2, .kv_heads = 4, .tokens = 50, .query_rows = 6});
  const restkv::problem_shape shape = restkv::shape_of(layer.view());
  restkv::eviction_policy<restkv::snap_kv> policy{.window = 6};
  policy.budget.budget = 20;
  policy.protect.recent = 6;
  reference_backend reference;
  const auto chosen = restkv::select(reference, policy, layer.view());
  const auto alone = restkv::output_error(reference, chosen, layer.view());
  std::vector<distributed::layer_output_errors> errors(3);
  on_ranks(3, [&](auto& ranks) {
    index_t count = 0;
    const auto heads = distributed::even_part(shape.kv_heads, ranks.rank(), ranks.size(), count);
    const part_of_heads<float> part(layer.view(), heads.first, count);
    restkv::const_kept_tokens kept = chosen;
    kept.positions = kept.positions.slice(1, heads.first, count);
    kept.lengths = kept.lengths.slice(1, heads.first, count);
    reference_backend backend;
    restkv::output_errors own;
    static_cast<void>(distributed::output_error(backend, kept, part.view, ranks, own,
                                                errors[static_cast<std::size_t>(ranks.rank())]));
  });
  for (const auto& whole : errors) {
    REQUIRE(whole.error.size() == 12);
    for (std::size_t i = 0; i < 12; ++i) {
      const auto b = static_cast<index_t>(i / 6);
      const auto row = static_cast<index_t>(i % 6);
      CHECK(std::fabs(whole.error[i] - alone.layer()(b, row)) <= 1e-14 * alone.layer_output_norm()(b, row));
      CHECK(std::fabs(whole.output_norm[i] / alone.layer_output_norm()(b, row) - 1) <= 1e-14);
      CHECK(alone.layer()(b, row) > 1e-3);
    }
  }
}

TEST_CASE("plans refuse what ranks cannot serve") {
  eigen_backend backend;
  restkv::eviction_policy<restkv::snap_kv> policy;
  distributed::heads_plan<decltype(policy)> plan;
  const restkv::problem_shape shape{.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 2000};
  check_error(distributed::make_heads_plan(backend, policy, shape, {3, 4}, 2, plan), errc::invalid_argument, {2, 3, 4},
              {"KV heads"});
}
