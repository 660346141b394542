// SPDX-License-Identifier: Apache-2.0
// A part chosen at run time behaves as the part it holds, alone and inside `select`.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/runtime_scores.hpp>
#include <restkv/select.hpp>

#include <string>
#include <vector>

using namespace restkv;
using restkv_test::normal;
using restkv_test::random_engine;

namespace {

/// One sequence, 4 query heads on 2 KV heads, 8 channels.
struct sample_layer {
  std::vector<float> query, key;
  layer_view<float> view;

  explicit sample_layer(random_engine& random, index_t tokens = 50, index_t queries = 8) {
    for (index_t i = 0; i < 4 * queries * 8; ++i) query.push_back(static_cast<float>(normal(random)));
    for (index_t i = 0; i < 2 * tokens * 8; ++i) key.push_back(static_cast<float>(normal(random)));
    view.query = {query.data(), {1, 4, queries, 8}};
    view.key = tensor_view<const float, 4>(key.data(), {1, 2, tokens, 8});
    view.value = view.key;
  }
};

/// Counts the calls of window_drift.
class counting_backend : public reference_backend {
 public:
  int drifts = 0;

  template <class Request, element T>
  status window_drift(const Request& request, const layer_view<T>& layer, std::span<const index_t> most_attended,
                      scratch<Request>& scratch, tensor_view<double, 2> out) {
    ++drifts;
    return reference_backend::window_drift(request, layer, most_attended, scratch, out);
  }
};
static_assert(tensor_backend<counting_backend>);

template <class Temporal, class Spatial, class Budget>
auto policy_of(Temporal temporal, Spatial spatial, Budget budget) {
  return eviction_policy<snap_kv, Temporal, Spatial, Budget>{
      .score = {},
      .window = 8,
      .temporal = temporal,
      .spatial = spatial,
      .group = group_reduce::mean,
      .budget = budget,
      .protect = {.sink = 0, .recent = 0}};
}

template <class Backend, class Policy>
std::vector<std::vector<position_t>> kept_by(Backend& backend, const Policy& policy, const layer_view<float>& layer) {
  owned_selection chosen;
  const status outcome = chosen.run(backend, policy, layer);
  INFO(outcome.message());
  REQUIRE(outcome.ok());
  std::vector<std::vector<position_t>> rows;
  for (index_t h = 0; h < chosen.kept().heads(); ++h) {
    const position_t* const first = &chosen.kept().positions(0, h, 0);
    rows.emplace_back(first, first + chosen.kept().lengths(0, h));
  }
  return rows;
}

}  // namespace

TEST_CASE("a policy of parts chosen at run time keeps what the policy of the same parts keeps") {
  random_engine random(7);
  const sample_layer layer(random);
  reference_backend backend;
  const auto compare = [&](auto temporal, auto spatial, auto budget) {
    const auto fixed = kept_by(backend, policy_of(temporal, spatial, budget), layer.view);
    const auto chosen = kept_by(
        backend, policy_of(any_temporal{temporal}, any_spatial{spatial}, any_budget{budget}), layer.view);
    CHECK(fixed == chosen);
    return fixed;
  };
  const auto first = compare(mean{}, no_pool{}, uniform{20});
  CHECK(compare(ema{.alpha = 0.6f}, no_pool{}, uniform{20}) != first);
  CHECK(compare(last{}, no_pool{}, uniform{20}) != first);
  CHECK(compare(sum{}, no_pool{}, uniform{20}) == first);  // the mean up to a factor
  CHECK(compare(mean{}, average_pool{.width = 3}, uniform{20}) != first);
  CHECK(compare(mean{}, max_pool{.width = 3}, uniform{20}) != first);
  CHECK(compare(mean{}, adaptive_window{.min_width = 3, .scale = 2}, uniform{20}) != first);
  CHECK(compare(mean{}, no_pool{}, ada_kv{.budget = 20, .floor = 0}) != first);
  CHECK(compare(mean{}, no_pool{}, pyramid{.budget = 20}) == first);  // one layer alone gets the uniform share
}

TEST_CASE("the drift is computed only for a smoother that uses it") {
  random_engine random(8);
  const sample_layer layer(random);
  counting_backend backend;
  kept_by(backend, policy_of(mean{}, any_spatial{average_pool{}}, uniform{20}), layer.view);
  kept_by(backend, policy_of(mean{}, no_pool{}, uniform{20}), layer.view);
  CHECK(backend.drifts == 0);
  kept_by(backend, policy_of(mean{}, any_spatial{adaptive_window{}}, uniform{20}), layer.view);
  CHECK(backend.drifts == 1);
  kept_by(backend, policy_of(mean{}, adaptive_window{}, uniform{20}), layer.view);
  CHECK(backend.drifts == 2);
}

TEST_CASE("a part chosen at run time reports the parameters of the part it holds") {
  CHECK(any_temporal{}.check().ok());
  CHECK(any_spatial{}.check().ok());
  CHECK(any_budget{}.check().ok());
  CHECK(std::string(any_temporal{ema{.alpha = 2.0f}}.check().message()) ==
        "ema.alpha is 2, must be above 0 and at most 1");
  CHECK(std::string(any_spatial{max_pool{.width = 4}}.check().message()) ==
        "max_pool.width is 4, must be odd and at least 1");
  CHECK(std::string(any_budget{ada_kv{.budget = 8, .floor = 3.0f}}.check().message()) ==
        "ada_kv.floor is 3, must be within [0, 1]");
  const token_reach reach = any_spatial{average_pool{.width = 7}}.reach({});
  CHECK(reach.first == -3);
  CHECK(reach.last == 3);
}

TEST_CASE("a budget chosen at run time divides as the allocator it holds") {
  const std::vector<float> importance{3, 1, 2, 2};
  const std::vector<budget_size> sizes{5, 9, 7, budget_size::keep_ratio(0.5)};
  const std::vector<std::uint8_t> retrieves{1, 0, 0, 1};
  const auto same = [](const auto& fixed) {
    const any_budget chosen{.choice = fixed};
    for (index_t layer = 0; layer < 2; ++layer) {
      const budget_problem problem{.heads = 2, .length = 20, .candidates = 18, .layer = layer, .layers = 2};
      CHECK(chosen.tokens_per_head(problem) == fixed.tokens_per_head(problem));
      CHECK(chosen.most_per_head(problem) == fixed.most_per_head(problem));
      CHECK(chosen.deciding_keys(problem) == fixed.deciding_keys(problem));
      CHECK(chosen.chosen_in_layer(problem) == chosen_in_layer(fixed, problem));
      CHECK(chosen.check(problem).ok());
      std::vector<std::uint32_t> keys(40, 1);
      const tensor_view<const std::uint32_t, 2> view(keys.data(), {2, 20});
      std::vector<index_t> got(2), wanted(2);
      std::vector<double> scratch(2);
      chosen.allocate(problem, view, got, scratch);
      fixed.allocate(problem, view, wanted, scratch);
      CHECK(got == wanted);
    }
    CHECK(!chosen.check(budget_problem{.heads = 2, .length = 20, .candidates = 18, .layer = 2, .layers = 3}).ok());
  };
  same(head_kv{.budget = 8, .importance = {{importance.data(), {2, 2}}}});
  same(budget_table{.budgets = {{sizes.data(), {2, 2}}}});
  same(duo_attention{.retrieval_heads = {{retrieves.data(), {2, 2}}}});
}

TEST_CASE("a head score chosen at run time scores as the score it holds") {
  random_engine random(9);
  const sample_layer layer(random);
  const problem_shape shape = shape_of(layer.view);
  const auto same = [&](const auto& chosen, const auto& score) {
    const index_t elements = scratch_size_of(score, shape);
    CHECK(scratch_size_of(chosen, shape) == elements);
    for (index_t head = 0; head < 4; ++head) {
      const head_view<float> view(layer.view, shape, 0, head);
      std::vector<float> scratch(static_cast<std::size_t>(elements));
      std::vector<float> wanted(50), got(50, -7.0f);
      score.score_head(view, std::span<float>(wanted), std::span<float>(scratch));
      chosen.score_head(view, std::span<float>(got), std::span<float>(scratch));
      CHECK(got == wanted);
    }
  };
  const auto of_kv_head = [&](const auto& score) { same(any_head_score{{.choice = score}}, score); };
  of_kv_head(knorm{});
  of_kv_head(key_diff{});
  of_kv_head(lag_kv{.sink = 2, .lag = 8});
  of_kv_head(cur_dkv{});
  of_kv_head(leverage_score{.sketch = 4});
  of_kv_head(key_redundancy{});
  of_kv_head(value_range{});
  std::vector<float> filters(2 * 8, 0.5f);
  of_kv_head(q_filter{.filters = {filters.data(), {2, 8}}});
  std::vector<double> mean_query(4 * 8, 0.25);
  const tensor_view<const double, 3> mean_view(mean_query.data(), {1, 4, 8});
  const cap_kv cap{.mean = mean_view};
  same(any_query_head_score{{.choice = cap}}, cap);
  const expected_attention expected{.mean = mean_view, .use_covariance = false};
  same(any_query_head_score{{.choice = expected}}, expected);

  CHECK(std::string(any_head_score{{.choice = lag_kv{.lag = 0}}}.check().message()) ==
        "lag of lag_kv is 0, must be within [1, 2147483647]");
  CHECK(std::string(any_head_score{{.choice = q_filter{}}}.check(shape).message()) == "q_filter has no filters");
  CHECK(any_head_score{}.check().ok());
  CHECK(any_head_score{}.check(shape).ok());
  CHECK(!any_query_head_score{}.check(shape).ok());  // no mean
}
