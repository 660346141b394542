// SPDX-License-Identifier: Apache-2.0
// One score of one's own, fewer than 25 lines, in everything the library has: budgets of a layer and of the model, pages,
// shared sets, a second stage, a bound on the error, and a sequence that runs on.
//
//   everywhere examples/data/trace-2k.safetensors [LAYER...]
#include "recorded_layer.hpp"
#include "value_weighted_attention.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/model/error_bounded.hpp>
#include <restkv/model/global_budget.hpp>
#include <restkv/model/model_selection.hpp>
#include <restkv/rescoring/critical_kv.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/session/session.hpp>

#include <charconv>
#include <cstdio>
#include <cstring>
#include <deque>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using restkv::index_t;

constexpr index_t budget = 256;  // tokens per KV head
using layers_t = std::deque<recorded_layer>;

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("not as it should be: ") + what);
}

void print(const char* name, index_t tokens, double error) {
  std::printf("%-46s %6lld tokens   error of the queries to come %.4f\n", name, static_cast<long long>(tokens), error);
}

/// Selects in every layer, and returns the tokens that are kept in all.
template <class Policy>
index_t select_layers(const char* name, const Policy& policy, const layers_t& layers) {
  restkv::eigen_backend backend(2);
  index_t tokens = 0;
  double error = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    restkv::owned_selection chosen;
    restkv::throw_if_failed(chosen.run(backend, policy, layers[l].prompt(), static_cast<index_t>(l),
                                       static_cast<index_t>(layers.size())));
    tokens += chosen.kept().total();
    error += restkv::future_error(backend, chosen, layers[l].prompt(), layers[l].future()).mean_relative() /
             static_cast<double>(layers.size());
  }
  print(name, tokens, error);
  return tokens;
}

/// Budgets and granularities, as parts that are chosen at run time.
void one_layer_at_a_time(const layers_t& layers) {
  const index_t whole = static_cast<index_t>(layers.size()) * layers[0].prompt().key.extent(1) * budget;
  auto policy = restkv::eviction_policy{.score = value_weighted_attention{},
                                        .spatial = restkv::any_spatial{restkv::average_pool{.width = 5}},
                                        .budget = restkv::any_budget{restkv::uniform{budget}}};
  require(select_layers("the same for every head", policy, layers) == whole, "the budget");
  policy.budget.choice = restkv::ada_kv{.budget = budget};
  require(select_layers("heads compete", policy, layers) == whole, "the budget");
  policy.budget.choice = restkv::pyramid{.budget = budget};
  require(select_layers("more for lower layers", policy, layers) == whole, "the budget");
  policy.budget.choice = restkv::ada_kv{.budget = budget};
  policy.granularity = {.tokens = 16};
  require(select_layers("heads compete, pages of 16 tokens", policy, layers) == whole, "the budget");
  policy.granularity = {.tokens = 16, .shared = true};
  require(select_layers("pages of 16 tokens that heads share", policy, layers) == whole, "the budget");

  const auto critical = restkv::eviction_policy{.score = value_weighted_attention{},
                                                .rescoring = restkv::critical_kv<restkv::value_size::projected_l2>{},
                                                .budget = restkv::ada_kv{.budget = budget}};
  require(select_layers("heads compete, a second stage (CriticalKV)", critical, layers) == whole, "the budget");
}

/// One ranking over all layers and heads, taken in layer by layer.
void all_layers_at_once(const layers_t& layers) {
  restkv::eigen_backend backend(2);
  const auto count = static_cast<index_t>(layers.size());
  const restkv::problem_shape shape = restkv::shape_of(layers[0].prompt(), 0, count);
  const auto plan = restkv::make_model_plan(
      backend, my_policy(budget), restkv::global_budget{.budget = budget, .least = 32, .normalise = true}, shape);
  std::vector<std::byte> state(plan.state_bytes);
  std::vector<std::byte> scratch(plan.workspace_bytes);
  restkv::model_selection selection(backend, plan, restkv::workspace(state));
  for (const recorded_layer& layer : layers) {
    restkv::throw_if_failed(selection.add_layer(backend, layer.prompt(), restkv::workspace(scratch)));
    require(selection.total(0) <= count * shape.kv_heads * budget, "the model's budget while layers come in");
  }
  double error = 0;
  for (index_t l = 0; l < count; ++l) {
    const recorded_layer& layer = layers[static_cast<std::size_t>(l)];
    error += restkv::future_error(backend, selection.kept(l), layer.prompt(), layer.future()).mean_relative() /
             static_cast<double>(count);
  }
  print("layers and heads compete", selection.total(0), error);
  require(selection.total(0) == count * shape.kv_heads * budget, "the model's budget");
}

/// As few tokens as a bound on the error of the window's queries allows.
void as_small_as_possible(const layers_t& layers) {
  restkv::eigen_backend backend(2);
  std::vector<restkv::layer_view<float>> prompts;
  for (const recorded_layer& layer : layers) prompts.push_back(layer.prompt());
  restkv::error_bounded_selection chosen;
  restkv::throw_if_failed(chosen.run(backend, my_policy(restkv::budget_size::keep_ratio(1.0)),
                                     std::span<const restkv::layer_view<float>>(prompts), {.bound = 0.1}));
  index_t tokens = 0;
  double error = 0;
  for (index_t l = 0; l < chosen.layers(); ++l) {
    const recorded_layer& layer = layers[static_cast<std::size_t>(l)];
    require(chosen.error(l) <= 0.1, "the bound on the window's error");
    tokens += chosen.tokens(l);
    error += restkv::future_error(backend, chosen.kept(l), layer.prompt(), layer.future()).mean_relative() /
             static_cast<double>(chosen.layers());
  }
  print("an error of the window of 10 % at most", tokens, error);
}

/// The prompt's last tokens and those that the model wrote, one after the other, in a cache that never grows beyond its mark.
void while_it_runs(const layers_t& layers) {
  restkv::eigen_backend backend(2);
  const auto policy = restkv::session_policy{.policy = my_policy(budget), .high_water = budget + 32};
  restkv::problem_shape shape = restkv::shape_of(layers[0].prompt());
  const auto plan = restkv::make_session_plan<float>(backend, policy, shape);
  std::vector<std::byte> memory(plan.memory_bytes);
  auto session = restkv::open_session<float>(backend, plan, memory);
  restkv::throw_if_failed(session.set_projection(0, layers[0].prompt().projection, layers[0].prompt().metric));
  // Queries were recorded for the last 64 tokens of the prompt; those before it bring keys and values only.
  const auto take = [](const restkv::tensor_view<const float, 4>& tensor) { return tensor[0]; };
  const auto key = take(layers[0].prompt().key.chunk(0));
  const auto value = take(layers[0].prompt().value.chunk(0));
  const auto query = take(layers[0].prompt().query);
  const index_t known = query.extent(1);
  const index_t before = budget;  // tokens of the prompt without a recorded query
  const index_t first = key.extent(1) - known - before;
  const std::vector<float> no_query(static_cast<std::size_t>(query.extent(0) * before * query.extent(2)));
  restkv::throw_if_failed(session.append(
      0, restkv::tensor_view<const float, 3>(no_query.data(), {query.extent(0), before, query.extent(2)}),
      key.slice(1, first, before), value.slice(1, first, before)));
  restkv::throw_if_failed(
      session.append(0, query, key.slice(1, key.extent(1) - known, known), value.slice(1, key.extent(1) - known, known)));
  const restkv::future_view<float> future = layers[0].future();
  index_t most = 0;
  for (index_t t = 0; t < future.key.extent(2); ++t) {
    restkv::throw_if_failed(session.append(0, take(future.query).slice(1, t, 1), take(future.key).slice(1, t, 1),
                                           take(future.value).slice(1, t, 1)));
    index_t tokens = 0;
    for (index_t h = 0; h < shape.kv_heads; ++h) tokens += session.length(0, h);
    most = std::max(most, tokens);
  }
  std::printf("%-46s %6lld tokens   at most, %lld evictions in %lld tokens\n", "a sequence that runs on",
              static_cast<long long>(most), static_cast<long long>(session.evictions(0)),
              static_cast<long long>(session.tokens_seen(0)));
  require(session.evictions(0) > 0, "evictions");
  require(most <= shape.kv_heads * (budget + 32), "the session's mark");
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: everywhere TRACE [LAYER...]\n");
    return 2;
  }
  try {
    restkv::safetensors_file file;
    restkv::throw_if_failed(restkv::safetensors_file::open(arguments[1], file));
    std::vector<std::string> names{"1", "10", "19", "28"};
    if (count > 2) names.assign(arguments + 2, arguments + count);
    layers_t layers;
    for (const std::string& name : names) layers.emplace_back(file, "layers." + name + ".");
    one_layer_at_a_time(layers);
    all_layers_at_once(layers);
    as_small_as_possible(layers);
    while_it_runs(layers);
    return 0;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "everywhere: %s\n", problem.what());
    return 1;
  }
}
