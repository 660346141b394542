// SPDX-License-Identifier: Apache-2.0
/// @file
/// `presets`: policies as they were published, and the library's own recommendations, ready to use.
///
/// Each is a function from the budget to an `eviction_policy`; change members of what it returns as you like. The
/// default policy of the library is `eviction_policy{}` itself, here `presets::standard`.
#pragma once

#include <restkv/policy.hpp>

/// Policies ready to use: functions from a budget to an `eviction_policy`.
namespace restkv::presets {

/// The library's default: ReST-KV's score in the paper's order through W_O, the mean over the window, the root sum of
/// squares over the query heads of a KV head, neighbours pooled over 5 tokens, heads of a layer competing (Ada-KV).
/// Pooling costs some output error on the window's own queries, and carries importance to the neighbours of attended
/// tokens, which answers turn out to need.
[[nodiscard]] constexpr auto standard(budget_size budget) noexcept {
  return eviction_policy{.budget = ada_kv{.budget = budget}};
}

/// The same without pooling: the smallest output error over the queries to come that a score of single deletions
/// reaches. Use it where the queries after the prompt resemble its last ones; to keep what they did not look at yet, use
/// `standard`.
[[nodiscard]] constexpr auto lowest_error(budget_size budget) noexcept {
  return eviction_policy{.spatial = no_pool{}, .budget = ada_kv{.budget = budget}};
}

/// ReST-KV as its release runs it (arXiv 2605.08840, published scripts): attention smoothed first, one set per query
/// head, which stores each KV head once for each of its query heads.
[[nodiscard]] constexpr auto rest_kv_released(budget_size budget) noexcept {
  return eviction_policy{.score = rest_kv{.order = query_order::after},
                         .temporal = ema{.alpha = 0.3f},
                         .spatial = adaptive_window{.min_width = 5, .scale = 2000.0f},
                         .group = group_reduce::none,
                         .budget = uniform{budget}};
}

/// ReST-KV as the paper describes it: the indicator for each query, then the smoothing.
[[nodiscard]] constexpr auto rest_kv_paper(budget_size budget) noexcept {
  auto policy = rest_kv_released(budget);
  policy.score.order = query_order::before;
  return policy;
}

/// SnapKV (arXiv 2404.14469) at KV heads: attention of the window, mean over queries and over the group, pool 5.
[[nodiscard]] constexpr auto snap_kv(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::snap_kv{},
                         .spatial = average_pool{.width = 5},
                         .group = group_reduce::mean,
                         .budget = uniform{budget}};
}

/// StreamingLLM (arXiv 2309.17453): 4 sinks and the newest tokens.
[[nodiscard]] constexpr auto streaming_llm(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::streaming_llm{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget},
                         .protect = {.sink = 4, .recent = 0}};
}

/// The null policy: sinks and the window, and tokens drawn at random. What a policy gains over it, it gains by its
/// score; what is left, by protection alone.
[[nodiscard]] constexpr auto random(budget_size budget, std::uint64_t seed = 0) noexcept {
  return eviction_policy{.score = random_score{.seed = seed},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget},
                         .protect = {.sink = 4, .recent = 32}};
}

}  // namespace restkv::presets
