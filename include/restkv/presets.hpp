// SPDX-License-Identifier: Apache-2.0
/// @file
/// `presets`: policies as they were published, and the library's own recommendations, ready to use.
///
/// Each is a function from the budget to an `eviction_policy`; change members of what it returns as you like. The
/// default policy of the library is `eviction_policy{}` itself, here `presets::standard`.
#pragma once

#include <restkv/policy.hpp>
#include <restkv/rescoring/caote.hpp>
#include <restkv/rescoring/critical_kv.hpp>
#include <restkv/rescoring/defensive_kv.hpp>
#include <restkv/rescoring/lava.hpp>
#include <restkv/rescoring/r_kv.hpp>
#include <restkv/score/an_d_pro.hpp>
#include <restkv/score/caote.hpp>
#include <restkv/score/cap_kv.hpp>
#include <restkv/score/cur_dkv.hpp>
#include <restkv/score/defensive_kv.hpp>
#include <restkv/score/drop_kv.hpp>
#include <restkv/score/expected_attention.hpp>
#include <restkv/score/key_diff.hpp>
#include <restkv/score/keyformer.hpp>
#include <restkv/score/knorm.hpp>
#include <restkv/score/la_prox.hpp>
#include <restkv/score/lag_kv.hpp>
#include <restkv/score/leverage_score.hpp>
#include <restkv/score/ob_cache.hpp>
#include <restkv/score/observed_attention.hpp>
#include <restkv/score/q_filter.hpp>
#include <restkv/score/value_range.hpp>
#include <restkv/score/vatp.hpp>
#include <restkv/selection/la_cache.hpp>

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

/// Ada-KV over SnapKV (arXiv 2407.11550): max pooling over 7 tokens, heads of a layer compete.
[[nodiscard]] constexpr auto ada_kv(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::snap_kv{},
                         .spatial = max_pool{.width = 7},
                         .group = group_reduce::mean,
                         .budget = restkv::ada_kv{.budget = budget}};
}

/// PyramidKV (arXiv 2406.02069): SnapKV with more tokens for the lower layers.
[[nodiscard]] constexpr auto pyramid_kv(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::snap_kv{},
                         .spatial = average_pool{.width = 5},
                         .group = group_reduce::mean,
                         .budget = pyramid{.budget = budget}};
}

/// ChunkKV (arXiv 2502.00299): SnapKV's attention, whole chunks of 10 tokens.
[[nodiscard]] constexpr auto chunk_kv(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::snap_kv{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget},
                         .granularity = {.tokens = 10}};
}

/// H2O (arXiv 2306.14048): the attention of every query that sees a token, and the newest tokens. `recent` is their number,
/// published as half of the budget. The layer must hand over the queries of the whole prompt, or of as much of it as is to
/// be observed: set `window`.
[[nodiscard]] constexpr auto h2o(budget_size budget, index_t recent = 32) noexcept {
  return eviction_policy{.score = observed_attention{},
                         .window = every_query,
                         .temporal = sum{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget},
                         .protect = {.sink = 0, .recent = recent}};
}

/// H2O with the mean over the queries that see a token, so that early tokens have no advantage by their number.
[[nodiscard]] constexpr auto h2o_mean(budget_size budget, index_t recent = 32) noexcept {
  return eviction_policy{.score = observed_attention{},
                         .window = every_query,
                         .temporal = mean{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget},
                         .protect = {.sink = 0, .recent = recent}};
}

/// TOVA (arXiv 2401.06104): the newest query's attention, the mean over all heads, one kept set for the layer. Nothing is
/// protected.
[[nodiscard]] constexpr auto tova(budget_size budget) noexcept {
  return eviction_policy{.score = observed_attention{},
                         .window = 1,
                         .temporal = last{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget},
                         .protect = {.sink = 0, .recent = 0},
                         .granularity = {.shared = true}};
}

/// Keyformer (arXiv 2403.09054): accumulated attention with noise. As `h2o` in everything else.
[[nodiscard]] constexpr auto keyformer(budget_size budget, index_t recent = 32, std::uint64_t seed = 0) noexcept {
  return eviction_policy{.score = restkv::keyformer{.seed = seed},
                         .window = every_query,
                         .temporal = sum{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget},
                         .protect = {.sink = 0, .recent = recent}};
}

/// VATP (arXiv 2406.12335): attention of the window times the value's l1 norm. The first token is kept, as published.
[[nodiscard]] constexpr auto vatp(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::vatp{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget},
                         .protect = {.sink = 1, .recent = 32}};
}

/// CAOTE (arXiv 2504.14051) over the attention of the window.
[[nodiscard]] constexpr auto caote(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::caote{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget}};
}

/// FastCAOTE (arXiv 2504.14051) over the attention of the window.
[[nodiscard]] constexpr auto fast_caote(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::fast_caote{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget}};
}

/// CAOTE as a correction of H2O's score (arXiv 2504.14051).
[[nodiscard]] constexpr auto h2o_caote(budget_size budget, index_t recent = 32) noexcept {
  return eviction_policy{.score = observed_attention{},
                         .window = every_query,
                         .temporal = sum{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .rescoring = caote_rescoring{},
                         .budget = uniform{budget},
                         .protect = {.sink = 0, .recent = recent}};
}

/// DropKV (ICML 2026): squared deletion errors of 8 queries, max pooling over 11 tokens, heads of a layer compete.
[[nodiscard]] constexpr auto drop_kv(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::drop_kv{},
                         .window = 8,
                         .temporal = sum{},
                         .spatial = max_pool{.width = 11},
                         .group = group_reduce::mean,
                         .budget = restkv::ada_kv{.budget = budget}};
}

/// OBCache's key form with Ada-KV (arXiv 2510.07651): 16 queries, max pooling over 7 tokens, the sum over the group.
[[nodiscard]] constexpr auto ob_cache(budget_size budget, ob_cache_part part = ob_cache_part::key) noexcept {
  return eviction_policy{.score = restkv::ob_cache{part},
                         .window = 16,
                         .temporal = sum{},
                         .spatial = max_pool{.width = 7},
                         .group = group_reduce::sum,
                         .budget = restkv::ada_kv{.budget = budget}};
}

/// LaProx (arXiv 2605.07234) with the heads of a layer competing; published with one ranking over all layers and heads,
/// see `global_budget`. Average pooling over 7 tokens.
[[nodiscard]] constexpr auto la_prox(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::la_prox{},
                         .temporal = root_sum_square{},
                         .spatial = average_pool{.width = 7},
                         .group = group_reduce::mean,
                         .budget = restkv::ada_kv{.budget = budget, .floor = 0.0f}};
}

/// AnDPro (NeurIPS 2025): attention times the projection of the value on the output, units of 4 tokens.
[[nodiscard]] constexpr auto an_d_pro(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::an_d_pro{},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = restkv::ada_kv{.budget = budget, .floor = 0.0f},
                         .protect = {.sink = 1, .recent = 32},
                         .granularity = {.tokens = 4}};
}

/// CriticalKV over SnapKV (arXiv 2502.03805).
[[nodiscard]] constexpr auto critical_kv(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::snap_kv{},
                         .spatial = average_pool{.width = 5},
                         .group = group_reduce::mean,
                         .rescoring = restkv::critical_kv<>{},
                         .budget = uniform{budget}};
}

/// CriticalKV within the heads' budgets that Ada-KV gives (arXiv 2502.03805).
[[nodiscard]] constexpr auto critical_ada_kv(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::snap_kv{},
                         .spatial = average_pool{.width = 5},
                         .group = group_reduce::mean,
                         .rescoring = restkv::critical_kv<>{},
                         .budget = restkv::ada_kv{.budget = budget}};
}

/// LAVa within a layer (arXiv 2509.09754): attention times the head's largest value, the heads of a layer compete without
/// a floor. Published with budgets for layers too, see `lava_budget`.
[[nodiscard]] constexpr auto lava(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::snap_kv{},
                         .spatial = max_pool{.width = 7},
                         .group = group_reduce::max,
                         .rescoring = restkv::lava{},
                         .budget = restkv::ada_kv{.budget = budget, .floor = 0.0f}};
}

/// DefensiveKV (arXiv 2510.13334): the worst case over queries and group, the heads of a layer compete without a floor.
[[nodiscard]] constexpr auto defensive_kv(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::defensive_kv{},
                         .temporal = maximum{},
                         .spatial = no_pool{},
                         .group = group_reduce::max,
                         .rescoring = defensive_rescoring<>{},
                         .budget = restkv::ada_kv{.budget = budget, .floor = 0.0f}};
}

/// R-KV (arXiv 2505.24133) after the fact: attention of 8 queries, max pooling over 7 tokens, less the redundancy of keys.
[[nodiscard]] constexpr auto r_kv(budget_size budget) noexcept {
  return eviction_policy{.score = restkv::snap_kv{},
                         .window = 8,
                         .spatial = max_pool{.width = 7},
                         .group = group_reduce::mean,
                         .rescoring = restkv::r_kv{},
                         .budget = uniform{budget},
                         .protect = {.sink = 0, .recent = 8}};
}

/// A policy of a score that looks at the cache alone: uniform budget, no pooling.
template <head_score Score>
[[nodiscard]] constexpr auto of_cache(const Score& score, budget_size budget,
                                      const protection& protect = {.sink = 4, .recent = 0}) noexcept {
  return eviction_policy{.score = score,
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = uniform{budget},
                         .protect = protect};
}

/// Key norms (arXiv 2406.11430): short keys are kept. Nothing is protected, as published.
[[nodiscard]] constexpr auto knorm(budget_size budget) noexcept {
  return of_cache(restkv::knorm{}, budget, {.sink = 0, .recent = 0});
}

/// KeyDiff (arXiv 2504.15364): keys unlike the mean key. Nothing is protected, as published.
[[nodiscard]] constexpr auto key_diff(budget_size budget) noexcept {
  return of_cache(restkv::key_diff{}, budget, {.sink = 0, .recent = 0});
}

/// LagKV (arXiv 2504.04704): 4 sinks, chunks of 128 tokens, the last two chunks protected by the score itself.
[[nodiscard]] constexpr auto lag_kv(budget_size budget) noexcept { return of_cache(restkv::lag_kv{}, budget); }

/// CurDKV (arXiv 2509.15038): products of key and value norms, compared within windows of 16 tokens.
[[nodiscard]] constexpr auto cur_dkv(budget_size budget) noexcept { return of_cache(restkv::cur_dkv{}, budget); }

/// Leverage scores of keys (Compactor, arXiv 2507.08143, without its attention half).
[[nodiscard]] constexpr auto leverage_score(budget_size budget) noexcept {
  return of_cache(restkv::leverage_score{}, budget);
}

/// The range of a value's channels (VaSE, arXiv 2606.03928, its deterministic half).
[[nodiscard]] constexpr auto value_range(budget_size budget) noexcept {
  return of_cache(restkv::value_range{}, budget, {.sink = 4, .recent = 32});
}

/// Expected attention (arXiv 2510.00636) for queries of a given mean and covariance (`query_statistics`), heads competing.
[[nodiscard]] constexpr auto expected_attention(budget_size budget, tensor_view<const double, 3> mean,
                                                tensor_view<const double, 4> covariance) noexcept {
  return eviction_policy{.score = restkv::expected_attention{.mean = mean, .covariance = covariance, .epsilon = 0.01},
                         .spatial = no_pool{},
                         .group = group_reduce::mean,
                         .budget = restkv::ada_kv{.budget = budget},
                         .protect = {.sink = 4, .recent = 0}};
}

/// CapKV (arXiv 2604.25975) for queries of a given mean (`query_statistics`).
[[nodiscard]] constexpr auto cap_kv(budget_size budget, tensor_view<const double, 3> mean) noexcept {
  return of_cache(restkv::cap_kv{.mean = mean}, budget);
}

/// Q-Filters (arXiv 2503.02812) with given filters, [kv_heads, head_dim].
[[nodiscard]] constexpr auto q_filter(budget_size budget, tensor_view<const float, 2> filters) noexcept {
  return of_cache(restkv::q_filter{.filters = filters}, budget, {.sink = 0, .recent = 0});
}

/// LaCache's ladder (arXiv 2507.14204) as a compression of the prompt, for a budget by count.
[[nodiscard]] constexpr auto la_cache(index_t tokens) noexcept {
  return of_cache(la_cache_score{.ladder = {.cache_size = tokens}}, tokens, {.sink = 0, .recent = 0});
}

}  // namespace restkv::presets
