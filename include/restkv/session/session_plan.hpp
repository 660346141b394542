// SPDX-License-Identifier: Apache-2.0
/// @file
/// `session_policy` and `session_plan`: when and by what a running sequence is evicted, validated, with the memory it
/// needs.
#pragma once

#include <restkv/plan.hpp>
#include <restkv/session/running.hpp>

#include <algorithm>
#include <limits>

namespace restkv {

/// How a running sequence is evicted: a policy, and when it acts. Written with designated initialisers, the types are
/// deduced.
///
/// An eviction brings every layer down to the policy's budget. It is due when the next token would pass the high-water
/// mark, and also after every `evict_every` tokens where that is not 0.
template <class Policy, class Running = no_running>
struct session_policy {
  using policy_type = Policy;    ///< which tokens go
  using running_type = Running;  ///< see `running_score`

  Policy policy{};            ///< which tokens go, and how many stay
  Running running{};          ///< a `running_score`, or `no_running`: the policy asks the last `policy.window` queries
  index_t high_water = 0;     ///< most tokens per KV head, the mean over the heads of a layer; above the budget
  index_t evict_every = 0;    ///< tokens between evictions; 0: only at the mark
  index_t refresh = 1;        ///< every how many tokens the running scores are asked for (lazy refresh)
  index_t speculation = 0;    ///< most tokens between `begin_speculation` and `commit` or `rollback`
  bool attention_rows = false;  ///< the engine gives attention instead of queries
};

namespace detail {

/// The policy that selects: that of the session, or with its running scores, `rows` of a layer, in the place of its
/// score.
template <class SessionPolicy>
[[nodiscard]] auto make_selecting_policy(const SessionPolicy& session,
                                         const running_rows<typename SessionPolicy::running_type>& rows = {}) noexcept {
  if constexpr (runs<typename SessionPolicy::running_type>) {
    return with_parts(session.policy, rows, mean{}, session.policy.budget);
  } else {
    return session.policy;
  }
}

template <class SessionPolicy>
using session_score = decltype(SessionPolicy::policy_type::score);

/// The score of one query.
template <class SessionPolicy>
using observation_request = score_request<observed_score<session_score<SessionPolicy>>, last>;

template <class SessionPolicy>
[[nodiscard]] observation_request<SessionPolicy> make_observation_request(const SessionPolicy& session,
                                                                          const problem_shape& shape) noexcept {
  observation_request<SessionPolicy> request;
  static_cast<session_score<SessionPolicy>&>(request.score) = session.policy.score;
  if constexpr (requires { request.score.order = query_order::before; }) request.score.order = query_order::before;
  request.window = 1;
  request.group = group_reduce::none;
  request.shape = shape;
  return request;
}

/// Whether a score can be computed from attention that somebody else computed.
template <class Score>
inline constexpr bool reads_attention_rows =
    (static_cast<unsigned>(features_of<Score>()) & ~static_cast<unsigned>(feature::attention | feature::odds)) == 0;

/// Whether the session keeps queries for its evictions.
template <class SessionPolicy>
inline constexpr bool keeps_queries =
    needs_window<session_score<SessionPolicy>>() && !runs<typename SessionPolicy::running_type>;

}  // namespace detail

/// What a session needs to know, computed once. A plain value, shared by all sessions of a model.
template <class SessionPolicy>
struct session_plan {
  SessionPolicy policy{};          ///< as it was given
  problem_shape shape{};           ///< of the cache of one sequence; `tokens` is the capacity of a head
  index_t window = 0;              ///< queries that are kept for evictions
  index_t query_rows = 0;          ///< rows of a layer's query ring: the window and what may be speculated
  std::size_t element_bytes = 0;   ///< of keys, values and queries
  std::size_t selection_bytes = 0;  ///< of the workspace that layers share
  std::size_t memory_bytes = 0;    ///< what a session needs, whatever its layers hold
};

namespace detail {

template <class SessionPolicy>
[[nodiscard]] status check_session_policy(const SessionPolicy& session) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const auto& policy = session.policy;
  constexpr index_t longest = std::numeric_limits<position_t>::max() / 4;
  using score_t = session_score<SessionPolicy>;
  RESTKV_RETURN_IF_FAILED(policy.check());
  if constexpr (requires { { session.running.check() } -> std::same_as<status>; }) {
    RESTKV_RETURN_IF_FAILED(session.running.check());
  }
  if (policy.group == group_reduce::none) {
    return status::error(errc::unsupported,
                         "a session keeps one set per KV head: the policy's group reduction may not be none");
  }
  const auto within = [&](const char* name, index_t value, index_t least, index_t most) -> status {
    if (value >= least && value <= most) return {};
    return status::error(errc::invalid_argument, "%s is %lld, must be within [%lld, %lld]", name, ll(value), ll(least),
                         ll(most));
  };
  RESTKV_RETURN_IF_FAILED(within("high_water", session.high_water, 1, longest));
  RESTKV_RETURN_IF_FAILED(within("evict_every", session.evict_every, 0, longest));
  RESTKV_RETURN_IF_FAILED(within("refresh", session.refresh, 1, longest));
  RESTKV_RETURN_IF_FAILED(within("speculation", session.speculation, 0, most_window));
  if constexpr (runs<typename SessionPolicy::running_type>) {
    static_assert(needs_window<score_t>(), "a running score needs a policy whose score is asked by queries");
    const index_t unseen = session.refresh - (needs_attention_alone<score_t>() ? 1 : 0);
    if (policy.protect.recent < unseen) {
      return status::error(errc::invalid_argument,
                           "protect.recent is %lld: up to %lld tokens have no running score yet and must be protected",
                           ll(policy.protect.recent), ll(unseen));
    }
    if (uses_drift(policy.spatial)) {
      return status::error(errc::invalid_argument,
                           "adaptive_window compares the halves of a window of queries: it does not go with a running "
                           "score");
    }
    if (session.attention_rows && !reads_attention_rows<score_t>) {
      return status::error(errc::unsupported,
                           "from attention rows only attention and odds are known: the score needs more");
    }
  } else {
    if (session.refresh != 1) {
      return status::error(errc::invalid_argument, "refresh is %lld: without a running score there is none to refresh",
                           ll(session.refresh));
    }
    if (session.attention_rows) {
      return status::error(errc::unsupported, "attention rows need a running score (running_sum, running_last, ...)");
    }
    if (needs_window<score_t>() && policy.window > most_window) {
      return status::error(errc::invalid_argument,
                           "a session keeps at most %lld queries, the policy's window is %lld: use a running score",
                           ll(most_window), ll(policy.window));
    }
    // Window queries see the tokens before them: these must not have been evicted.
    if (needs_window<score_t>() && policy.recent() < policy.window - 1) {
      return status::error(errc::invalid_argument,
                           "protect.recent is %lld, the tokens of a window of %lld queries must be protected: %lld",
                           ll(policy.recent()), ll(policy.window), ll(policy.window - 1));
    }
  }
  return {};
}

/// Units with a protected token, wherever the sequence ends; 0 where units are tokens.
template <class Policy>
[[nodiscard]] constexpr index_t protected_units(const Policy& policy) noexcept {
  const index_t unit = policy.granularity.tokens;
  return unit == 1 ? 0 : (policy.protect.sink + unit - 1) / unit + (policy.recent() + unit - 1) / unit + 1;
}

/// Tokens that the heads have after an eviction, on average.
template <class Policy>
[[nodiscard]] index_t tokens_after_eviction(const Policy& policy, const budget_problem& problem) noexcept {
  return std::max(policy.budget.tokens_per_head(problem), protected_units(policy)) * policy.granularity.tokens;
}

/// Tokens of a head that the session must hold: the mark where all heads have the same, or as many as heads that
/// compete can give to one.
template <class Policy>
[[nodiscard]] status session_capacity(const Policy& policy, const problem_shape& shape, index_t high_water,
                                      index_t& capacity) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const index_t unit = policy.granularity.tokens;
  const index_t rows = policy.granularity.shared ? 1 : shape.kv_heads;
  budget_problem problem = budget_of_span(policy, shape, rows, high_water);
  if (rows > 1 && policy.budget.most_per_head(problem) > policy.budget.tokens_per_head(problem)) {
    problem = budget_of_span(policy, shape, rows, shape.kv_heads * high_water);
  }
  const index_t budget = tokens_after_eviction(policy, problem);
  if (budget >= high_water) {
    return status::error(errc::invalid_argument,
                         "high_water is %lld tokens, layer %lld keeps %lld at an eviction: the mark must be above",
                         ll(high_water), ll(shape.layer), ll(budget));
  }
  const index_t most =
      std::max(std::min(problem.length, policy.budget.most_per_head(problem) + (unit == 1 ? 0 : 1)),
               protected_units(policy)) *
      unit;
  capacity = std::max({capacity, high_water, most + high_water - budget});
  return {};
}

}  // namespace detail

}  // namespace restkv
