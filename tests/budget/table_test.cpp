// SPDX-License-Identifier: Apache-2.0
// Budgets from tables of the model: head_kv, budget_table, duo_attention; and from bytes.
#include "budget/budget_support.hpp"

#include <restkv/budget/ada_kv.hpp>
#include <restkv/budget/budget_table.hpp>
#include <restkv/budget/duo_attention.hpp>
#include <restkv/budget/head_kv.hpp>
#include <restkv/budget/keep_bytes.hpp>

#include <numeric>

using namespace restkv_test;
using restkv::budget_size;
using restkv::budget_table;
using restkv::duo_attention;
using restkv::errc;
using restkv::head_kv;

namespace {

static_assert(restkv::ranking_budget_allocator<budget_table> && std::is_trivially_copyable_v<budget_table>);
static_assert(restkv::ranking_budget_allocator<duo_attention> && std::is_trivially_copyable_v<duo_attention>);
static_assert(restkv::ranking_budget_allocator<head_kv> && std::is_trivially_copyable_v<head_kv>);

/// A table [layers, heads] with its memory.
template <class T>
struct table {
  index_t layers, heads;
  std::vector<T> values;

  table(index_t l, index_t h, T value = {})
      : layers(l), heads(h), values(static_cast<std::size_t>(l * h), value) {}
  T& operator()(index_t l, index_t h) { return values[static_cast<std::size_t>(l * heads + h)]; }
  [[nodiscard]] tensor_view<const T, 2> view() const { return {values.data(), {layers, heads}}; }
};

/// Counts of every layer and head.
template <class Allocator>
std::vector<index_t> counts_of_model(const Allocator& allocator, budget_problem problem) {
  std::vector<index_t> counts;
  for (problem.layer = 0; problem.layer < problem.layers; ++problem.layer) {
    const auto of_layer = allocate(allocator, problem, tensor_view<const std::uint32_t, 2>{});
    check_promises(allocator, problem, of_layer);
    counts.insert(counts.end(), of_layer.begin(), of_layer.end());
  }
  return counts;
}

index_t sum_of(const std::vector<index_t>& counts) { return std::accumulate(counts.begin(), counts.end(), index_t{0}); }

budget_problem random_model(random_engine& random) {
  budget_problem problem{.heads = pick(random, 1, 6), .length = pick(random, 1, 500), .layers = pick(random, 1, 12)};
  problem.candidates = problem.length - pick(random, 0, std::min<index_t>(problem.length, 40));
  return problem;
}

}  // namespace

TEST_CASE("head_kv is the published formula, its total exact") {
  random_engine random(1);
  index_t without_ceiling = 0;
  for (int trial = 0; trial < 600; ++trial) {
    const budget_problem problem = random_model(random);
    table<float> importance(problem.layers, problem.heads);
    for (float& value : importance.values) {
      value = chance(random, 10) ? 0.0f : static_cast<float>(std::exp(normal(random)));
    }
    if (chance(random, 5)) std::fill(importance.values.begin(), importance.values.end(), 0.0f);
    const float betas[] = {1.0f, 1.005f, 1.01f, 2.0f, 10.0f};
    const head_kv allocator{
        .budget = pick(random, 1, 200), .importance = importance.view(), .beta = betas[pick(random, 0, 4)]};
    const index_t mean = std::min(allocator.budget.tokens, problem.length) - problem.protected_tokens();
    if (mean < 0) continue;
    const auto counts = counts_of_model(allocator, problem);
    const index_t heads = problem.layers * problem.heads;
    CAPTURE(trial, mean, problem.candidates, allocator.beta, importance.values, counts);
    CHECK(sum_of(counts) == heads * mean);
    double sum = 0;
    for (const float value : importance.values) sum += static_cast<double>(value);
    const auto part =
        static_cast<double>(static_cast<index_t>(static_cast<double>(mean) / static_cast<double>(allocator.beta)));
    bool fits = sum > 0;
    std::vector<double> shares;
    for (const float value : importance.values) {
      shares.push_back(static_cast<double>(mean) - part +
                       static_cast<double>(value) / sum * part * static_cast<double>(heads));
      fits = fits && shares.back() <= static_cast<double>(problem.candidates);
    }
    for (std::size_t i = 0; i < counts.size(); ++i) {
      for (std::size_t j = 0; j < counts.size(); ++j) {
        // The more important head never gets less.
        if (importance.values[i] > importance.values[j]) CHECK(counts[i] >= counts[j]);
      }
      if (fits) CHECK(std::fabs(static_cast<double>(counts[i]) - shares[i]) < 1 + 1e-6);
      // A ceiling elsewhere only adds.
      if (sum > 0) {
        CHECK(static_cast<double>(counts[i]) > std::min(shares[i], static_cast<double>(problem.candidates)) - 1 - 1e-6);
      }
    }
    without_ceiling += fits ? 1 : 0;
  }
  CHECK(without_ceiling > 50);
}

TEST_CASE("head_kv: equal importance is uniform, query heads are taken together, odd numbers count as nothing") {
  const budget_problem problem{.heads = 2, .length = 100, .candidates = 90, .layers = 3};
  table<float> equal(3, 4, 0.125f);
  CHECK(counts_of_model(head_kv{.budget = 40, .importance = equal.view()}, problem) == std::vector<index_t>(6, 30));
  table<float> one(3, 4);
  one(1, 2) = 2;
  one(1, 3) = std::numeric_limits<float>::quiet_NaN();
  one(0, 0) = -7;
  // m = 30, part = 29: 1 for each head; the rest, 174, goes to head 1 of layer 1 as far as it has tokens, then evenly.
  CHECK(counts_of_model(head_kv{.budget = 40, .importance = one.view()}, problem) ==
        std::vector<index_t>{18, 18, 18, 90, 18, 18});
  table<float> column(3, 1, 1.0f);  // the same for all heads of a layer
  column(2, 0) = 2;
  CHECK(counts_of_model(head_kv{.budget = 40, .importance = column.view(), .beta = 1}, problem) ==
        std::vector<index_t>{23, 23, 22, 22, 45, 45});

  // m = 4, part = 1: 3 for each; the rest, 20, fills one head exactly, and rounding does not say whether.
  table<float> almost(5, 4, 1e-20f);
  almost(2, 1) = 1;
  std::vector<index_t> filled(20, 3);
  filled[9] = 23;
  CHECK(counts_of_model(head_kv{.budget = 16, .importance = almost.view(), .beta = 2.3f},
                        {.heads = 4, .length = 35, .candidates = 23, .layers = 5}) == filled);
}

TEST_CASE("head_kv: a plan for the longest sequence holds every shorter one") {
  random_engine random(2);
  for (int trial = 0; trial < 500; ++trial) {
    // check_plan_holds draws layers and heads itself: one column, and as many layers as it may draw.
    std::vector<float> values(12);
    for (float& value : values) value = static_cast<float>(std::exp(2 * normal(random)));
    const index_t layers = pick(random, 1, 12);
    head_kv allocator{.budget = pick(random, 1, 200),
                      .importance = tensor_view<const float, 2>(values.data(), {layers, 1}),
                      .beta = static_cast<float>(uniform_real(random, 1, 3))};
    if (chance(random, 30)) allocator.budget = budget_size::keep_ratio(uniform_real(random, 0.05, 1));
    budget_problem longest{.heads = pick(random, 1, 4),
                           .length = pick(random, 1, 400),
                           .layer = pick(random, 0, layers - 1),
                           .layers = layers};
    const index_t fixed = pick(random, 0, std::min<index_t>(longest.length, 20));
    longest.candidates = longest.length - fixed;
    const index_t capacity = allocator.most_per_head(longest);
    index_t largest = 0;
    for (int shorter_trial = 0; shorter_trial < 40; ++shorter_trial) {
      budget_problem shorter = longest;
      shorter.length = pick(random, 0, longest.length);
      shorter.candidates = std::max<index_t>(0, shorter.length - fixed);
      if (chance(random, 20)) shorter.candidates = pick(random, 0, shorter.candidates);
      if (allocator.budget.of(shorter) < shorter.protected_tokens()) continue;
      for (const index_t count : allocate(allocator, shorter, tensor_view<const std::uint32_t, 2>{})) {
        CAPTURE(longest.length, fixed, capacity, shorter.length, shorter.candidates, values, layers, longest.layer);
        CHECK(shorter.protected_tokens() + count <= capacity);
        largest = std::max(largest, shorter.protected_tokens() + count);
      }
    }
  }
  // Tight: not the whole sequence because some other layer might need it.
  const float values[] = {1, 1, 1, 1};
  const head_kv even{.budget = 132, .importance = tensor_view<const float, 2>(values, {4, 1})};
  CHECK(even.most_per_head({.heads = 2, .length = 4000, .candidates = 3968, .layers = 4}) <= 134);
}

TEST_CASE("budget_table: each head keeps what it is given, never less than what is protected") {
  random_engine random(3);
  for (int trial = 0; trial < 400; ++trial) {
    random_problem<std::uint32_t> made(random, score_kind::mixed);
    if (chance(random, 50)) made.make_ragged(random);
    const budget_problem& problem = made.problem;
    table<budget_size> budgets(problem.layers, chance(random, 30) ? 1 : problem.heads);
    for (budget_size& size : budgets.values) {
      size =
          chance(random, 40) ? budget_size::keep_ratio(uniform_real(random, 0, 1)) : budget_size(pick(random, 0, 200));
    }
    const budget_table allocator{budgets.view()};
    REQUIRE(allocator.check().ok());
    REQUIRE(allocator.check(problem).ok());
    const auto counts = allocate(allocator, problem, made.view());
    check_promises(allocator, problem, counts);
    for (index_t h = 0; h < problem.heads; ++h) {
      const budget_size& size = budgets(problem.layer, budgets.heads == 1 ? 0 : h);
      const auto units = size.ratio > 0
                             ? static_cast<index_t>(std::floor(size.ratio * static_cast<double>(problem.length)))
                             : size.tokens / problem.unit;
      const index_t wanted = std::min(units, problem.length) - problem.protected_tokens();
      CAPTURE(problem.layer, h, size.tokens, size.ratio, problem.unit);
      CHECK(counts[static_cast<std::size_t>(h)] == std::clamp<index_t>(wanted, 0, problem.candidates_of(h)));
    }
    CHECK(sum_of(counts) == restkv::chosen_in_layer(allocator, problem));
  }
}

TEST_CASE("budget_table: layers that keep 0.9 and nothing of 256 tokens keep 230 and 0") {
  table<budget_size> budgets(2, 1);
  budgets(0, 0) = budget_size::keep_ratio(0.9);
  budgets(1, 0) = budget_size::keep_ratio(0.0);
  const budget_problem problem{.heads = 2, .length = 256, .candidates = 256, .layers = 2};
  CHECK(budget_table{budgets.view()}.check().ok());
  CHECK(counts_of_model(budget_table{budgets.view()}, problem) == std::vector<index_t>{230, 230, 0, 0});
  budgets(1, 0).tokens = -3;
  check_error(budget_table{budgets.view()}.check(), errc::invalid_argument, {1, 0, -3}, "budget_table");
  budgets(1, 0) = budget_size::keep_ratio(1.5);
  check_error(budget_table{budgets.view()}.check(), errc::invalid_argument, {1, 0}, "budget_table");
}

TEST_CASE("duo_attention: retrieval heads keep everything, the others what is protected") {
  table<std::uint8_t> retrieval(3, 4);
  retrieval(0, 1) = 1;
  retrieval(2, 2) = retrieval(2, 3) = 1;
  const budget_problem problem{.heads = 4, .length = 1000, .candidates = 616, .layers = 3};  // 128 sinks, 256 recent
  duo_attention allocator{retrieval.view()};
  CHECK(counts_of_model(allocator, problem) == std::vector<index_t>{0, 616, 0, 0, 0, 0, 0, 0, 0, 0, 616, 616});
  CHECK(allocator.tokens_per_head({.heads = 4, .length = 1000, .candidates = 616, .layer = 1, .layers = 3}) == 384);
  CHECK(allocator.most_per_head({.heads = 4, .length = 1000, .candidates = 616, .layer = 1, .layers = 3}) == 384);
  CHECK(allocator.most_per_head(problem) == 1000);
  allocator.streaming = 400;
  allocator.retrieval = budget_size::keep_ratio(0.5);
  CHECK(counts_of_model(allocator, problem) == std::vector<index_t>{16, 116, 16, 16, 16, 16, 16, 16, 16, 16, 116, 116});
  // A set per KV head, patterns per query head.
  budget_problem grouped = problem;
  grouped.heads = 2;
  CHECK(counts_of_model(duo_attention{retrieval.view()}, grouped) == std::vector<index_t>{616, 0, 0, 0, 0, 616});
  check_error(duo_attention{.retrieval = 0}.check(), errc::invalid_argument, {0, 1}, "duo_attention.retrieval");
}

TEST_CASE("tables that do not fit the model are named, and nothing is read") {
  const table<float> importance(3, 4, 1.0f);
  budget_problem problem{.heads = 3, .length = 50, .candidates = 40, .layers = 3};
  const auto check_refused = [&](const auto& allocator, std::vector<long long> numbers) {
    check_error(allocator.check(problem), errc::shape_mismatch, {numbers[0], numbers[1]}, "");
    (void)allocator.tokens_per_head(problem);
    (void)allocator.most_per_head(problem);
    for (const index_t count : allocate(allocator, problem, tensor_view<const std::uint32_t, 2>{})) {
      CHECK(count >= 0);
      CHECK(count <= 40);
    }
  };
  check_refused(head_kv{.budget = 20, .importance = importance.view()}, {4, 3});
  problem.heads = 4;
  problem.layers = 9;
  problem.layer = 8;
  check_refused(head_kv{.budget = 20, .importance = importance.view()}, {3, 9});
  const table<std::uint8_t> mask(3, 4, 1);
  check_refused(duo_attention{mask.view()}, {3, 9});
  const table<budget_size> budgets(3, 4, 20);
  check_refused(budget_table{budgets.view()}, {3, 9});
  check_error(budget_table{}.check(problem), errc::missing_input, {}, "budget_table.budgets");
  check_error(head_kv{.beta = 0.5f}.check(), errc::invalid_argument, {1}, "head_kv.beta");
}

TEST_CASE("keep_bytes: the largest count whose bytes do not pass the limit") {
  using restkv::cache_bytes;
  using restkv::keep_bytes;
  // 2 (key and value) * 128 channels * 2 bytes * 8 heads * 32 layers = 131072 bytes a token.
  const cache_bytes half{.layers = 32, .heads = 8, .head_dim = 128};
  CHECK(half.of(1) == 131072);
  CHECK(keep_bytes(131072ull * 1024, half).tokens == 1024);
  CHECK(keep_bytes(131072ull * 1024 - 1, half).tokens == 1023);
  CHECK(keep_bytes(131071, half).tokens == 0);
  CHECK_FALSE(restkv::ada_kv{.budget = keep_bytes(100, half)}.check().ok());
  CHECK(keep_bytes(std::numeric_limits<std::uint64_t>::max(), half).tokens == 2147483647);
  // 4 bits: keys with a 2-byte scale and zero point a channel for each 32 tokens, values with 4 bytes for each of 4
  // groups.
  const cache_bytes quantised{.layers = 2, .heads = 3, .head_dim = 64, .key_bits = 4, .value_bits = 4,
                              .token_scale_bytes = 16, .scale_group = 32, .group_scale_bytes = 64 * 4};
  CHECK(quantised.of(32) == 6 * (32 * (32 + 32 + 16) + 256));
  CHECK(quantised.of(33) == 6 * (33 * 80 + 512));
  random_engine random(4);
  for (int trial = 0; trial < 2000; ++trial) {
    const cache_bytes cache{.layers = pick(random, 1, 40),
                            .heads = pick(random, 1, 40),
                            .head_dim = pick(random, 1, 200),
                            .key_bits = pick(random, 1, 32),
                            .value_bits = pick(random, 1, 32),
                            .token_scale_bytes = pick(random, 0, 30),
                            .scale_group = pick(random, 1, 64),
                            .group_scale_bytes = pick(random, 0, 500)};
    const auto bytes = static_cast<std::uint64_t>(pick(random, 0, 1'000'000'000));
    const index_t tokens = keep_bytes(bytes, cache).tokens;
    CHECK((tokens == 0 || cache.of(tokens) <= bytes));
    CHECK(cache.of(tokens + 1) > bytes);
  }
  check_error(cache_bytes{.heads = 0}.check(), errc::invalid_argument, {0, 1}, "cache_bytes.heads");
  check_error(cache_bytes{.group_scale_bytes = -1}.check(), errc::invalid_argument, {-1}, "cache_bytes");
  CHECK(keep_bytes(1000000, cache_bytes{.head_dim = -1}).tokens == 0);
}
