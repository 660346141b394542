// SPDX-License-Identifier: Apache-2.0
// Random tokens, and the comparison of a session with the naive one.
#pragma once

#include "session/naive_session.hpp"
#include "support/catch.hpp"

#include <restkv/budget/ada_kv.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/score/observed_attention.hpp>
#include <restkv/session/session_archive.hpp>

namespace restkv_test {

using restkv::eviction_policy;
using restkv::reference_backend;
using restkv::session_policy;
using restkv::status;
using restkv::tensor_view;

inline constexpr index_t channels = 4;

/// A score without queries: what it is, is chosen when running.
struct static_score {
  enum class kind { key_norm, newest, oldest } what = kind::key_norm;
  static constexpr restkv::feature needs = restkv::feature::key_norm;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const restkv::token_features<Real>& token) const noexcept {
    if (what == kind::key_norm) return -token.key_norm;
    return static_cast<Real>(what == kind::newest ? token.position : -token.position);
  }
};

// The three kinds of sessions, each one type, whatever a test chooses of their parts. Heads compete without a floor, or
// with one of 1 have the same budget.
using running_policy = session_policy<
    eviction_policy<restkv::observed_attention, restkv::mean, restkv::no_pool, restkv::ada_kv>, restkv::any_running>;
using window_policy =
    session_policy<eviction_policy<restkv::snap_kv, restkv::mean, restkv::no_pool, restkv::ada_kv>>;
using static_policy = session_policy<eviction_policy<static_score, restkv::mean, restkv::no_pool, restkv::ada_kv>>;

/// A policy of one of these types. `floor` 0: heads compete.
template <class Policy>
[[nodiscard]] Policy make_policy(index_t budget, float floor, restkv::protection protect, index_t high_water) {
  Policy policy;
  policy.policy.group = restkv::group_reduce::mean;
  policy.policy.budget = {.budget = budget, .floor = floor};
  policy.policy.protect = protect;
  policy.policy.window = 1;
  policy.high_water = high_water;
  return policy;
}

/// Tokens of one layer: [heads, tokens, channels] each, and as the naive session takes them.
struct token_stream {
  index_t query_heads, kv_heads, tokens;
  std::vector<float> query, key, value;

  token_stream(random_engine& random, index_t query_heads, index_t kv_heads, index_t tokens, double sharpness = 1.5)
      : query_heads(query_heads), kv_heads(kv_heads), tokens(tokens),
        query(static_cast<std::size_t>(query_heads * tokens * channels)),
        key(static_cast<std::size_t>(kv_heads * tokens * channels)), value(key.size()) {
    for (float& x : query) x = static_cast<float>(normal(random) * sharpness);
    for (float& x : key) x = static_cast<float>(normal(random));
    for (float& x : value) x = static_cast<float>(normal(random));
  }

  [[nodiscard]] tensor_view<const float, 3> queries() const { return {query.data(), {query_heads, tokens, channels}}; }
  [[nodiscard]] tensor_view<const float, 3> keys() const { return {key.data(), {kv_heads, tokens, channels}}; }
  [[nodiscard]] tensor_view<const float, 3> values() const { return {value.data(), {kv_heads, tokens, channels}}; }

  [[nodiscard]] naive_input at(index_t token) const {
    const auto vectors = [token](const tensor_view<const float, 3>& tensor) {
      std::vector<std::vector<float>> heads;
      for (index_t h = 0; h < tensor.extent(0); ++h) {
        heads.emplace_back();
        for (index_t c = 0; c < tensor.extent(2); ++c) heads.back().push_back(tensor(h, token, c));
      }
      return heads;
    };
    return {vectors(queries()), vectors(keys()), vectors(values()), {}};
  }
};

/// A session with memory of its own.
template <class Policy, class Backend = reference_backend, class T = float>
struct owned_session {
  using session_type = restkv::session<Backend, Policy, T>;

  owned_session(Backend& backend, const restkv::session_plan<Policy>& plan) : memory(plan.memory_bytes) {
    restkv::throw_if_failed(session.open(backend, plan, memory));
  }
  std::vector<std::byte> memory;
  session_type session;

  [[nodiscard]] std::vector<std::byte> bytes() const {
    std::vector<std::byte> out(restkv::serialised_bytes(session));
    std::size_t written = 0;
    restkv::throw_if_failed(restkv::serialise(session, out, written));
    REQUIRE(written == out.size());
    return out;
  }
};

template <class Policy>
[[nodiscard]] restkv::session_plan<Policy> plan_for(const Policy& policy, const restkv::problem_shape& shape) {
  return restkv::make_session_plan<float>(reference_backend(), policy, shape);
}

/// The naive session's rule for a plan: sizes and the points of eviction; scores are the caller's.
template <class Policy>
[[nodiscard]] naive_rule rule_of(const restkv::session_plan<Policy>& plan) {
  naive_rule rule;
  rule.query_heads = plan.shape.query_heads;
  rule.kv_heads = plan.shape.kv_heads;
  rule.budget = plan.policy.policy.budget.budget.tokens;
  rule.sink = plan.policy.policy.protect.sink;
  rule.recent = plan.policy.policy.protect.recent;
  rule.compete = plan.policy.policy.budget.floor == 0.0f;
  rule.mark = plan.policy.high_water;
  rule.every = plan.policy.evict_every;
  rule.refresh = plan.policy.refresh;
  rule.window = plan.window;
  rule.slots = plan.shape.tokens - plan.policy.speculation;
  rule.shared = plan.policy.policy.granularity.shared;
  rule.rows = plan.policy.attention_rows;
  return rule;
}

/// The first difference between a layer of a session and of the naive one; empty where there is none.
template <class Session>
[[nodiscard]] std::string difference(const Session& session, index_t l, const naive_layer& naive,
                                     double tolerance = 1e-12) {
  if (session.tokens_seen(l) != naive.seen) return "tokens seen";
  if (session.evictions(l) != naive.evictions) return "evictions";
  const auto cache = session.cache(l);
  for (index_t h = 0; h < cache.key.extent(1); ++h) {
    const auto& tokens = naive.heads[static_cast<std::size_t>(h)];
    const auto positions = session.positions(l, h);
    if (positions.size() != tokens.size()) return "length of head " + std::to_string(h);
    if (session.length(l, h) != static_cast<index_t>(tokens.size())) return "length()";
    if (cache.head_lengths(0, h) != static_cast<index_t>(tokens.size())) return "head_lengths";
    const index_t group = session.plan_of().shape.group();
    for (std::size_t n = 0; n < tokens.size(); ++n) {
      const auto slot = static_cast<index_t>(n);
      if (positions[n] != tokens[n].position) return "position in slot " + std::to_string(n);
      for (index_t c = 0; c < channels; ++c) {
        if (cache.key.chunk(0)(0, h, slot, c) != tokens[n].key[static_cast<std::size_t>(c)]) return "key";
        if (cache.value.chunk(0)(0, h, slot, c) != tokens[n].value[static_cast<std::size_t>(c)]) return "value";
      }
      if constexpr (requires { session.running_score_of(l, 0, 0); }) {
        for (index_t j = 0; j < group && tokens[n].observers > 0; ++j) {
          const double wanted = tokens[n].running[static_cast<std::size_t>(j)];
          const double found = session.running_score_of(l, h * group + j, slot);
          const double scored = session.plan_of().policy.running.score(wanted, tokens[n].observers);
          if (!(std::fabs(found - scored) <= tolerance * (1 + std::fabs(scored)))) return "running score";
        }
      }
    }
  }
  return "";
}

}  // namespace restkv_test
