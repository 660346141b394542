// SPDX-License-Identifier: Apache-2.0
// A hundred thousand tokens under each policy (fewer where a sanitizer slows them): below the mark, at a flat cost,
// without an allocation.
#include "session/session_support.hpp"
#include "support/allocation_counter.hpp"

#include <restkv/backend/eigen/backend.hpp>

#include <array>

using namespace restkv_test;
using restkv::eigen_backend;

namespace {

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RESTKV_TEST_IS_SLOW
#endif
#endif
#ifdef RESTKV_TEST_IS_SLOW
constexpr index_t steps = 30000;
#else
constexpr index_t steps = 100000;
#endif
constexpr restkv::problem_shape shape{.query_heads = 2, .kv_heads = 2, .head_dim = channels, .layers = 1};

/// Counts what is asked of it: queries times the tokens they are compared with.
class counting_backend : public eigen_backend {
 public:
  using eigen_backend::eigen_backend;
  long work = 0;

  template <class Request, restkv::element T>
  status token_scores(const Request& request, const restkv::layer_view<T>& layer, scratch<Request>& scratch,
                      tensor_view<float, 3> out) {
    for (index_t h = 0; h < layer.key.extent(1); ++h) {
      const index_t length = restkv::sequence(layer, 0, h).length;
      work += length * std::max<index_t>(1, request.window_of(length));
    }
    return eigen_backend::token_scores(request, layer, scratch, out);
  }
};

template <class Policy>
void run(const char* name, const Policy& policy) {
  INFO(name);
  counting_backend backend(1);
  const auto plan = restkv::make_session_plan<float>(backend, policy, shape);
  owned_session<Policy, counting_backend> owner(backend, plan);
  random_engine random(1);
  constexpr index_t period = 1009;  // the tokens repeat: they are not what is tested
  const token_stream tokens(random, shape.query_heads, shape.kv_heads, period);

  std::array<long, 10> work{};
  index_t most = 0;
  index_t failures = 0;
  allocations = 0;
  counting_allocations = true;
  for (index_t t = 0; t < steps; ++t) {
    const auto at = [t](const tensor_view<const float, 3>& tensor) { return tensor.slice(1, t % period, 1); };
    const long before = backend.work;
    failures += owner.session.append(0, at(tokens.queries()), at(tokens.keys()), at(tokens.values())).ok() ? 0 : 1;
    work[static_cast<std::size_t>(t * 10 / steps)] += backend.work - before;
    most = std::max(most, owner.session.length(0, 0) + owner.session.length(0, 1));
  }
  counting_allocations = false;
  CHECK(failures == 0);
  CHECK(allocations == 0);
  CHECK(most == 2 * policy.high_water);  // reached, and never passed
  CHECK(owner.session.tokens_seen(0) == steps);
  CHECK(owner.session.positions(0, 0).back() == steps - 1);
  CHECK(owner.session.evictions(0) > steps / (policy.high_water - policy.policy.budget.budget.tokens) / 2);
  // Heads that compete differ in length from time to time, hence the per cent.
  CHECK(std::fabs(static_cast<double>(work[9] - work[1])) <= 0.01 * static_cast<double>(work[1]) + 200);
  CHECK(work[1] > 0);
}

}  // namespace

TEST_CASE("the counter counts") {
  std::vector<int> kept;  // a compiler may leave out a pair of new and delete that nobody sees
  counting_allocations = true;
  kept.resize(1000);
  counting_allocations = false;
  CHECK(allocations == 1);
}

TEST_CASE("in float, what is in double, across evictions with heads that compete") {
  counting_backend backend(1);
  random_engine random(2);
  for (const index_t refresh : {1, 3}) {
    auto policy = make_policy<running_policy>(12, 0.0f, {.sink = 1, .recent = 3}, 18);
    policy.refresh = refresh;
    constexpr restkv::problem_shape grouped{.query_heads = 4, .kv_heads = 2, .head_dim = channels, .layers = 1};
    const auto plan = restkv::make_session_plan<float>(backend, policy, grouped);
    naive_rule rule = rule_of(plan);
    rule.fold = [](double running, double share, index_t) { return running + share; };
    naive_session naive(rule);
    owned_session<running_policy, counting_backend> owner(backend, plan);
    const token_stream tokens(random, 4, 2, 150);
    for (index_t t = 0; t < tokens.tokens; ++t) {
      const auto at = [t](const tensor_view<const float, 3>& tensor) { return tensor.slice(1, t, 1); };
      REQUIRE(owner.session.append(0, at(tokens.queries()), at(tokens.keys()), at(tokens.values())).ok());
      naive.append(naive.layers[0], tokens.at(t));
      const std::string found = difference(owner.session, 0, naive.layers[0], 1e-5);
      INFO("token " << t << ": " << found);
      REQUIRE(found.empty());
    }
    CHECK(owner.session.evictions(0) > 15);
  }
}

TEST_CASE("tokens without queries") {
  auto streaming = make_policy<static_policy>(12, 1.0f, {.sink = 2, .recent = 0}, 16);
  streaming.policy.score.what = static_score::kind::newest;
  run("StreamingLLM", streaming);
  run("norms of keys", make_policy<static_policy>(12, 0.2f, {.sink = 1, .recent = 4}, 16));
}

TEST_CASE("a window of recent queries") {
  auto policy = make_policy<window_policy>(12, 0.2f, {.sink = 1, .recent = 4}, 24);
  policy.policy.window = 4;
  run("SnapKV", policy);
}

TEST_CASE("running scores") {
  auto policy = make_policy<running_policy>(12, 1.0f, {.sink = 0, .recent = 4}, 16);
  run("H2O", policy);
  policy.running.choice = restkv::running_mean{};
  policy.policy.budget.floor = 0.2f;
  run("mean of the observers, heads compete", policy);
  policy.running.choice = restkv::running_ema{};
  policy.refresh = 4;
  run("InertiaKV, refreshed every 4 tokens", policy);
  policy.running.choice = restkv::running_last{};
  policy.refresh = 1;
  policy.policy.protect.recent = 0;
  policy.policy.budget.floor = 1.0f;
  policy.policy.granularity.shared = true;
  run("TOVA", policy);
}
