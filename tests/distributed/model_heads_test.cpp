// SPDX-License-Identifier: Apache-2.0
// A budget over all layers of a model whose heads lie on several ranks keeps, layer after layer, what one process
// keeps.
#include "distributed/rank_support.hpp"

#include <restkv/distributed/model_heads.hpp>
#include <restkv/model/model_selection.hpp>
#include <restkv/reference/backend.hpp>

using namespace restkv_test;
using restkv::reference_backend;

namespace {

using policy_t = any_policy<restkv::snap_kv>;
using outcome_t = std::vector<std::vector<std::vector<position_t>>>;  // [steps][layers * batch * heads]

/// What one process keeps after each layer.
outcome_t keep_alone(const policy_t& policy, const restkv::global_budget& budget,
                     const std::vector<std::unique_ptr<random_layer<float>>>& layers, restkv::problem_shape shape,
                     status& result) {
  reference_backend backend;
  restkv::model_plan<policy_t, restkv::global_budget> plan;
  outcome_t outcome;
  result = make_model_plan(backend, policy, budget, shape, plan);
  if (!result.ok()) return outcome;
  std::vector<std::byte> state(plan.state_bytes);
  std::vector<std::byte> memory(plan.workspace_bytes);
  restkv::model_selection<reference_backend, policy_t, restkv::global_budget> selection(
      backend, plan, restkv::workspace(state.data(), state.size()));
  for (const auto& layer : layers) {
    result = selection.add_layer(backend, layer->view(), restkv::workspace(memory.data(), memory.size()));
    if (!result.ok()) return outcome;
    auto& step = outcome.emplace_back();
    for (index_t l = 0; l < selection.layers(); ++l) {
      rank_outcome rows;
      rows.take(selection.kept(l));
      step.insert(step.end(), rows.kept.begin(), rows.kept.end());
    }
  }
  return outcome;
}

}  // namespace

TEST_CASE("a budget over layers keeps the same on one rank and on four") {
  random_engine random(1);
  int selected = 0;
  for (int trial = 0; trial < 60; ++trial) {
    layer_recipe recipe = random_recipe(random, 30);
    recipe.batch = pick(random, 1, 2);
    recipe.padded = false;  // layers have the same tokens
    recipe.kv_heads = pick(random, 1, 5);
    policy_t policy = random_policy<restkv::snap_kv>(random);
    if (chance(random, 30)) policy.granularity.tokens = pick(random, 2, 4);
    const restkv::global_budget budget{.budget = pick(random, 1, 30), .least = pick(random, 0, 3)};
    std::vector<std::unique_ptr<random_layer<float>>> layers;
    for (int l = 0; l < 3; ++l) {
      layers.push_back(std::make_unique<random_layer<float>>(random, recipe));
      if (chance(random, 30)) for_each(layers.back()->key.view(), [](float& x) { x = 0; });  // all tokens tie
    }
    const restkv::problem_shape shape = restkv::shape_of(layers[0]->view(), 0, 3);
    status alone_result;
    const outcome_t alone = keep_alone(policy, budget, layers, shape, alone_result);
    selected += alone_result.ok() ? 1 : 0;
    for (index_t size = 1; size <= std::min<index_t>(4, recipe.kv_heads); ++size) {
      CAPTURE(trial, size, alone_result.message());
      outcome_t together(alone.size());
      for (std::size_t step = 0; step < alone.size(); ++step) together[step].resize(alone[step].size());
      std::vector<status> results(static_cast<std::size_t>(size));
      on_ranks(size, [&](auto& ranks) {
        reference_backend backend;
        status& result = results[static_cast<std::size_t>(ranks.rank())];
        index_t count = 0;
        const auto heads = distributed::even_part(shape.kv_heads, ranks.rank(), size, count);
        restkv::problem_shape local = shape;
        local.kv_heads = count;
        local.query_heads = count * shape.group();
        distributed::model_heads_selection<reference_backend, policy_t> selection;
        result = selection.open(backend, policy, budget, local, heads, size);
        for (std::size_t step = 0; result.ok() && step < layers.size(); ++step) {
          const part_of_heads<float> part(layers[step]->view(), heads.first, count);
          result = selection.add_layer(backend, part.view, ranks);
          if (!result.ok() || step >= together.size()) break;
          const index_t of_head = policy.group == restkv::group_reduce::none ? shape.group() : 1;
          const index_t all = shape.kv_heads * of_head;
          for (index_t l = 0; l < selection.layers(); ++l) {
            for (index_t b = 0; b < shape.batch; ++b) {
              for (index_t h = 0; h < count * of_head; ++h) {
                const index_t row = (l * shape.batch + b) * all + heads.first * of_head + h;
                together[step][static_cast<std::size_t>(row)] = selection.kept(l, b, h);
              }
            }
          }
        }
      });
      for (const status& result : results) {
        CAPTURE(result.message());
        REQUIRE(result.ok() == alone_result.ok());
      }
      if (alone_result.ok()) REQUIRE(together == alone);
    }
  }
  CHECK(selected > 15);
}

TEST_CASE("a budget over layers says as much as its documented sums, and fails on all ranks") {
  random_engine random(2);
  const random_layer<float> layer(random, {.batch = 2, .kv_heads = 4, .tokens = 60, .query_rows = 8});
  const restkv::problem_shape shape = restkv::shape_of(layer.view(), 0, 3);
  policy_t policy;
  policy.window = 8;
  policy.protect.recent = 8;
  policy.spatial.choice = restkv::no_pool{};
  const auto run = [&](auto& ranks) -> status {
    reference_backend backend;
    index_t count = 0;
    const auto heads = distributed::even_part(shape.kv_heads, ranks.rank(), ranks.size(), count);
    restkv::problem_shape local = shape;
    local.kv_heads = count;
    local.query_heads = count * shape.group();
    distributed::model_heads_selection<reference_backend, policy_t> selection;
    RESTKV_RETURN_IF_FAILED(selection.open(backend, policy, {.budget = 20}, local, heads, ranks.size()));
    for (int l = 0; l < 3; ++l) {
      const part_of_heads<float> part(layer.view(), heads.first, count);
      RESTKV_RETURN_IF_FAILED(selection.add_layer(backend, part.view, ranks));
    }
    return {};
  };
  distributed::traffic wanted;
  for (std::uint64_t l = 1; l <= 3; ++l) {
    wanted.all_reduce.calls += 2 + 2 * 9;
    wanted.all_reduce.bytes += 2 * 8 + 2 * (8 * 2048 + 8 * 4 * l);
    wanted.all_gather.calls += 1;
    wanted.all_gather.bytes += 32;
  }
  std::vector<distributed::traffic> said(3);
  std::vector<status> results(3);
  on_ranks(3, [&](auto& communicator) {
    distributed::counting_communicator ranks(communicator);
    const auto r = static_cast<std::size_t>(ranks.rank());
    results[r] = run(ranks);
    said[r] = ranks.counted();
  });
  for (std::size_t r = 0; r < 3; ++r) {
    CHECK(results[r].ok());
    CHECK(said[r] == wanted);
  }
  for (index_t call = 0; call < static_cast<index_t>(wanted.calls()); call += 5) {
    on_ranks(3, [&](auto& communicator) {
      failing_communicator ranks(communicator, communicator.rank() == 0 ? call : 1000);
      results[static_cast<std::size_t>(communicator.rank())] = run(ranks);
    });
    CAPTURE(call);
    for (const status& result : results) CHECK(result.code() == restkv::errc::communication_failure);
  }
}
