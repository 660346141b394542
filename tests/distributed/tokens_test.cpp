// SPDX-License-Identifier: Apache-2.0
// Tokens on several ranks: the kept sets of one process for every policy that admits it, the bytes of the documented
// sums, and an end of every selection, whatever fails where.
#include "distributed/golden_layers.hpp"
#include "distributed/rank_support.hpp"

#include <restkv/distributed/tokens.hpp>
#include <restkv/presets.hpp>

using namespace restkv_test;
using distributed::token_sums;
using restkv::errc;
using restkv::group_reduce;
using restkv::reference_backend;
namespace presets = restkv::presets;

namespace {

/// Where ranks end, at random, parts of no tokens among them; whole pages.
std::vector<index_t> random_cuts(random_engine& random, index_t ranks, index_t tokens, index_t page) {
  std::vector<index_t> cuts{0};
  for (index_t r = 1; r < ranks; ++r) cuts.push_back(std::min(tokens, pick(random, 0, tokens / page + 1) * page));
  cuts.push_back(tokens);
  std::sort(cuts.begin(), cuts.end());
  return cuts;
}

/// What one rank keeps of its tokens, as positions on the whole axis.
template <class Policy, class T, class Ranks>
rank_outcome select_part(const Policy& policy, const layer_view<T>& layer, const std::vector<index_t>& cuts,
                         token_sums sums, Ranks& communicator) {
  distributed::counting_communicator ranks(communicator);
  const index_t first = cuts[static_cast<std::size_t>(ranks.rank())];
  const index_t count = cuts[static_cast<std::size_t>(ranks.rank() + 1)] - first;
  layer_view<T> part = layer;
  const auto key = slice_cache(layer.key, 2, first, count);
  const auto value = slice_cache(layer.value, 2, first, count);
  part.key = {key.data(), std::ssize(key)};
  part.value = {value.data(), std::ssize(value)};
  if (layer.keep_mask.data != nullptr) part.keep_mask = layer.keep_mask.slice(1, first, count);
  rank_outcome outcome;
  distributed::token_selection chosen;
  outcome.result = chosen.run(policy, part, {first, layer.key.extent(2)}, ranks, sums, 1, 4);
  if (outcome.result.ok()) outcome.take(chosen.kept());
  for (auto& row : outcome.kept) {
    for (position_t& position : row) position += static_cast<position_t>(first);
  }
  outcome.said = ranks.counted();
  return outcome;
}

template <class Policy, class T>
std::vector<rank_outcome> select_on_ranks(const Policy& policy, const layer_view<T>& layer,
                                          const std::vector<index_t>& cuts, token_sums sums = token_sums::in_order) {
  std::vector<rank_outcome> outcomes(cuts.size() - 1);
  on_ranks(std::ssize(outcomes), [&](auto& communicator) {
    outcomes[static_cast<std::size_t>(communicator.rank())] = select_part(policy, layer, cuts, sums, communicator);
  });
  return outcomes;
}

/// The kept positions of all ranks behind each other, row by row.
std::vector<std::vector<position_t>> put_together(const std::vector<rank_outcome>& outcomes) {
  std::vector<std::vector<position_t>> rows(outcomes.front().kept.size());
  for (const rank_outcome& outcome : outcomes) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      rows[i].insert(rows[i].end(), outcome.kept[i].begin(), outcome.kept[i].end());
    }
  }
  return rows;
}

template <class Score>
void check_random_policies(unsigned seed, int trials) {
  random_engine random(seed);
  int selected = 0;
  for (int trial = 0; trial < trials; ++trial) {
    layer_recipe recipe = random_recipe(random);
    recipe.pad = restkv::padding::left;  // with right padding below, `query` would mean something else to one process
    any_policy<Score> policy = random_policy<Score>(random);
    if (auto* const pooled = std::get_if<restkv::ada_kv>(&policy.budget.choice)) pooled->normalise = false;
    if (!recipe.padded && chance(random, 30)) policy.granularity.tokens = pick(random, 2, 5);
    if (chance(random, 30)) policy.granularity.shared = policy.group != group_reduce::none;
    random_layer<float> layer(random, recipe);
    if (chance(random, 20)) for_each(layer.key.view(), [](float& x) { x = 0; });  // all tokens tie
    layer_view<float> view = layer.view();
    if (recipe.query_rows != recipe.tokens && chance(random, 50)) view.pad = restkv::padding::right;
    const rank_outcome alone = select_alone<reference_backend>(policy, view, restkv::shape_of(view, 1, 4));
    for (index_t ranks = 1; ranks <= 4; ++ranks) {
      const auto cuts = random_cuts(random, ranks, recipe.tokens, policy.granularity.tokens);
      CAPTURE(trial, ranks, cuts, policy.granularity.shared, policy.granularity.tokens, alone.result.message());
      const auto outcomes = select_on_ranks(policy, view, cuts);
      for (const rank_outcome& outcome : outcomes) {
        CAPTURE(outcome.result.message());
        REQUIRE(outcome.result.ok() == alone.result.ok());
      }
      if (alone.result.ok()) REQUIRE(put_together(outcomes) == alone.kept);
    }
    selected += alone.result.ok() ? 1 : 0;
  }
  CHECK(selected > trials / 3);
}

}  // namespace

TEST_CASE("random policies keep the same tokens on one rank and on four") {
  check_random_policies<restkv::rest_kv>(1, 120);
  check_random_policies<restkv::snap_kv>(2, 120);
}

TEST_CASE("the layers of the release's case files keep the same tokens on one rank and on four") {
  random_engine random(7);
  for_each_golden_layer([&](const golden_layer& layer) {
    const rank_outcome alone =
        select_alone<reference_backend>(layer.policy, layer.view, restkv::shape_of(layer.view, 1, 4));
    REQUIRE(alone.result.ok());
    const index_t ranks = pick(random, 2, 4);
    CHECK(put_together(select_on_ranks(layer.policy, layer.view,
                                       random_cuts(random, ranks, layer.view.key.extent(2), 1))) == alone.kept);
  });
}

TEST_CASE("scores of all kinds keep the same tokens on one rank and on four") {
  random_engine random(3);
  const layer_recipe recipe{
      .batch = 2, .group = 2, .tokens = 70, .query_rows = 70, .padded = true, .masked_percent = 5};
  for (int trial = 0; trial < 4; ++trial) {
    const random_layer<float> layer(random, recipe);
    const auto check = [&](auto policy) {
      policy.budget.budget = 40;
      const rank_outcome alone =
          select_alone<reference_backend>(policy, layer.view(), restkv::shape_of(layer.view(), 1, 4));
      REQUIRE(alone.result.ok());
      const auto cuts = random_cuts(random, 3, recipe.tokens, 1);
      CHECK(put_together(select_on_ranks(policy, layer.view(), cuts)) == alone.kept);
      // Sums in another order: scores differ by roundings, and no two are as close as that.
      CHECK(put_together(select_on_ranks(policy, layer.view(), cuts, token_sums::by_rank)) == alone.kept);
    };
    check(presets::h2o(40, 4));        // every query of the prompt
    check(presets::keyformer(40, 4));  // noise by the position
    check(presets::la_prox(40));       // W_O itself
    check(presets::fast_caote(40));    // the mean value of the sequence
  }
}

TEST_CASE("what needs a whole row or a whole head is refused") {
  random_engine random(4);
  const random_layer<float> layer(random, {.tokens = 70, .query_rows = 32});
  const auto refused = [&](const auto& policy, const char* word, const std::vector<index_t>& cuts = {0, 30, 70}) {
    for (const rank_outcome& outcome : select_on_ranks(policy, layer.view(), cuts)) {
      check_error(outcome.result, errc::unsupported, {}, word);
    }
  };
  refused(presets::key_diff(40), "whole cache of a head");
  refused(presets::lava(40), "whole row of scores");
  refused(restkv::eviction_policy<restkv::defensive_kv, restkv::maximum>{.budget = {.budget = 40}}, "neighbours");
  auto policy = presets::ada_kv(40);
  policy.budget.normalise = true;
  refused(policy, "more than a pool's best scores");
  policy = presets::ada_kv(40);
  policy.granularity.tokens = 8;
  for (const rank_outcome& outcome : select_on_ranks(policy, layer.view(), {0, 30, 70})) {
    check_error(outcome.result, errc::invalid_argument, {0, 30, 8}, "cut before its token");
  }
}

TEST_CASE("the ranks say as much as the documented sums") {
  random_engine random(5);
  constexpr std::uint64_t tokens = 100, window = 16, channels = 8, batch = 2, query_heads = 4, kv_heads = 2;
  const random_layer<float> layer(random, {.batch = 2, .group = 2, .head_dim = 8, .tokens = 100, .query_rows = 16});
  restkv::eviction_policy<restkv::rest_kv> policy{.window = 16};
  policy.budget.budget = 40;
  policy.protect.recent = 16;
  static_assert(tokens > 0);
  for (std::uint64_t ranks = 2; ranks <= 4; ++ranks) {
    CAPTURE(ranks);
    std::vector<index_t> cuts;
    for (std::uint64_t r = 0; r <= ranks; ++r) cuts.push_back(static_cast<index_t>(r * tokens / ranks));
    const auto said = [&](const auto& asked, token_sums sums) {
      const auto outcomes = select_on_ranks(asked, layer.view(), cuts, sums);
      for (const rank_outcome& outcome : outcomes) {
        REQUIRE(outcome.result.ok());
        REQUIRE(outcome.said == outcomes.front().said);
      }
      return outcomes.front().said;
    };
    for (const std::uint64_t outputs : {window, std::uint64_t{1}}) {
      policy.score.order = outputs > 1 ? restkv::query_order::before : restkv::query_order::after;
      // Attention; outputs and the top tokens' values; the pool and its heads' parts; cuts; candidates, and that all go
      // on.
      const std::uint64_t attention = 24 * window + 24 * outputs;
      const std::uint64_t sums = 8 * window + 8 * outputs * channels;
      const std::uint64_t heads = batch * query_heads;
      const distributed::call_count reduced{heads + batch * 9 + 8 + 2, heads * 8 * outputs * channels +
                                                                           batch * (8 * 2048 + 16 * kv_heads) +
                                                                           8 * 2048 * batch * kv_heads + 8 * batch + 8};
      const std::uint64_t halo = 2 * 8 * 2 * kv_heads;  // 2 scores of 8 bytes at both ends of each row
      CHECK(said(policy, token_sums::in_order) ==
            distributed::traffic{
                .all_reduce = reduced,
                .all_gather = {1 + 2 * heads + batch + 1, 32 + heads * attention + batch * halo + 8 * batch * kv_heads},
                .broadcast = {2 * heads * ranks, heads * ranks * sums}});
      CHECK(said(policy, token_sums::by_rank) ==
            distributed::traffic{.all_reduce = reduced,
                                 .all_gather = {1 + 4 * heads + batch + 1, 32 + heads * (attention + sums) +
                                                                               batch * halo + 8 * batch * kv_heads}});
    }
  }
}

TEST_CASE("a rank that fails at any call leaves nobody waiting") {
  random_engine random(6);
  const random_layer<float> layer(random, {.kv_heads = 1, .tokens = 60, .query_rows = 8});
  restkv::eviction_policy<restkv::rest_kv, restkv::mean, restkv::adaptive_window> policy{.window = 8};
  policy.budget.budget = 30;
  policy.protect.recent = 8;
  const std::vector<index_t> cuts{0, 20, 40, 60};
  const auto calls = static_cast<index_t>(select_on_ranks(policy, layer.view(), cuts)[0].said.calls());
  REQUIRE(calls > 50);
  for (index_t call = 0; call < calls; call += 1 + call / 16) {
    std::vector<rank_outcome> outcomes(3);
    on_ranks(3, [&](auto& communicator) {
      failing_communicator ranks(communicator, communicator.rank() == 2 ? call : 1000);
      outcomes[static_cast<std::size_t>(communicator.rank())] =
          select_part(policy, layer.view(), cuts, token_sums::in_order, ranks);
    });
    CAPTURE(call, calls);
    for (const rank_outcome& outcome : outcomes) {
      CHECK(outcome.result.code() == errc::communication_failure);
      CHECK(outcome.kept.empty());
    }
  }
}
