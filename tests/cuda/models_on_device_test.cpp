// SPDX-License-Identifier: Apache-2.0
// Budgets across layers on the GPU keep what they keep on the CPU, given the same scores. Skipped without a GPU.
#include "cuda/models_on_device.hpp"
#include "cuda/device_selection.hpp"
#include "kernel/hashing_backend.hpp"
#include "model/random_model.hpp"
#include "support/catch.hpp"

#include <restkv/model/model_selection.hpp>

using namespace restkv_test;
using namespace restkv;

namespace {

template <class Budget>
void compare(const model_policy& policy, const Budget& budget, const random_model& model) {
  std::vector<layer_view<float>> layers;
  for (index_t l = 0; l < model.count(); ++l) layers.push_back(model.view(l));
  std::deque<owned_kept_tokens> found;
  const status done = models_on_device(policy, budget, std::span<const layer_view<float>>(layers), found);
  INFO(done.message());
  REQUIRE(done.ok());
  hashing_backend<kernel::host_executor> backend(kernel::host_executor(1), 10);
  const auto plan = make_model_plan(backend, policy, budget, shape_of(layers[0], 0, model.count()));
  std::vector<std::byte> state(plan.state_bytes), space(plan.workspace_bytes);
  model_selection selection(backend, plan, workspace(state));
  for (const auto& layer : layers) throw_if_failed(selection.add_layer(backend, layer, workspace(space)));
  for (index_t l = 0; l < model.count(); ++l) {
    const kept_tokens expected = selection.kept(l);
    const kept_tokens kept = found[static_cast<std::size_t>(l)].kept();
    index_t differences = 0;
    for (index_t b = 0; b < expected.batch(); ++b) {
      for (index_t h = 0; h < expected.heads(); ++h) {
        differences += kept.lengths(b, h) != expected.lengths(b, h) ? 1 : 0;
        for (index_t i = 0; i < std::min(kept.lengths(b, h), expected.lengths(b, h)); ++i) {
          differences += kept.positions(b, h, i) != expected.positions(b, h, i) ? 1 : 0;
        }
      }
    }
    CAPTURE(l);
    CHECK(differences == 0);
  }
}

}  // namespace

TEST_CASE("layers share a budget on a GPU as they do on the CPU") {
  if (!has_device()) SKIP("no GPU was found");
  random_engine random(1);
  for (const index_t tokens : {40, 700, 9000}) {
    for (const bool ragged : {false, true}) {
      random_model model(random, 6,
                         {.batch = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 64, .tokens = tokens, .queries = 8});
      for (index_t l = 0; l < model.count() && ragged; ++l) {
        auto& lengths = model.head_lengths.emplace_back();
        for (int i = 0; i < 4; ++i) lengths.push_back(static_cast<std::int32_t>(pick(random, tokens / 2, tokens)));
      }
      model_policy policy;
      policy.window = 8;
      policy.protect = {.sink = 1, .recent = 8};
      policy.group = group_reduce::mean;
      policy.granularity.tokens = tokens == 700 ? 4 : 1;
      const auto budget = budget_size::keep_ratio(0.4);
      CAPTURE(tokens, ragged);
      compare(policy, global_budget{.budget = budget, .least = 2, .normalise = ragged}, model);
      compare(policy, lava_budget{.budget = budget}, model);
      compare(policy, cake_budget{.budget = budget, .entropy_temperature = 1.6f, .variance_temperature = 0.4f}, model);
    }
  }
}
