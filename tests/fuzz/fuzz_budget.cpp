// SPDX-License-Identifier: Apache-2.0
// Budget allocators and the tables they read, with any numbers and any shape of table: refused with a reason, or every
// head gets what it promised: no more than its candidates, than most_per_head and, all together, than chosen_in_layer
// says. Plans of the same policies for any shape, too.
#include "fuzz/byte_source.hpp"

#include <restkv/budget/ada_kv.hpp>
#include <restkv/budget/apportion.hpp>
#include <restkv/budget/budget_table.hpp>
#include <restkv/budget/duo_attention.hpp>
#include <restkv/budget/head_kv.hpp>
#include <restkv/budget/keep_bytes.hpp>
#include <restkv/budget/pyramid.hpp>
#include <restkv/budget/uniform.hpp>
#include <restkv/plan.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/score/streaming_llm.hpp>

#include <numeric>

namespace {

using namespace restkv;
using namespace restkv_test;

budget_size any_size(byte_source& bytes) {
  if (bytes.chance(3)) return budget_size::keep_ratio(static_cast<double>(bytes.parameter()));
  return bytes.chance(12) ? bytes.any_number() : bytes.within(-1, 60);
}

/// A problem within the limits of plans, mostly a small one.
struct any_problem {
  budget_problem problem;
  std::vector<index_t> candidates;

  explicit any_problem(byte_source& bytes) {
    problem.heads = bytes.within(1, 4);
    problem.length = bytes.within(0, 60);
    problem.candidates = bytes.within(0, problem.length);
    problem.layers = bytes.within(1, 5);
    problem.layer = bytes.within(0, problem.layers - 1);
    problem.unit = bytes.chance(4) ? bytes.within(1, 9) : 1;
    if (!bytes.chance(3)) return;
    for (index_t h = 0; h < problem.heads; ++h) candidates.push_back(bytes.within(0, problem.candidates));
    candidates[0] = problem.candidates;
    problem.head_candidates = candidates;
  }
};

void check_text(const status& outcome) { require(outcome.ok() == (outcome.message()[0] == '\0')); }

template <class Budget>
void plan_for(byte_source& bytes, const Budget& budget) {
  const auto any = [&](index_t low, index_t high) {
    return bytes.chance(6) ? bytes.any_number() : bytes.within(low, high);
  };
  const index_t heads = any(1, 4);
  const problem_shape shape{.batch = any(0, 2),
                            .query_heads = bytes.flag() ? heads : any(1, 8),
                            .kv_heads = heads,
                            .head_dim = any(1, 64),
                            .tokens = any(0, 100),
                            .layer = any(0, 3),
                            .layers = any(1, 4)};
  const eviction_policy policy{.score = streaming_llm{},
                               .budget = budget,
                               .protect = {.sink = any(0, 5), .recent = any(0, 8)},
                               .granularity = {.tokens = any(1, 4), .shared = bytes.chance(4)}};
  const reference_backend backend;
  plan<std::remove_cv_t<decltype(policy)>> made;
  const status outcome = make_plan(backend, policy, shape, made);
  check_text(outcome);
  if (outcome.ok()) require(made.capacity >= 0 && made.capacity <= shape.tokens);
}

template <class Budget>
void check_budget(byte_source& bytes, const Budget& budget) {
  plan_for(bytes, budget);
  const any_problem made(bytes);
  const budget_problem& problem = made.problem;
  const status sound = budget.check();
  const status fits = check_problem(budget, problem);
  check_text(sound);
  check_text(fits);
  if (!sound.ok()) return;
  std::vector<std::uint32_t> keys(static_cast<std::size_t>(problem.heads * problem.length));
  for (index_t h = 0; h < problem.heads; ++h) {
    for (index_t n = 0; n < problem.candidates_of(h); ++n) {
      keys[static_cast<std::size_t>(h * problem.length + n)] = static_cast<std::uint32_t>(1 + bytes.byte() * 7);
    }
  }
  std::vector<index_t> counts(static_cast<std::size_t>(problem.heads));
  std::vector<double> scratch(counts.size());
  if (budget.tokens_per_head(problem) < problem.protected_tokens()) return;  // a plan refuses it
  budget.allocate(problem, tensor_view<const std::uint32_t, 2>(keys.data(), {problem.heads, problem.length}), counts,
                  scratch);
  const index_t most = budget.most_per_head(problem);
  for (std::size_t h = 0; h < counts.size(); ++h) {
    require(counts[h] >= 0 && counts[h] <= problem.candidates_of(static_cast<index_t>(h)));
    require(problem.protected_tokens() + counts[h] <= most);
  }
  if (fits.ok()) require(std::accumulate(counts.begin(), counts.end(), index_t{0}) <= chosen_in_layer(budget, problem));
}

/// A table of any shape, whose numbers `make` draws.
template <class T, class Make>
model_table<T> any_table(byte_source& bytes, exact_tensor<T, 2>& memory, const Make& make) {
  memory = strided_tensor<T, 2>({bytes.within(0, 5), bytes.within(0, 8)}, bytes);
  for (T& element : memory.memory) element = make();
  tensor_view<const T, 2> view = memory.view;
  if (bytes.chance(8)) damage(view, bytes);
  return {view};
}

void check_sharing(byte_source& bytes) {
  std::vector<double> weights(static_cast<std::size_t>(bytes.within(0, 9)));
  for (double& weight : weights)
    weight = std::bit_cast<double>(bytes.chance(4) ? bytes.any_number() : index_t(bytes.byte()) << 52);
  std::vector<index_t> ceilings(weights.size());
  index_t room = 0;
  for (index_t& ceiling : ceilings) room += ceiling = bytes.within(0, 50);
  const index_t total = bytes.within(0, 400);
  std::vector<index_t> counts(weights.size(), -1);
  apportion(weights, ceilings, total, counts);
  for (std::size_t i = 0; i < counts.size(); ++i) require(counts[i] >= 0 && counts[i] <= ceilings[i]);
  require(std::accumulate(counts.begin(), counts.end(), index_t{0}) == std::min(room, total));

  const auto any = [&] { return bytes.chance(3) ? bytes.any_number() : bytes.within(0, 300); };
  const cache_bytes cache{any(), any(), any(), any(), any(), any(), any(), any()};
  check_text(cache.check());
  const auto allowed = static_cast<std::uint64_t>(any());
  const budget_size size = keep_bytes(allowed, cache);
  if (cache.check().ok()) require(size.tokens == 0 || cache.of(size.tokens) <= allowed);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  byte_source bytes(data, size);
  constexpr pyramid_rounding roundings[] = {pyramid_rounding::exact, pyramid_rounding::released,
                                            pyramid_rounding::kvpress};
  switch (bytes.within(0, 6)) {
    case 0:
      check_budget(bytes, uniform{any_size(bytes)});
      break;
    case 1:
      check_budget(bytes, pyramid{.budget = any_size(bytes),
                                  .beta = bytes.flag() ? 20.0f : 1.0f / bytes.parameter(),
                                  .rounding = roundings[bytes.within(0, 2)]});
      break;
    case 2:
      check_budget(bytes, ada_kv{.budget = any_size(bytes), .floor = bytes.parameter(), .normalise = bytes.flag()});
      break;
    case 3: {
      exact_tensor<budget_size, 2> memory;
      check_budget(bytes, budget_table{any_table<budget_size>(bytes, memory, [&] { return any_size(bytes); })});
      break;
    }
    case 4: {
      exact_tensor<float, 2> memory;
      const auto table = any_table<float>(bytes, memory, [&] { return bytes.parameter(); });
      check_budget(bytes, head_kv{.budget = any_size(bytes), .importance = table, .beta = 1.0f / bytes.parameter()});
      break;
    }
    case 5: {
      exact_tensor<std::uint8_t, 2> memory;
      const auto table =
          any_table<std::uint8_t>(bytes, memory, [&] { return static_cast<std::uint8_t>(bytes.within(0, 1)); });
      duo_attention budget;
      budget.retrieval_heads = table;
      budget.retrieval = any_size(bytes);
      budget.streaming = any_size(bytes);
      check_budget(bytes, budget);
      break;
    }
    default:
      check_sharing(bytes);
  }
  return 0;
}
