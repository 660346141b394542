// SPDX-License-Identifier: Apache-2.0
// Sessions under random operations, each beside a naive one.
#include "session/session_support.hpp"
#include "support/check_error.hpp"

#include <memory>

using namespace restkv_test;

namespace {

constexpr index_t layer_count = 2;

/// A pool of sessions of one plan and their naive counterparts.
template <class Policy>
class pool {
 public:
  pool(random_engine& random, const Policy& policy, const restkv::problem_shape& shape, naive_rule scores)
      : random_(random), plan_(plan_for(policy, shape)) {
    naive_rule rule = rule_of(plan_);
    rule.fold = scores.fold;
    rule.worth = scores.worth;
    rule.score = scores.score;
    for (int i = 0; i < 3; ++i) {
      real_.push_back(std::make_unique<owned_session<Policy>>(backend_, plan_));
      naive_.emplace_back(rule, layer_count);
    }
  }

  /// Operations that were done.
  long operations = 0;

  void step() {
    const auto i = static_cast<std::size_t>(pick(random_, 0, 2));
    auto& real = real_[i]->session;
    naive_session& naive = naive_[i];
    const index_t what = pick(random_, 0, 99);
    ++operations;
    if (what < 70) {
      const index_t l = pick(random_, 0, layer_count - 1);
      append(real, naive.layers[static_cast<std::size_t>(l)], naive, l, pick(random_, 0, chance(random_, 10) ? 20 : 3));
    } else if (what < 76) {
      const index_t l = pick(random_, 0, layer_count - 1);
      auto& layer = naive.layers[static_cast<std::size_t>(l)];
      if (chance(random_, 50)) {
        REQUIRE(real.evict(l).ok());
        naive.evict(layer);
      } else {
        REQUIRE(real.evict_if_due(l).ok());
        if (naive.room(layer) == 0) naive.evict(layer);
      }
    } else if (what < 80) {
      const auto j = static_cast<std::size_t>(pick(random_, 0, 2));
      REQUIRE(real.fork_to(real_[j]->session).ok());
      naive_[j] = naive_session(naive);
      compare(j);
    } else if (what < 84) {
      const auto j = static_cast<std::size_t>(pick(random_, 0, 2));
      const auto bytes = real_[i]->bytes();
      REQUIRE(restkv::restore(real_[j]->session, bytes).ok());
      REQUIRE(real_[j]->bytes() == bytes);
      naive_[j] = naive_session(naive);
      compare(j);
    } else if (what < 99) {
      speculate(*real_[i], naive);
    } else {
      real.clear();
      naive = naive_session(naive.rule, layer_count);
    }
    compare(i);
  }

 private:
  void compare(std::size_t i) {
    for (index_t l = 0; l < layer_count; ++l) {
      const std::string found = difference(real_[i]->session, l, naive_[i].layers[static_cast<std::size_t>(l)]);
      if (!found.empty()) FAIL("operation " << operations << ", session " << i << ", layer " << l << ": " << found);
      REQUIRE(real_[i]->session.room(l) == naive_[i].room(naive_[i].layers[static_cast<std::size_t>(l)]));
    }
  }

  /// Attention rows over a layer's slots and the new tokens: eighths, so that sums are exact and ties frequent.
  std::vector<double> random_rows(index_t n, index_t slots) {
    std::vector<double> rows(static_cast<std::size_t>(plan_.shape.query_heads * n * slots));
    for (double& share : rows) share = static_cast<double>(pick(random_, 0, 8)) / 8;
    return rows;
  }

  static naive_input with_rows(naive_input token, const tensor_view<const double, 3>& rows, index_t i) {
    for (index_t h = 0; h < rows.extent(0); ++h) {
      token.attention.emplace_back();
      for (index_t slot = 0; slot < rows.extent(2); ++slot) token.attention.back().push_back(rows(h, i, slot));
    }
    return token;
  }

  template <class Session>
  void append(Session& real, naive_layer& layer, naive_session& naive, index_t l, index_t n) {
    const token_stream tokens(random_, plan_.shape.query_heads, plan_.shape.kv_heads, n);
    if (!naive.rule.rows) {
      REQUIRE(real.append(l, tokens.queries(), tokens.keys(), tokens.values()).ok());
      for (index_t i = 0; i < n; ++i) naive.append(layer, tokens.at(i));
      return;
    }
    const index_t slots = layer.longest() + n;
    const std::vector<double> memory = random_rows(n, slots);
    const tensor_view<const double, 3> rows(memory.data(), {plan_.shape.query_heads, n, slots});
    const status outcome = real.append_attention(l, rows, tokens.keys(), tokens.values());
    if (n > naive.room(layer)) {
      check_error(outcome, restkv::errc::invalid_argument, {n, naive.room(layer)});
      return;
    }
    REQUIRE(outcome.ok());
    for (index_t i = 0; i < n; ++i) naive.append(layer, with_rows(tokens.at(i), rows, i));
  }

  void speculate(owned_session<Policy>& owner, naive_session& naive) {
    auto& real = owner.session;
    const auto before = owner.bytes();
    REQUIRE(real.begin_speculation().ok());
    CHECK(!real.begin_speculation().ok());
    const index_t n = pick(random_, 1, plan_.policy.speculation);
    const index_t accepted = pick(random_, 0, n);
    const bool back = chance(random_, 40);
    std::vector<std::vector<naive_input>> inputs(static_cast<std::size_t>(layer_count));
    for (index_t l = 0; l < layer_count; ++l) {
      const token_stream tokens(random_, plan_.shape.query_heads, plan_.shape.kv_heads, n);
      const index_t slots = naive.layers[static_cast<std::size_t>(l)].longest() + n;
      const std::vector<double> memory = naive.rule.rows ? random_rows(n, slots) : std::vector<double>{};
      const tensor_view<const double, 3> rows(memory.data(), {plan_.shape.query_heads, naive.rule.rows ? n : 0, slots});
      for (index_t i = 0; i < n; ++i) {  // token by token
        const auto key = tokens.keys().slice(1, i, 1);
        const auto value = tokens.values().slice(1, i, 1);
        if (naive.rule.rows) {
          REQUIRE(real.append_attention(l, rows.slice(1, i, 1), key, value).ok());
          inputs[static_cast<std::size_t>(l)].push_back(with_rows(tokens.at(i), rows, i));
        } else {
          REQUIRE(real.append(l, tokens.queries().slice(1, i, 1), key, value).ok());
          inputs[static_cast<std::size_t>(l)].push_back(tokens.at(i));
        }
      }
      REQUIRE(real.speculated(l) == n);
      REQUIRE(real.cache(l).key.extent(2) == slots);
    }
    operations += layer_count * n + 1;
    check_error(real.commit(n + 1), restkv::errc::invalid_argument, {n + 1, n});
    if (back) {
      REQUIRE(real.rollback().ok());
      REQUIRE(owner.bytes() == before);
      return;
    }
    REQUIRE(real.commit(accepted).ok());
    for (index_t l = 0; l < layer_count; ++l) {
      auto& layer = naive.layers[static_cast<std::size_t>(l)];
      const auto& tokens = inputs[static_cast<std::size_t>(l)];
      for (index_t i = 0; i < accepted; ++i) naive.append(layer, tokens[static_cast<std::size_t>(i)]);
      if (naive.rule.rows && accepted > 0 && naive.room(layer) == 0) naive.evict(layer);
    }
  }

  random_engine& random_;
  reference_backend backend_;
  restkv::session_plan<Policy> plan_;
  std::vector<std::unique_ptr<owned_session<Policy>>> real_;
  std::vector<naive_session> naive_;
};

constexpr restkv::problem_shape shape{
    .query_heads = 4, .kv_heads = 2, .head_dim = channels, .layers = layer_count};

template <class Policy>
long run_pool(unsigned seed, const Policy& policy, const naive_rule& scores, long operations) {
  random_engine random(seed);
  pool<Policy> sessions(random, policy, shape, scores);
  while (sessions.operations < operations) sessions.step();
  return sessions.operations;
}

double negative_norm(const naive_token& token) {
  double sum = 0;
  for (const float x : token.key) sum += double{x} * double{x};
  return -std::sqrt(sum);
}

}  // namespace

TEST_CASE("sums of given attention, heads alike") {
  naive_rule scores;
  scores.fold = [](double running, double share, index_t) { return running + share; };
  auto policy = make_policy<running_policy>(8, 1.0f, {.sink = 1, .recent = 2}, 12);
  policy.running.choice = restkv::running_sum{};
  policy.speculation = 3;
  policy.attention_rows = true;
  CHECK(run_pool(1, policy, scores, 50000) >= 50000);
}

TEST_CASE("largest given attention every second token, heads compete, an eviction every five tokens") {
  naive_rule scores;
  scores.fold = [](double running, double share, index_t observers) {
    return observers == 0 ? share : std::max(running, share);
  };
  auto policy = make_policy<running_policy>(7, 0.0f, {.sink = 1, .recent = 2}, 11);
  policy.running.choice = restkv::running_maximum{};
  policy.evict_every = 5;
  policy.refresh = 2;
  policy.speculation = 4;
  policy.attention_rows = true;
  CHECK(run_pool(2, policy, scores, 40000) >= 40000);
}

TEST_CASE("norms of keys, heads compete") {
  naive_rule scores;
  scores.worth = negative_norm;
  auto policy = make_policy<static_policy>(8, 0.0f, {.sink = 2, .recent = 1}, 10);
  policy.speculation = 5;
  CHECK(run_pool(3, policy, scores, 15000) >= 15000);
}

TEST_CASE("a window of recent queries, each KV head its own set") {
  auto policy = make_policy<window_policy>(8, 1.0f, {.sink = 1, .recent = 3}, 13);
  policy.policy.window = 3;
  policy.speculation = 3;
  CHECK(run_pool(4, policy, naive_rule{}, 4000) >= 4000);
}

TEST_CASE("moving averages of attention, one set for all heads") {
  naive_rule scores;
  scores.fold = [](double running, double share, index_t observers) {
    return observers == 0 ? share : 0.75 * running + 0.25 * share;
  };
  auto policy = make_policy<running_policy>(8, 1.0f, {.sink = 0, .recent = 3}, 10);
  policy.policy.granularity.shared = true;
  policy.running.choice = restkv::running_ema{.decay = 0.75f};
  policy.refresh = 4;
  policy.speculation = 3;
  CHECK(run_pool(5, policy, scores, 3000) >= 3000);
}
