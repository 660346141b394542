// SPDX-License-Identifier: Apache-2.0
// Parts that a user wrote, on both backends: each does what its own few lines say.
#include "policy/selection_support.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>

using namespace restkv_test;
using restkv::budget_problem;
using restkv::eigen_backend;
using restkv::errc;
using restkv::feature;
using restkv::reference_backend;
using restkv::token_features;

namespace {

/// Tokens with short keys and long values, the older the better.
struct key_and_value_norm {
  static constexpr feature needs = feature::key_norm | feature::value_norm;

  template <std::floating_point Real>
  Real operator()(const token_features<Real>& token) const {
    return token.value_norm / (token.key_norm + Real(1e-3)) / static_cast<Real>(1 + token.position);
  }
};

/// The attention's square: needs a window and nothing else.
struct squared_attention {
  static constexpr feature needs = feature::attention;

  template <std::floating_point Real>
  Real operator()(const token_features<Real>& token) const {
    return token.attention * token.attention;
  }
};

/// The mean of the largest and the smallest row: no weighted sum.
struct midrange {
  template <std::floating_point Real>
  Real operator()(std::span<const Real> rows) const {
    const auto [smallest, largest] = std::minmax_element(rows.begin(), rows.end());
    return (*smallest + *largest) / 2;
  }
};

/// Each token with its right neighbour's score: moves everything by one.
struct next_token {
  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const restkv::row_context&) const {
    for (std::size_t n = 0; n < in.size(); ++n) out[n] = in[std::min(n + 1, in.size() - 1)];
  }
};

/// Two budgets in turn: even heads get `step` tokens more than the mean, odd heads fewer.
struct alternating {
  index_t tokens = 30;
  index_t step = 4;
  index_t promised = 34;  ///< what most_per_head says

  index_t tokens_per_head(const budget_problem& problem) const { return std::min(tokens, problem.length); }
  index_t most_per_head(const budget_problem& problem) const { return std::min(promised, problem.length); }
  template <std::unsigned_integral Key>
  void allocate(const budget_problem& problem, tensor_view<const Key, 2>, std::span<index_t> counts,
                std::span<double>) const {
    const index_t mean = tokens_per_head(problem) - problem.protected_tokens();
    for (std::size_t h = 0; h < counts.size(); ++h) counts[h] = mean + (h % 2 == 0 ? step : -step);
  }
};

/// Two sequences of 60 tokens.
const layer_recipe recipe{.batch = 2, .kv_heads = 2, .group = 2, .tokens = 60, .query_rows = 8};

template <class Real>
double norm_of(const tensor_view<Real, 1>& row) {
  double sum = 0;
  for (index_t c = 0; c < row.extent(0); ++c) sum += static_cast<double>(row(c)) * static_cast<double>(row(c));
  return std::sqrt(sum);
}

/// A selection with its details.
template <class Backend, class Policy>
struct detailed {
  restkv::plan<Policy> plan;
  guarded_workspace memory;
  details_memory<typename Backend::score_type> details;
  kept_tokens kept;
  status outcome;

  detailed(random_engine& random, Backend& backend, const Policy& policy, const layer_view<float>& layer)
      : plan(restkv::make_plan(backend, policy, restkv::shape_of(layer))),
        memory(random, plan.workspace_bytes),
        details(plan),
        outcome(restkv::select(backend, plan, layer, memory.space(), kept, &details.view)) {}
};

}  // namespace

TEMPLATE_TEST_CASE("a score of one's own gets the features it asked for", "", reference_backend, eigen_backend) {
  random_engine random(1);
  TestType backend;
  const random_layer<float> layer(random, recipe);
  const auto policy = eviction_policy{.score = key_and_value_norm{},
                                      .spatial = restkv::no_pool{},
                                      .group = restkv::group_reduce::max,
                                      .budget = restkv::uniform{20},
                                      .protect = {.sink = 1, .recent = 2}};
  detailed run(random, backend, policy, layer.view());
  REQUIRE(run.outcome.ok());
  check_selection(run.plan, layer.view(), run.kept, run.details.view.smoothed);
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t n = 0; n < 60; ++n) {  // no window: all tokens have a score
        const double expected = norm_of(layer.value.view()[b][h][n]) / (norm_of(layer.key.view()[b][h][n]) + 1e-3) /
                                static_cast<double>(1 + n);
        CHECK(static_cast<double>(run.details.view.score(b, h, n)) == Approx(expected).epsilon(1e-5));
      }
    }
  }
}

TEMPLATE_TEST_CASE("smoothers of one's own see the rows they should", "", reference_backend, eigen_backend) {
  random_engine random(2);
  TestType backend;
  const random_layer<float> layer(random, recipe);
  constexpr index_t window = 8;
  const auto policy = eviction_policy{.score = squared_attention{},
                                      .window = window,
                                      .temporal = midrange{},
                                      .spatial = next_token{},
                                      .group = restkv::group_reduce::sum,
                                      .budget = restkv::uniform{20}};
  auto narrow = policy;
  narrow.protect = {.sink = 0, .recent = 0};
  detailed run(random, backend, narrow, layer.view());
  REQUIRE(run.outcome.ok());
  check_selection(run.plan, layer.view(), run.kept, run.details.view.smoothed);
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 2; ++h) {
      std::vector<double> expected(52);
      for (index_t j = 0; j < 2; ++j) {
        std::vector<double> smallest(52, 2), largest(52, -1);
        for (index_t i = 0; i < window; ++i) {
          const auto row = restkv::reference::window_attention(layer.view(), b, 2 * h + j, window, i);
          for (std::size_t n = 0; n < 52; ++n) {
            smallest[n] = std::min(smallest[n], row.share[n] * row.share[n]);
            largest[n] = std::max(largest[n], row.share[n] * row.share[n]);
          }
        }
        for (std::size_t n = 0; n < 52; ++n) expected[n] += (smallest[n] + largest[n]) / 2;
      }
      for (index_t n = 0; n < 52; ++n) {
        const auto i = static_cast<std::size_t>(n);
        CHECK(static_cast<double>(run.details.view.score(b, h, n)) == Approx(expected[i]).epsilon(1e-5));
        CHECK(run.details.view.smoothed(b, h, n) == run.details.view.score(b, h, std::min<index_t>(n + 1, 51)));
      }
    }
  }
}

TEMPLATE_TEST_CASE("an allocator of one's own decides how many each head keeps", "", reference_backend, eigen_backend) {
  random_engine random(3);
  TestType backend;
  const random_layer<float> layer(random, recipe);
  auto policy = eviction_policy{.score = key_and_value_norm{},
                                .spatial = restkv::no_pool{},
                                .group = restkv::group_reduce::none,
                                .budget = alternating{},
                                .protect = {.sink = 1, .recent = 2}};
  const auto run_with = [&](const alternating& budget) {
    policy.budget = budget;
    return detailed(random, backend, policy, layer.view());
  };
  const auto good = run_with({});
  INFO(good.outcome.message());
  REQUIRE(good.outcome.ok());
  check_selection(good.plan, layer.view(), good.kept, good.details.view.smoothed);
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 4; ++h) CHECK(good.kept.lengths(b, h) == (h % 2 == 0 ? 34 : 26));
  }
  // More than it promised, and fewer than none: named, nothing written.
  const auto greedy = run_with({.promised = 33});
  check_error(greedy.outcome, errc::invalid_argument, {0, 31, 30}, "allocator");  // 33 less 3 protected
  CHECK(greedy.kept.positions.data == nullptr);
  const auto negative = run_with({.step = 28, .promised = 60});
  check_error(negative.outcome, errc::invalid_argument, {1, 0, -1}, "allocator");
  CHECK(negative.kept.positions.data == nullptr);
  const auto beyond = run_with({.step = 40, .promised = 1000});  // more than the sequence has
  check_error(beyond.outcome, errc::invalid_argument, {0, 67, 57}, "allocator");
}
