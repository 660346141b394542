// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/budgets.md, compiled and run.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"

#include <restkv/budget/budget_table.hpp>
#include <restkv/budget/duo_attention.hpp>
#include <restkv/budget/head_kv.hpp>
#include <restkv/budget/keep_bytes.hpp>
#include <restkv/compact.hpp>
#include <restkv/model/cake_budget.hpp>
#include <restkv/model/error_bounded.hpp>
#include <restkv/model/model_selection.hpp>
#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>

#include <deque>
#include <numeric>
#include <vector>

using restkv::index_t;

namespace {

/// The layers of a model, as prefill makes them one after the other.
std::deque<restkv_test::arranged_layer<float>> make_layers(index_t count) {
  std::deque<restkv_test::arranged_layer<float>> layers;
  for (index_t l = 0; l < count; ++l) {
    layers.emplace_back(restkv_test::layer_sizes{.query_heads = 4,
                                                 .kv_heads = 2,
                                                 .head_dim = 8,
                                                 .tokens = 90,
                                                 .hidden = 16,
                                                 .sharpness = 1.0 + 0.5 * static_cast<double>(l)},
                        static_cast<unsigned>(l));
  }
  return layers;
}

//! [model_budget]
/// Layers in proportion to the number of tokens that their scores are spread over: the exponential of their entropy.
struct spread_budget {
  restkv::budget_size budget{};
  index_t least = 0;

  static constexpr bool compares_heads = true;

  [[nodiscard]] double preference(const restkv::layer_summary& layer) const {
    return std::exp(layer.score_entropy * std::log(static_cast<double>(layer.candidates)));
  }
  [[nodiscard]] restkv::status check() const { return budget.check("spread_budget"); }
};
//! [model_budget]

}  // namespace

TEST_CASE("budgets from bytes and tables", "[docs]") {
  //! [keep_bytes]
  // A cache of 2 GiB for a model of 32 layers, 8 KV heads, 128 channels, 16 bits: 131072 bytes a token.
  const restkv::cache_bytes cache{.layers = 32, .heads = 8, .head_dim = 128};
  const auto policy = restkv::presets::standard(restkv::keep_bytes(2ull << 30, cache));
  //! [keep_bytes]
  CHECK(policy.budget.budget.tokens == 16384);

  const std::vector<float> head_scores(32 * 32, 0.5f);
  const float* const scores = head_scores.data();
  const std::vector<std::uint8_t> pattern(32 * 8, 1);
  const std::uint8_t* const retrieval = pattern.data();
  //! [tables]
  // HeadKV: how important each of 32 query heads of 32 layers is, measured once for the model.
  const auto head_kv = restkv::head_kv{.budget = 1024, .importance = {scores, 32, 32}};

  // DuoAttention: which KV heads retrieve. The others keep what the policy protects.
  const auto duo = restkv::eviction_policy{
      .score = restkv::streaming_llm{},
      .budget = restkv::duo_attention{.retrieval_heads = {retrieval, 32, 8}},
      .protect = {.sink = 128, .recent = 256}};
  //! [tables]
  const restkv::budget_problem problem{.heads = 8, .length = 4096, .candidates = 4064, .layers = 32};
  CHECK(head_kv.tokens_per_head(problem) == 1024);
  CHECK(duo.budget.tokens_per_head(problem) == 4096);
}

TEST_CASE("a model's layers while they come in", "[docs]") {
  auto model = make_layers(6);
  const index_t layers = 6;
  restkv::reference_backend backend;

  //! [model_selection]
  // CAKE: attention and how it moves from query to query; layers by what they prefer.
  const auto policy = restkv::eviction_policy{.score = restkv::snap_kv{},
                                              .window = 32,
                                              .temporal = restkv::mean_variance{.gamma = 200},
                                              .spatial = restkv::average_pool{.width = 5},
                                              .group = restkv::group_reduce::mean};
  const auto budget = restkv::cake_budget{.budget = 48};  // tokens per head, the mean over the model

  auto shape = restkv::shape_of(model[0].view(), 0, layers);
  const auto plan = restkv::make_model_plan(backend, policy, budget, shape);
  std::vector<std::byte> state(plan.state_bytes);          // held until the last layer
  std::vector<std::byte> scratch(plan.workspace_bytes);    // free between layers
  restkv::model_selection selection(backend, plan, restkv::workspace(state));

  for (index_t l = 0; l < layers; ++l) {
    // ... layer l is prefilled: its queries, keys and values are there.
    restkv::throw_if_failed(
        selection.add_layer(backend, model[static_cast<std::size_t>(l)].view(), restkv::workspace(scratch)));
    for (index_t i = 0; i <= l; ++i) {
      if (!selection.evicted(i)) continue;  // nothing to move in this layer
      auto& cache = model[static_cast<std::size_t>(i)];
      restkv::compact_in_place(backend, selection.cache_slots(i), cache.key, cache.value);
    }
    // From here on, all caches so far take no more than the model's budget.
  }
  // Which tokens they are: selection.kept(i), positions in the prompt.
  //! [model_selection]
  CHECK(selection.total(0) == layers * 2 * 48);

  const auto whole = make_layers(6);
  index_t compared = 0;
  for (index_t l = 0; l < layers; ++l) {
    const auto at = static_cast<std::size_t>(l);
    const restkv::kept_tokens kept = selection.kept(l);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < kept.lengths(0, h); ++i) {
        for (index_t c = 0; c < 8; ++c) {
          CHECK(model[at].key(0, h, i, c) == whole[at].key(0, h, kept.positions(0, h, i), c));
          CHECK(model[at].value(0, h, i, c) == whole[at].value(0, h, kept.positions(0, h, i), c));
          ++compared;
        }
      }
    }
  }
  CHECK(compared == layers * 2 * 48 * 8);

  const auto own = restkv::make_model_plan(backend, policy, spread_budget{.budget = 48}, shape);
  std::vector<std::byte> own_state(own.state_bytes), own_scratch(own.workspace_bytes);
  restkv::model_selection by_spread(backend, own, restkv::workspace(own_state));
  for (const auto& layer : whole) {
    restkv::throw_if_failed(by_spread.add_layer(backend, layer.view(), restkv::workspace(own_scratch)));
  }
  CHECK(by_spread.total(0) == layers * 2 * 48);
  CHECK(by_spread.kept(0).total() > by_spread.kept(5).total());  // sharper layers need less
}

TEST_CASE("the smallest cache within a bound", "[docs]") {
  const auto model = make_layers(3);
  restkv::reference_backend backend;
  std::vector<restkv::layer_view<float>> layers;
  for (const auto& layer : model) layers.push_back(layer.view());

  //! [error_bounded]
  auto policy = restkv::eviction_policy{.score = restkv::rest_kv{.metric_of_distance = restkv::metric::identity},
                                        .spatial = restkv::no_pool{}};
  policy.budget.budget = restkv::budget_size::keep_ratio(1.0);
  restkv::error_bounded_selection chosen;
  restkv::throw_if_failed(
      chosen.run(backend, policy, std::span<const restkv::layer_view<float>>(layers), {.bound = 0.05}));
  for (index_t l = 0; l < chosen.layers(); ++l) {
    const index_t tokens = chosen.tokens(l);  // the smallest number along the policy's ranking
    const double error = chosen.error(l);     // exact, at most 0.05
    //! [error_bounded]
    CHECK(error <= 0.05);
    CHECK(error ==
          restkv::output_error(backend, chosen.kept(l), layers[static_cast<std::size_t>(l)], 32).mean_relative());
    CHECK(tokens < 180);
  }
}
