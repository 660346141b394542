// SPDX-License-Identifier: Apache-2.0
// `select` on a bulk backend, where every step takes all rows at once, against `select` row by row: the same scores
// must give the same sets, drifts and smoothed rows, bit by bit.
#include "support/bulk_backend.hpp"
#include "support/catch.hpp"
#include "support/random_layer.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/runtime_parts.hpp>
#include <restkv/score/snap_kv.hpp>

#include <cstring>

using namespace restkv_test;
using namespace restkv;

namespace {

using any_policy = eviction_policy<snap_kv, any_temporal, any_spatial, any_budget>;
static_assert(detail::selects_in_bulk<bulk_eigen_backend, any_policy>);
static_assert(!detail::selects_in_bulk<eigen_backend, any_policy>);

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

/// Where segments begin, in rows that differ; for every layer here.
const tensor_view<const std::uint8_t, 2>& random_segments() {
  constexpr index_t sequences = 3, tokens = 150;
  static const std::vector<std::uint8_t> begins = [] {
    random_engine random(3);
    std::vector<std::uint8_t> bits(sequences * tokens);
    for (std::uint8_t& bit : bits) bit = chance(random, 20) ? 1 : 0;
    return bits;
  }();
  static const tensor_view<const std::uint8_t, 2> view(begins.data(), {sequences, tokens});
  return view;
}

/// A policy of random parts.
any_policy random_policy(random_engine& random, index_t tokens) {
  any_policy policy{.window = pick(random, 1, 12)};
  switch (pick(random, 0, 5)) {
    case 0:
      policy.spatial.choice = no_pool{};
      break;
    case 4:
      policy.spatial.choice = following_pool{.width = static_cast<int>(pick(random, 1, 9))};
      break;
    case 5:
      policy.spatial.choice = segment_pool{random_segments()};
      break;
    case 1:
      policy.spatial.choice = average_pool{.width = static_cast<int>(2 * pick(random, 0, 4) + 1)};
      break;
    case 2:
      policy.spatial.choice = max_pool{.width = static_cast<int>(2 * pick(random, 0, 4) + 1)};
      break;
    // A small scale makes windows that are wider than the row, and shifts beyond it.
    default:
      policy.spatial.choice = adaptive_window{.min_width = 3, .scale = chance(random, 50) ? 0.05f : 5.0f};
  }
  policy.group = static_cast<group_reduce>(pick(random, 0, 4));
  policy.protect = {.sink = pick(random, 0, 3), .recent = pick(random, 0, 5)};
  policy.granularity = {.tokens = chance(random, 60) ? 1 : pick(random, 2, 9),
                        .reduce = chance(random, 50) ? unit_reduce::mean : unit_reduce::maximum,
                        .shared = policy.group != group_reduce::none && chance(random, 25)};
  const index_t budget = pick(random, 1, tokens + 10);
  switch (pick(random, 0, 3)) {
    case 0:
      policy.budget.choice = uniform{budget};
      break;
    case 1:
      policy.budget.choice = pyramid{.budget = budget};
      break;
    default:
      policy.budget.choice = ada_kv{
          .budget = budget, .floor = static_cast<float>(pick(random, 0, 4)) / 4.0f, .normalise = chance(random, 25)};
  }
  return policy;
}

/// Asserts that both backends do the same; returns 1 where a selection came of it.
int compare(any_policy policy, const layer_view<float>& layer, bool with_details) {
  if (auto* const segments = std::get_if<segment_pool>(&policy.spatial.choice)) {
    segments->begins = segments->begins.slice(0, 0, layer.key.extent(0));
  }
  eigen_backend by_row(1, {.pruning = false});
  bulk_eigen_backend in_bulk({.pruning = false});
  const auto expected = select_tokens(by_row, policy, layer, with_details);
  const auto found = select_tokens(in_bulk, policy, layer, with_details);
  REQUIRE(expected.result.ok() == found.result.ok());
  CHECK(std::string(expected.result.message()) == found.result.message());
  if (!expected.result.ok()) return 0;
  CHECK(expected.kept == found.kept);
  if (with_details) {
    CHECK(same_bits(expected.score, found.score));
    CHECK(same_bits(expected.smoothed, found.smoothed));
    CHECK(expected.drift == found.drift);
  }
  return 1;
}

}  // namespace

TEST_CASE("random policies choose the same in bulk as row by row") {
  random_engine random(20260801);
  int selections = 0;
  for (int turn = 0; turn < 600; ++turn) {
    const layer_recipe recipe{.batch = pick(random, 1, 3),
                              .kv_heads = pick(random, 1, 3),
                              .group = pick(random, 1, 3),
                              .head_dim = pick(random, 1, 8),
                              .tokens = pick(random, 1, 150),
                              .query_rows = 150,
                              .hidden = 0,
                              .sharpness = chance(random, 20) ? 0.0 : 2.0,  // all equal: ties decide
                              .padded = chance(random, 50),
                              .pad = chance(random, 50) ? padding::left : padding::right,
                              .masked_percent = chance(random, 30) ? static_cast<int>(pick(random, 1, 30)) : 0};
    const random_layer<float> layer(random, recipe);
    const any_policy policy = random_policy(random, recipe.tokens);
    CAPTURE(turn);
    selections += compare(policy, layer.view(), chance(random, 50));
  }
  CHECK(selections > 200);
}

TEST_CASE("heads of different lengths choose the same in bulk as row by row") {
  random_engine random(7);
  int selections = 0;
  for (int turn = 0; turn < 300; ++turn) {
    const layer_recipe recipe{
        .batch = 2, .kv_heads = 3, .group = 2, .tokens = pick(random, 1, 90), .query_rows = 90, .hidden = 0};
    random_layer<float> layer(random, recipe);
    std::vector<std::int32_t> lengths;
    for (int i = 0; i < 6; ++i) lengths.push_back(static_cast<std::int32_t>(pick(random, 0, recipe.tokens)));
    layer.view().head_lengths = {lengths.data(), {2, 3}};
    layer.view().pad = chance(random, 50) ? padding::left : padding::right;
    any_policy policy = random_policy(random, recipe.tokens);
    CAPTURE(turn);
    selections += compare(policy, layer.view(), chance(random, 50));
  }
  CHECK(selections > 100);
}

TEST_CASE("a bulk plan refuses more rows than the host can hold") {
  bulk_eigen_backend backend;
  plan<any_policy> made;
  const any_policy policy{};
  CHECK(make_plan(backend, policy, {.query_heads = 1024, .kv_heads = 1024, .head_dim = 8, .tokens = 2000}, made).ok());
  const status refused =
      make_plan(backend, policy, {.query_heads = 1025, .kv_heads = 1025, .head_dim = 8, .tokens = 2000}, made);
  CHECK(refused.code() == errc::unsupported);
  CHECK(std::string(refused.message()) == "1 sequences of 1025 heads: this backend serves 1024 of each at most");
}

TEST_CASE("a plan of another backend does not get past what a bulk backend can hold") {
  random_engine random(8);
  const random_layer<float> layer(
      random, {.kv_heads = 1025, .group = 1, .head_dim = 1, .tokens = 3, .query_rows = 3, .hidden = 0});
  const any_policy policy{};
  eigen_backend eigen;
  plan<any_policy> made;
  REQUIRE(make_plan(eigen, policy, shape_of(layer.view()), made).ok());
  std::vector<std::byte> memory(made.workspace_bytes);
  bulk_eigen_backend backend;
  kept_tokens kept;
  CHECK(select(backend, made, layer.view(), workspace(memory.data(), memory.size()), kept).code() == errc::unsupported);
}

TEST_CASE("a layer without tokens keeps none in bulk as row by row") {
  random_engine random(9);
  const random_layer<float> layer(random, {.batch = 2, .tokens = 0, .query_rows = 3, .hidden = 0});
  any_policy policy{.window = 2};
  policy.budget.choice = uniform{4};
  policy.protect = {.sink = 0, .recent = 1};
  CHECK(compare(policy, layer.view(), false) == 1);
}
