// SPDX-License-Identifier: Apache-2.0 Pages, chunks and shared sets through `select`, against a model that knows
// nothing but the smoothed scores: whole units, exact totals, what is protected, heads of different lengths.
#include "policy/selection_support.hpp"

#include <restkv/reference/backend.hpp>

#include <numeric>
#include <set>

using namespace restkv_test;
using restkv::ada_kv;
using restkv::budget_size;
using restkv::errc;
using restkv::group_reduce;
using restkv::reference_backend;
using restkv::uniform;
using restkv::unit_reduce;

namespace {

using page_policy = eviction_policy<restkv::snap_kv, restkv::mean, restkv::average_pool, restkv::any_budget>;

/// A layer whose KV heads have lengths of their own where asked.
struct page_layer : random_layer<float> {
  std::vector<std::int32_t> head_lengths;

  page_layer(random_engine& random, const layer_recipe& recipe, bool ragged) : random_layer<float>(random, recipe) {
    if (!ragged) return;
    for (index_t i = 0; i < recipe.batch * recipe.kv_heads; ++i) {
      head_lengths.push_back(
          static_cast<std::int32_t>(chance(random, 20) ? recipe.tokens : pick(random, 0, recipe.tokens)));
    }
    view().head_lengths = {head_lengths.data(), {recipe.batch, recipe.kv_heads}};
    view().lengths = {};
  }
};

/// One row as the model sees it: its units, which of them are candidates, and their scores.
struct row_model {
  restkv::sequence_span span;
  index_t units = 0;
  std::vector<bool> candidate;
  std::vector<double> score;

  row_model(const page_policy& policy, const layer_view<float>& layer, index_t b, index_t kv_head,
            const tensor_view<double, 1>& smoothed)
      : span(restkv::sequence(layer, b, kv_head)) {
    const index_t size = policy.granularity.tokens;
    for (index_t first = 0; first < span.length; first += size) {
      bool fixed = first + size > span.length;
      double reduced = 0;
      std::vector<double> scores;
      for (index_t n = first; n < std::min(first + size, span.length); ++n) {
        fixed = fixed || n < policy.protect.sink || n >= span.length - std::max(policy.window, policy.protect.recent);
        if (layer.keep_mask.data != nullptr) fixed = fixed || layer.keep_mask(b, span.begin + n) != 0;
        scores.push_back(smoothed(n));
      }
      if (!fixed) {
        reduced = policy.granularity.reduce == unit_reduce::maximum
                      ? *std::max_element(scores.begin(), scores.end())
                      : std::accumulate(scores.begin(), scores.end(), 0.0) / static_cast<double>(size);
      }
      candidate.push_back(!fixed);
      score.push_back(reduced);
      ++units;
    }
  }
  [[nodiscard]] index_t candidates() const { return std::count(candidate.begin(), candidate.end(), true); }
};

/// The rows of one sequence, and which units they keep.
struct sequence_model {
  std::vector<row_model> rows;
  std::vector<std::set<index_t>> kept;
  index_t wanted = 0;  ///< candidates that all rows keep

  sequence_model(const page_policy& policy, std::vector<row_model> made) : rows(std::move(made)), kept(rows.size()) {
    const auto longest = std::max_element(rows.begin(), rows.end(),
                                          [](const auto& a, const auto& b) { return a.span.length < b.span.length; });
    const auto tokens_of = [](const auto& part) -> index_t {
      if constexpr (requires { part.budget.tokens; }) return part.budget.tokens;
      return 0;  // tables of the model are tested elsewhere
    };
    const index_t budget = std::visit(tokens_of, policy.budget.choice) / policy.granularity.tokens;
    const bool everything = longest->units <= budget;
    const index_t share =
        std::clamp<index_t>(budget - (longest->units - longest->candidates()), 0, longest->candidates());
    std::vector<std::tuple<double, std::size_t, index_t>> order;  // best first, ties to the smaller row and unit
    for (std::size_t r = 0; r < rows.size(); ++r) {
      for (index_t u = 0; u < rows[r].units; ++u) {
        if (rows[r].candidate[static_cast<std::size_t>(u)]) {
          order.emplace_back(-rows[r].score[static_cast<std::size_t>(u)], r, u);
        } else {
          kept[r].insert(u);
        }
      }
    }
    std::sort(order.begin(), order.end());
    const bool competing = std::holds_alternative<ada_kv>(policy.budget.choice);
    std::vector<index_t> left(rows.size(), everything ? longest->units : share);
    index_t left_together = everything ? static_cast<index_t>(order.size())
                                       : share * static_cast<index_t>(rows.size());
    for (const auto& [score, r, u] : order) {
      index_t& allowed = competing ? left_together : left[r];
      if (allowed == 0) continue;
      --allowed;
      kept[r].insert(u);
      ++wanted;
    }
  }
};

page_policy random_page_policy(random_engine& random, index_t tokens) {
  page_policy policy;
  policy.window = pick(random, 1, 8);
  policy.protect = {.sink = pick(random, 0, 5), .recent = pick(random, 0, 10)};
  policy.spatial.width = chance(random, 50) ? 1 : 3;
  policy.granularity = {.tokens = pick(random, 1, 9),
                        .reduce = chance(random, 50) ? unit_reduce::mean : unit_reduce::maximum};
  constexpr group_reduce groups[] = {group_reduce::none, group_reduce::mean, group_reduce::max, group_reduce::sum,
                                     group_reduce::l2};
  policy.group = groups[pick(random, 0, 4)];
  if (policy.group != group_reduce::none) policy.granularity.shared = chance(random, 30);
  const budget_size size(pick(random, 20, tokens + 10));
  if (chance(random, 50)) {
    policy.budget.choice = uniform{size};
  } else {
    policy.budget.choice = ada_kv{.budget = size, .floor = 0};
  }
  return policy;
}

/// Selects, and compares with the model. Returns false where the plan or the selection refused.
bool check_against_model(const page_policy& policy, const layer_view<float>& layer, index_t& evicted) {
  reference_backend backend;
  restkv::plan<page_policy> plan;
  if (!restkv::make_plan(backend, policy, restkv::shape_of(layer), plan).ok()) return false;
  std::vector<std::byte> memory(plan.workspace_bytes);
  details_memory<double> details(plan);
  kept_tokens kept;
  const status outcome = restkv::select(backend, plan, layer, restkv::workspace(memory), kept, &details.view);
  if (!outcome.ok()) return false;
  REQUIRE(restkv::check_kept(kept, plan.shape.batch, plan.shape.kv_heads, layer.key.extent(2)).ok());
  // Without details nothing may change.
  kept_tokens again;
  std::vector<std::byte> more(plan.workspace_bytes);
  REQUIRE(restkv::select(backend, plan, layer, restkv::workspace(more), again).ok());
  for (index_t b = 0; b < plan.shape.batch; ++b) {
    std::vector<row_model> rows;
    for (index_t r = 0; r < plan.rows; ++r) {
      rows.emplace_back(policy, layer, b, r * plan.shape.kv_heads / plan.heads, details.view.smoothed[b][r]);
    }
    const sequence_model model(policy, rows);
    for (index_t h = 0; h < plan.heads; ++h) {
      const auto r = static_cast<std::size_t>(h * plan.rows / plan.heads);
      std::vector<index_t> expected;
      for (const index_t u : model.kept[r]) {
        for (index_t n = u * policy.granularity.tokens;
             n < std::min((u + 1) * policy.granularity.tokens, model.rows[r].span.length); ++n) {
          expected.push_back(n);
        }
      }
      CAPTURE(b, h, policy.granularity.tokens, policy.granularity.shared, model.rows[r].span.length, model.wanted);
      CHECK(kept_of(kept, b, h, model.rows[r].span.begin) == expected);
      CHECK(kept_of(again, b, h) == kept_of(kept, b, h));
      evicted += model.rows[r].span.length - std::ssize(expected);
    }
  }
  return true;
}

}  // namespace

TEST_CASE("pages and chunks against a model of whole units") {
  random_engine random(1);
  index_t compared = 0;
  index_t evicted = 0;
  for (int trial = 0; trial < 400; ++trial) {
    layer_recipe recipe = random_recipe(random, 90);
    recipe.hidden = 0;
    recipe.strided = false;
    recipe.query_rows = recipe.tokens;
    const page_layer layer(random, recipe, false);
    CAPTURE(trial);
    compared += check_against_model(random_page_policy(random, recipe.tokens), layer.view(), evicted) ? 1 : 0;
  }
  CHECK(compared > 150);
  CHECK(evicted > 1000);
}

TEST_CASE("pages of a cache whose heads have lengths of their own") {
  random_engine random(2);
  index_t compared = 0;
  index_t evicted = 0;
  for (int trial = 0; trial < 400; ++trial) {
    layer_recipe recipe = random_recipe(random, 90);
    recipe.kv_heads = pick(random, 2, 4);
    recipe.hidden = 0;
    recipe.strided = false;
    recipe.query_rows = 16;
    recipe.padded = false;
    recipe.masked_percent = 0;
    const page_layer layer(random, recipe, true);
    page_policy policy = random_page_policy(random, recipe.tokens);
    policy.granularity.shared = false;
    CAPTURE(trial);
    compared += check_against_model(policy, layer.view(), evicted) ? 1 : 0;
  }
  CHECK(compared > 150);
  CHECK(evicted > 1000);
}

TEST_CASE("ChunkKV: the chunks with the largest attention are kept whole") {
  random_engine random(3);
  const random_layer<float> layer(random, {.kv_heads = 1, .group = 2, .tokens = 100, .hidden = 0});
  reference_backend backend;
  page_policy policy{.window = 8,
                     .spatial = {.width = 1},
                     .group = group_reduce::sum,
                     .budget = {uniform{budget_size(10 + 8 + 30)}},
                     .protect = {.sink = 0, .recent = 0},
                     .granularity = {.tokens = 10}};
  const auto kept = restkv::select(backend, policy, layer.view());
  // The window touches the last chunk alone; 3 of the 9 others fit.
  std::vector<std::pair<double, index_t>> mass(9);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 8; ++i) {
      const auto row = restkv::reference::window_attention(layer.view(), 0, h, 8, i);
      for (index_t n = 0; n < 90; ++n) {
        mass[static_cast<std::size_t>(n / 10)].first -= row.share[static_cast<std::size_t>(n)];
        mass[static_cast<std::size_t>(n / 10)].second = n / 10;
      }
    }
  }
  std::sort(mass.begin(), mass.end());
  std::set<index_t> chunks{9};
  for (std::size_t i = 0; i < 3; ++i) chunks.insert(mass[i].second);
  std::vector<index_t> expected;
  for (const index_t chunk : chunks) {
    for (index_t n = 0; n < 10; ++n) expected.push_back(chunk * 10 + n);
  }
  CHECK(kept_of(kept.kept(), 0, 0) == expected);
}

TEST_CASE("shared sets are equal in every head and follow the scores of all heads together") {
  random_engine random(4);
  reference_backend backend;
  for (const group_reduce group : {group_reduce::mean, group_reduce::max, group_reduce::sum, group_reduce::l2}) {
    const random_layer<float> layer(random, {.batch = 2, .kv_heads = 3, .group = 2, .tokens = 80, .hidden = 0});
    page_policy policy{.window = 4, .spatial = {.width = 1}, .group = group, .budget = {uniform{30}},
                       .protect = {.sink = 2, .recent = 4}};
    const auto scores_of = [&](bool shared) {
      policy.granularity.shared = shared;
      const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer.view()));
      std::vector<std::byte> memory(plan.workspace_bytes);
      details_memory<double> details(plan);
      kept_tokens kept;
      REQUIRE(restkv::select(backend, plan, layer.view(), restkv::workspace(memory), kept, &details.view).ok());
      for (index_t b = 0; shared && b < 2; ++b) {
        CHECK(kept_of(kept, b, 1) == kept_of(kept, b, 0));
        CHECK(kept_of(kept, b, 2) == kept_of(kept, b, 0));
        CHECK(kept.lengths(b, 0) == 30);
      }
      return details.scores;
    };
    const auto apart = scores_of(false);
    const auto together = scores_of(true);
    for (std::size_t b = 0; b < 2; ++b) {
      for (std::size_t n = 0; n < 76; ++n) {
        double sum = 0, most = 0, squares = 0;
        for (std::size_t h = 0; h < 3; ++h) {
          const double score = apart[(b * 3 + h) * 80 + n];
          sum += score;
          most = std::max(most, score);
          squares += score * score;
        }
        const double expected = group == group_reduce::mean ? sum / 3 : group == group_reduce::sum ? sum
                                : group == group_reduce::max ? most : std::sqrt(squares);
        for (std::size_t h = 0; h < 3; ++h) CHECK(together[(b * 3 + h) * 80 + n] == Approx(expected).epsilon(1e-12));
      }
    }
  }
}

TEST_CASE("what does not go together is refused with both numbers") {
  random_engine random(5);
  reference_backend backend;
  layer_recipe recipe{.kv_heads = 2, .tokens = 40, .hidden = 0, .masked_percent = 10};
  page_layer layer(random, recipe, true);
  page_policy policy{.window = 4, .budget = {uniform{20}}, .granularity = {.tokens = 4}};
  policy.protect = {.sink = 0, .recent = 4};
  const auto outcome_of = [&](const layer_view<float>& view) {
    restkv::owned_selection chosen;
    return chosen.run(backend, policy, view);
  };
  check_error(outcome_of(layer.view()), errc::invalid_argument, {}, "keep_mask");
  layer.view().keep_mask = {};
  CHECK(outcome_of(layer.view()).ok());
  policy.granularity.shared = true;
  layer.head_lengths = {40, 31};
  check_error(outcome_of(layer.view()), errc::invalid_argument, {40, 31}, "share");
  policy.granularity = {.tokens = 0};
  check_error(outcome_of(layer.view()), errc::invalid_argument, {0, 1}, "granularity.tokens");
  // A page with a protected token is protected whole: 2 sinks and the last 4 tokens take 8, 3 pages hold 12.
  policy.granularity = {.tokens = 4};
  policy.protect.sink = 2;
  policy.budget.choice = uniform{7};
  layer.view().head_lengths = {};
  check_error(outcome_of(layer.view()), errc::invalid_argument, {1, 2}, "chunks or pages");
}
