// SPDX-License-Identifier: Apache-2.0
// Certified pruning on the kernels: the kept set is the one that scoring every token gives, and few tokens are scored.
#include "support/catch.hpp"
#include "support/damaged_places.hpp"
#include "support/random_layer.hpp"
#include "support/selection_outcome.hpp"
#include "support/test_data.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/score/rest_kv.hpp>
#include <restkv/select.hpp>

using namespace restkv;
using namespace restkv_test;

static_assert(bounding_backend<host_kernel_backend, score_request<rest_kv, mean>>);

namespace {

/// Counts the tokens that pruning had scored.
class counting_backend : public host_kernel_backend {
 public:
  using host_kernel_backend::host_kernel_backend;

  template <class Request, element T>
  [[nodiscard]] status exact_scores(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                                    tensor_view<token_state, 3> states, tensor_view<float, 3> out) {
    ++rounds;
    for (index_t i = 0; i < states.size(); ++i) scored += states.data[i] == token_state::wanted ? 1 : 0;
    return host_kernel_backend::exact_scores(request, layer, scratch, states, out);
  }

  index_t rounds = 0;
  index_t scored = 0;
};

/// Nothing but what a smoother reads.
struct reaching {
  token_reach tokens;
  [[nodiscard]] token_reach reach(const row_context&) const noexcept { return tokens; }
};

/// Every part may be chosen at run time, so that this compiles once.
using any_policy = eviction_policy<rest_kv, any_temporal, any_spatial, any_budget>;

const kernel_tuning always{.least_pruned_tokens = 0};
const kernel_tuning never{.pruning = false};

any_policy random_policy(random_engine& random, index_t tokens) {
  any_policy policy;
  policy.score.order = chance(random, 50) ? query_order::before : query_order::after;
  policy.score.metric_of_distance = chance(random, 70) ? metric::projection : metric::identity;
  policy.score.tau = chance(random, 30) ? 2.0f : 1.0f;
  policy.score.normalised = chance(random, 30);
  policy.window = pick(random, 1, 16);
  switch (pick(random, 0, policy.score.order == query_order::before ? 5 : 3)) {
    case 0:
      policy.temporal.choice = mean{};
      break;
    case 1:
      policy.temporal.choice = ema{.alpha = 0.3f};
      break;
    case 2:
      policy.temporal.choice = last{};
      break;
    case 3:
      policy.temporal.choice = maximum{};
      break;
    case 4:
      policy.temporal.choice = root_sum_square{};
      break;
    default:
      policy.temporal.choice = sum{};
      break;
  }
  policy.group = static_cast<group_reduce>(pick(random, 0, 4));
  switch (pick(random, 0, 3)) {
    case 0:
      policy.spatial.choice = no_pool{};
      break;
    case 1:
      policy.spatial.choice = average_pool{static_cast<int>(2 * pick(random, 0, 5) + 1)};
      break;
    case 2:
      policy.spatial.choice = max_pool{static_cast<int>(2 * pick(random, 0, 5) + 1)};
      break;
    default:
      policy.spatial.choice = adaptive_window{5, static_cast<float>(pick(random, 1, 60)) / 4};
      break;
  }
  policy.protect = {.sink = pick(random, 0, 4), .recent = pick(random, 0, 20)};
  const index_t least = policy.protect.sink + std::max(policy.window, policy.protect.recent);
  const index_t budget = pick(random, least, least + tokens / 2);
  switch (pick(random, 0, 2)) {
    case 0:
      policy.budget.choice = uniform{budget};
      break;
    case 1:
      policy.budget.choice = pyramid{budget};
      break;
    default:
      policy.budget.choice = ada_kv{.budget = budget, .floor = static_cast<float>(uniform_real(random, 0.0, 1.0))};
      break;
  }
  return policy;
}

/// Selects with and without pruning; true when pruning ran.
template <class Policy, class T>
bool check_same(const Policy& policy, const layer_view<T>& layer, bool must_succeed = true, bool record = false) {
  kernel::conflict_recorder recorder;
  counting_backend pruned(kernel::host_executor(5, record ? &recorder : nullptr), always);
  host_kernel_backend complete(kernel::host_executor(9), never);
  const auto a = select_tokens(pruned, policy, layer, false);
  const auto b = select_tokens(complete, policy, layer, false);
  INFO(a.result.message());
  INFO(b.result.message());
  CHECK(a.result.code() == b.result.code());
  if (must_succeed) CHECK(a.result.ok());
  CHECK(a.kept == b.kept);
  CHECK(recorder.conflicts().empty());
  return pruned.rounds > 0;
}

/// What a backend makes of a request: `score_bounds`, or the scores. [batch, heads, tokens]
template <bool Bounds, class Policy>
std::vector<float> scores_of(const Policy& policy, const layer_view<float>& layer) {
  host_kernel_backend backend(kernel::host_executor(3), always);
  const auto request = make_score_request(policy, shape_of(layer));
  using scratch_t = host_kernel_backend::scratch<score_request_of<Policy>>;
  workspace counting;
  { const scratch_t counted(backend, request, counting); }
  std::vector<std::byte> memory(counting.required_bytes(), std::byte{0xff});
  workspace real(memory.data(), memory.size());
  scratch_t scratch(backend, request, real);
  const index_t rows = request.shape.batch * request.heads();
  std::vector<float> scores(static_cast<std::size_t>(rows * request.shape.tokens), not_a_number);
  const tensor_view<float, 3> out(scores.data(), {request.shape.batch, request.heads(), request.shape.tokens});
  if constexpr (Bounds) {
    REQUIRE(backend.score_bounds(request, layer, scratch, out).ok());
  } else {
    REQUIRE(backend.token_scores(request, layer, scratch, out).ok());
  }
  return scores;
}

/// No score passes its bound.
void check_bounds(const any_policy& policy, const layer_view<float>& layer) {
  const host_kernel_backend backend(kernel::host_executor(3), always);
  if (!backend.bounds_pay(make_score_request(policy, shape_of(layer)))) return;
  const std::vector<float> bounds = scores_of<true>(policy, layer);
  const std::vector<float> scores = scores_of<false>(policy, layer);
  index_t broken = 0;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    // Neither where there is no score, nor where it is not a number.
    if (scores[i] == scores[i] && !(bounds[i] >= scores[i])) ++broken;
  }
  CHECK(broken == 0);
}

template <class T>
void check_random_policies(unsigned seed, int cases) {
  random_engine random(seed);
  int pruned = 0;
  for (int i = 0; i < cases; ++i) {
    layer_recipe recipe;
    recipe.batch = pick(random, 1, 2);
    recipe.group = pick(random, 1, 4);
    recipe.head_dim = 8 * pick(random, 1, 4);
    recipe.tokens = pick(random, 20, 250);
    recipe.hidden = chance(random, 30) ? recipe.head_dim / 2 : 48;  // singular metrics, too
    recipe.sharpness = uniform_real(random, 0.0, 6.0);
    recipe.padded = chance(random, 30);
    recipe.masked_percent = chance(random, 30) ? 5 : 0;
    recipe.strided = chance(random, 20);
    random_layer<T> layer(random, recipe);
    std::vector<std::int32_t> lengths;
    if (!recipe.padded && recipe.masked_percent == 0 && chance(random, 30)) {
      for (index_t h = 0; h < 2 * recipe.batch; ++h) {
        lengths.push_back(static_cast<std::int32_t>(pick(random, recipe.tokens / 2, recipe.tokens)));
      }
      layer.view().head_lengths = {lengths.data(), {recipe.batch, 2}};
    }
    const auto policy = random_policy(random, recipe.tokens);
    CAPTURE(i, recipe.tokens, policy.window, static_cast<int>(policy.group), static_cast<int>(policy.score.order));
    pruned += check_same(policy, layer.view(), false, i % 8 == 0) ? 1 : 0;
  }
  CHECK(pruned > cases / 2);
}

}  // namespace

TEST_CASE("on the kernels pruning changes no kept set", "[kernel]") { check_random_policies<float>(1, 140); }

TEST_CASE("on the kernels pruning changes no kept set when everything ties, or nothing is a number", "[kernel]") {
  random_engine random(3);
  const layer_recipe recipe{.head_dim = 16, .tokens = 300, .query_rows = 32};
  const auto flatten = [](auto& tensor) { for_each(tensor.view(), [](float& x) { x = 0.25f; }); };
  for (int i = 0; i < 8; ++i) {
    auto policy = random_policy(random, recipe.tokens);
    policy.score.order = i % 2 == 0 ? query_order::before : query_order::after;
    CAPTURE(i);
    random_layer<float> same_keys(random, recipe);
    flatten(same_keys.key);
    check_same(policy, same_keys.view(), false);
    random_layer<float> same_values(random, recipe);
    flatten(same_values.value);
    check_same(policy, same_values.view(), false);
    flatten(same_values.key);
    check_same(policy, same_values.view(), false);
    // A sink that holds nearly all attention: the centre of the outputs is its value.
    random_layer<float> sink(random, recipe);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t c = 0; c < 16; ++c) sink.key.view()(0, h, 0, c) = 40.0f * sink.query.view()(0, 2 * h, 15, c);
    }
    check_same(policy, sink.view(), false);
  }
}

TEST_CASE("on the kernels pruning survives damaged numbers, wherever they lie", "[kernel]") {
  random_engine random(4);
  for (const place& where : places) {
    for (const float bad : {not_a_number, infinity, -infinity, 3e38f}) {
      for (int i = 0; i < 2; ++i) {
        arranged_layer<float> layer(damaged_sizes, 7);
        const output_metric metric = attach_metric(layer);
        where.damage(layer, bad);
        auto policy = random_policy(random, damaged_sizes.tokens);
        policy.window = damaged_window;
        CAPTURE(where.name, bad, i);
        check_same(policy, layer.view(), false);
        check_bounds(policy, layer.view());
      }
    }
  }
}

TEST_CASE("on the kernels no score passes its bound, whatever the numbers", "[kernel]") {
  random_engine random(6);
  const layer_sizes sizes{.query_heads = 4, .kv_heads = 2, .head_dim = 32, .tokens = 130, .queries = 16, .hidden = 48};
  const index_t width = sizes.query_heads * sizes.head_dim;
  int turn = 0;
  const auto check = [&](const char* what, const auto& change) {
    for (int i = 0; i < 3; ++i) {
      arranged_layer<float> layer(sizes, static_cast<unsigned>(++turn));
      change(layer);
      const output_metric metric = attach_metric(layer);
      auto policy = random_policy(random, sizes.tokens);
      policy.score.tau = i == 0 ? 0.001f : policy.score.tau;
      CAPTURE(what, i, policy.window, static_cast<int>(policy.score.order));
      check_bounds(policy, layer.view());
      check_same(policy, layer.view(), false);
    }
  };
  const auto scale = [](auto& layer, float factor) { for_each(layer.value, [&](float& x) { x *= factor; }); };
  for (const float factor : {1e-42f, 1e-30f, 1e-20f, 1e-10f, 1e10f, 1e18f, 1e30f}) {
    check("scaled values", [&](auto& layer) { scale(layer, factor); });
    check("a scaled metric", [&](auto& layer) {
      for (float& weight : layer.projection) weight *= factor;
    });
    check("both, against each other", [&](auto& layer) {
      scale(layer, factor);
      for (float& weight : layer.projection) weight /= std::max(factor, 1e-30f);
    });
  }
  check("values whose squares are lost", [&](auto& layer) {
    scale(layer, 1e-24f);
    for (float& weight : layer.projection) weight *= 1e15f;
  });
  check("eigenvalues that are lost", [&](auto& layer) {
    scale(layer, 1e15f);
    for (float& weight : layer.projection) weight *= 1e-25f;
  });
  check("a metric of rank 1", [&](auto& layer) {
    for (std::size_t i = static_cast<std::size_t>(width); i < layer.projection.size(); ++i) layer.projection[i] = 0;
  });
  check("an ill-conditioned metric", [&](auto& layer) {
    for (std::size_t i = 0; i < layer.projection.size(); ++i) {
      layer.projection[i] *= std::pow(10.0f, -static_cast<float>(i % static_cast<std::size_t>(sizes.head_dim)) / 4);
    }
  });
  check("the same value everywhere", [&](auto& layer) { for_each(layer.value, [](float& x) { x = 0.3f; }); });
}

TEST_CASE("on the kernels bounds hold where distances are rounding errors and nothing else", "[kernel]") {
  // One query whose output is the value of one token, to the last bit, and large values that differ in their last
  // digits: so do their images, by other roundings. Nothing but the slack of a product lies between a distance and its
  // bound.
  const layer_sizes sizes{.query_heads = 1, .kv_heads = 1, .head_dim = 128, .tokens = 128, .queries = 1, .hidden = 160};
  for (const float difference : {1e-5f, 3e-5f, 1e-4f}) {
    arranged_layer<float> layer(sizes, 11);
    for_each(layer.value, [&](float& x) { x = 333.3f + difference * x; });
    for_each(layer.key, [](float& x) { x = 0; });
    for_each(layer.query, [](float& x) { x = 1; });
    for (index_t c = 0; c < sizes.head_dim; ++c) layer.key(0, 0, 40, c) = 5.0f;  // a logit of 57, all others 0
    const output_metric metric = attach_metric(layer);
    any_policy policy{.window = 1, .budget = {uniform{20}}, .protect = {.recent = 1}};
    CAPTURE(difference);
    check_bounds(policy, layer.view());
    check_same(policy, layer.view());
  }
}

TEST_CASE("the tokens that a smoother reads, behind both ends of a row too, are those that pruning marks", "[kernel]") {
  for (index_t past = 1; past <= 7; ++past) {
    const bulk_span span{.length = static_cast<position_t>(past), .past = static_cast<position_t>(past)};
    const bulk_rows rows{.spans = &span, .count = 1, .stride = past};
    const double drift = 0;
    for (index_t first = -9; first <= 9; ++first) {
      for (index_t last = first; last <= 9; ++last) {
        for (index_t n = 0; n < past; ++n) {
          std::vector<std::uint32_t> keys(static_cast<std::size_t>(past), 5);
          keys[static_cast<std::size_t>(n)] = 7;
          std::vector<token_state> states(keys.size());
          const top_k_pivot<std::uint32_t> pivot{7, 0, 1};
          const detail::bulk::mark_wanted<reaching> mark{
              {{first, last}}, keys.data(), states.data(), &drift, rows, past, &pivot, nullptr, 1, true};
          for (index_t i = 0; i < past; ++i) mark(i);
          std::vector<token_state> expected(keys.size(), token_state::bounded);
          for (index_t u = first; u <= last; ++u) {
            expected[static_cast<std::size_t>(std::clamp<index_t>(n + u, 0, past - 1))] = token_state::wanted;
          }
          CAPTURE(past, first, last, n);
          REQUIRE((states == expected));
        }
      }
    }
  }
}

TEST_CASE("on the kernels details, whole layers of heads and short plans turn pruning off", "[kernel]") {
  random_engine random(8);
  const random_layer<float> layer(random, {.head_dim = 16, .tokens = 200, .query_rows = 32});
  any_policy policy{.window = 16, .group = group_reduce::l2, .budget = {uniform{40}}, .protect = {.recent = 16}};
  const auto rounds = [&](const kernel_tuning& tuning, bool with_details = false) {
    counting_backend backend(kernel::host_executor(5), tuning);
    REQUIRE(select_tokens(backend, policy, layer.view(), with_details).result.ok());
    return backend.rounds;
  };
  CHECK(rounds(always) == 2);
  CHECK(rounds(always, true) == 0);
  CHECK(rounds(never) == 0);
  CHECK(rounds({.least_pruned_tokens = 201}) == 0);
  policy.granularity = {.tokens = 4};
  CHECK(rounds(always) == 0);
  policy.granularity = {.shared = true};
  CHECK(rounds(always) == 0);
  policy.granularity = {};
  policy.budget.choice = ada_kv{.budget = 40};
  CHECK(rounds(always) == 3);
  policy.budget.choice = ada_kv{.budget = 40, .normalise = true};
  CHECK(rounds(always) == 0);
}

TEST_CASE("on the kernels pruning scores a small part of a recorded layer", "[kernel]") {
  const auto file = open_file(example_data("trace-2k.safetensors"));
  const file_tensor<float, 3> q(file, "layers.10.q");
  const file_tensor<float, 3> k(file, "layers.10.k");
  const file_tensor<float, 3> v(file, "layers.10.v");
  const file_tensor<float, 2> wo(file, "layers.10.wo");
  const output_metric metric = build_metric(wo.view, q.view.extent(0), q.view.extent(2));
  layer_view<float> layer;
  layer.query = batched(q.view);
  layer.key = batched(k.view);
  layer.value = batched(v.view);
  layer.metric = metric.view();
  for (const auto order : {query_order::before, query_order::after}) {
    for (const index_t budget : {64, 512}) {
      any_policy policy{.window = 32, .group = group_reduce::l2, .protect = {.sink = 4, .recent = 32}};
      policy.score.order = order;
      policy.temporal.choice = ema{.alpha = 0.3f};
      policy.spatial.choice = adaptive_window{.min_width = 5};
      policy.budget.choice = ada_kv{.budget = budget};
      counting_backend pruned(kernel::host_executor(5), always);
      host_kernel_backend complete(kernel::host_executor(9), never);
      const auto some = select_tokens(pruned, policy, layer, false);
      const auto all = select_tokens(complete, policy, layer, false);
      REQUIRE(some.result.ok());
      CHECK(some.kept == all.kept);
      const index_t tokens = k.view.extent(0) * (k.view.extent(1) - policy.window);
      CAPTURE(budget, pruned.scored, tokens);
      CHECK(pruned.scored < (budget == 64 ? tokens / 15 : tokens / 2));
    }
  }
}
