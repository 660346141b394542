// SPDX-License-Identifier: Apache-2.0
// The corners of a policy's domain, one by one: what is kept there, on both backends.
#include "policy/selection_support.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/score/snap_kv.hpp>

#include <numeric>

using namespace restkv_test;
using restkv::eigen_backend;
using restkv::feature;
using restkv::reference_backend;

namespace {

/// The same score for every token, or none that is a number.
struct constant_score {
  float value = 1.0f;
  static constexpr feature needs = feature::none;

  template <std::floating_point Real>
  Real operator()(const restkv::token_features<Real>&) const {
    return static_cast<Real>(value);
  }
};

template <class Score>
auto policy_of(const Score& score, index_t budget, const restkv::protection& protect = {.sink = 0, .recent = 0}) {
  return eviction_policy{.score = score,
                         .window = 8,
                         .spatial = restkv::no_pool{},
                         .group = restkv::group_reduce::mean,
                         .budget = restkv::uniform{budget},
                         .protect = protect};
}

std::vector<index_t> range(index_t first, index_t end) {
  std::vector<index_t> positions(static_cast<std::size_t>(end - first));
  std::iota(positions.begin(), positions.end(), first);
  return positions;
}

/// Every head of every sequence keeps exactly these positions.
void check_all(const kept_tokens& kept, const std::vector<index_t>& positions) {
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) CHECK(kept_of(kept, b, h) == positions);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("no sequences, no tokens, and sequences of no tokens keep nothing", "", reference_backend,
                   eigen_backend) {
  random_engine random(1);
  TestType backend;
  const auto policy = policy_of(restkv::snap_kv{}, 20);
  const random_layer<float> no_sequences(random, {.batch = 0});
  const auto nothing = restkv::select(backend, policy, no_sequences.view());
  CHECK(nothing.kept().batch() == 0);
  CHECK(nothing.kept().total() == 0);
  const random_layer<float> no_tokens(random, {.batch = 2, .tokens = 0, .query_rows = 0});
  const auto empty = restkv::select(backend, policy, no_tokens.view());
  CHECK(empty.kept().batch() == 2);
  CHECK(empty.kept().total() == 0);
  random_layer<float> layer(random, {.batch = 3, .padded = true});
  layer.lengths = {0, 60, 0};
  layer.view().lengths = {layer.lengths.data(), {3}};
  const auto some = restkv::select(backend, policy, layer.view());
  CHECK(some.kept().lengths(0, 0) == 0);
  CHECK(some.kept().lengths(1, 0) == 20);
  CHECK(some.kept().lengths(2, 1) == 0);
}

TEMPLATE_TEST_CASE("sequences within their budget keep everything", "", reference_backend, eigen_backend) {
  random_engine random(2);
  TestType backend;
  const random_layer<float> layer(random, {.batch = 2, .tokens = 30});
  for (const index_t budget : {30, 31, 1000}) {
    check_all(restkv::select(backend, policy_of(restkv::snap_kv{}, budget), layer.view()).kept(), range(0, 30));
  }
  for (index_t h = 0; h < 2; ++h) {
    CHECK(restkv::select(backend, policy_of(restkv::snap_kv{}, 29), layer.view()).kept().lengths(0, h) == 29);
  }
}

TEMPLATE_TEST_CASE("a window longer than the sequence protects all of it", "", reference_backend, eigen_backend) {
  random_engine random(3);
  TestType backend;
  for (const index_t tokens : {1, 5, 7, 8}) {  // the window has 8 queries
    const random_layer<float> layer(random, {.batch = 2, .tokens = tokens, .query_rows = tokens});
    check_all(restkv::select(backend, policy_of(restkv::snap_kv{}, 8), layer.view()).kept(), range(0, tokens));
  }
}

TEMPLATE_TEST_CASE("a budget of the protected tokens keeps those", "", reference_backend, eigen_backend) {
  random_engine random(4);
  TestType backend;
  const random_layer<float> layer(random, {.batch = 2, .tokens = 30});
  auto expected = range(0, 3);
  for (const index_t n : range(30 - 8, 30)) expected.push_back(n);
  const auto policy = policy_of(restkv::snap_kv{}, 11, {.sink = 3, .recent = 2});  // the window protects 8
  check_all(restkv::select(backend, policy, layer.view()).kept(), expected);
}

TEMPLATE_TEST_CASE("a ratio of a short sequence below its protected tokens keeps those", "", reference_backend,
                   eigen_backend) {
  // The plan's longest sequence has room for them; a shorter one is not an error, its window is simply kept.
  random_engine random(5);
  TestType backend;
  random_layer<float> layer(random, {.batch = 2, .tokens = 60, .padded = true, .pad = restkv::padding::right});
  layer.lengths = {60, 12};
  auto policy = policy_of(restkv::snap_kv{}, 1);
  policy.budget = restkv::uniform{restkv::budget_size::keep_ratio(0.25)};
  const auto selection = restkv::select(backend, policy, layer.view());
  CHECK(selection.kept().lengths(0, 0) == 15);
  CHECK(kept_of(selection.kept(), 1, 0) == range(4, 12));
}

TEMPLATE_TEST_CASE("sinks and recent tokens that overlap protect the whole sequence", "", reference_backend,
                   eigen_backend) {
  random_engine random(6);
  TestType backend;
  const random_layer<float> layer(random, {.batch = 1, .tokens = 20});
  const auto policy = policy_of(constant_score{}, 25, {.sink = 15, .recent = 10});
  check_all(restkv::select(backend, policy, layer.view()).kept(), range(0, 20));
}

TEMPLATE_TEST_CASE("among equal scores, and among NaN, the oldest tokens are kept", "", reference_backend,
                   eigen_backend) {
  random_engine random(7);
  TestType backend;
  const random_layer<float> layer(random, {.batch = 2, .tokens = 200});
  auto expected = range(0, 45);
  for (const index_t n : range(195, 200)) expected.push_back(n);
  for (const float score : {1.0f, 0.0f, -0.0f, -3.0f, std::numeric_limits<float>::denorm_min(),
                            std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    CAPTURE(score);
    const auto policy = policy_of(constant_score{score}, 50, {.sink = 0, .recent = 5});
    check_all(restkv::select(backend, policy, layer.view()).kept(), expected);
    // Heads that compete: the first ones win the ties, the total stays.
    auto shared = eviction_policy{.score = constant_score{score},
                                  .spatial = restkv::no_pool{},
                                  .group = restkv::group_reduce::mean,
                                  .budget = restkv::ada_kv{.budget = 50, .floor = 0},
                                  .protect = {.sink = 0, .recent = 5}};
    const auto selection = restkv::select(backend, shared, layer.view());
    CHECK(selection.kept().lengths(0, 0) == 95);
    CHECK(selection.kept().lengths(0, 1) == 5);
  }
}

TEMPLATE_TEST_CASE("a mask over every token keeps every token within the budget, and is refused beyond it", "",
                   reference_backend, eigen_backend) {
  random_engine random(8);
  TestType backend;
  random_layer<float> layer(random, {.batch = 1, .tokens = 30, .masked_percent = 100});
  check_all(restkv::select(backend, policy_of(restkv::snap_kv{}, 30), layer.view()).kept(), range(0, 30));
  restkv::owned_selection selection;
  check_error(selection.run(backend, policy_of(restkv::snap_kv{}, 29), layer.view()),
              restkv::errc::invalid_argument, {29, 30}, "mask");
}
