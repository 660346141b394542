// SPDX-License-Identifier: Apache-2.0
/// @file
/// `eviction_policy`: a policy put together from its parts.
#pragma once

#include <restkv/budget/ada_kv.hpp>
#include <restkv/budget/pyramid.hpp>
#include <restkv/budget/uniform.hpp>
#include <restkv/rescoring/rescoring.hpp>
#include <restkv/score/group_reduce.hpp>
#include <restkv/score/head_score.hpp>
#include <restkv/score/random.hpp>
#include <restkv/score/rest_kv.hpp>
#include <restkv/score/snap_kv.hpp>
#include <restkv/score/streaming_llm.hpp>
#include <restkv/selection/granularity.hpp>
#include <restkv/selection/protection.hpp>
#include <restkv/smoothing/adaptive_window.hpp>
#include <restkv/smoothing/spatial.hpp>
#include <restkv/smoothing/temporal.hpp>

#include <limits>

namespace restkv {

namespace detail {

/// Says what a score lacks: one that has `reads` is meant to be a `head_score`, any other a `token_score`.
template <class Score>
struct checked_score {
  static_assert(token_score<Score>,
                "a score needs `static constexpr restkv::feature needs` and a const call operator from token_features");
};
template <has_constant_reads Score>
struct checked_score<Score> {
  static_assert(head_score<Score>,
                "a score of whole heads needs score_head(const head_view<T>&, span scores, span scratch) const");
};

}  // namespace detail

/// The window that holds every query of a sequence, for scores that need nothing but attention.
inline constexpr index_t every_query = std::numeric_limits<position_t>::max();

/// Which tokens to keep, as a value. Data flows score -> temporal (over the window's queries) -> group (over the query
/// heads of a KV head) -> spatial (over tokens) -> rescoring (of a head's row) -> budget (over heads) -> the best tokens,
/// chunks or pages of each head, and the protected ones.
///
/// Written with designated initialisers, the part types are deduced (GCC 11, Clang 17 or newer; older compilers name
/// them: `eviction_policy<snap_kv, mean>{}`). What is left out is the library's default policy.
template <class Score = rest_kv, class Temporal = mean, class Spatial = average_pool, class Budget = ada_kv,
          class Rescoring = no_rescoring>
struct eviction_policy {
  // Asserted rather than constrained: where a part's type is deduced, clang does not say why it rejects one.
  static_assert(sizeof(detail::checked_score<Score>) > 0);
  static_assert(temporal_smoother<Temporal>,
                "a temporal smoother needs a const call operator from the window's values, a span, to one value");
  static_assert(spatial_smoother<Spatial>,
                "a spatial smoother needs a const call operator (span in, span out, const row_context&)");
  static_assert(budget_allocator<Budget>,
                "a budget allocator needs tokens_per_head(problem), most_per_head(problem) and allocate(...)");
  static_assert(rescorer<Rescoring>,
                "a rescorer needs rescore(head, context, span weights, span scores, span scratch)");
  static_assert(!scores_window<Score>() || (needs_attention_alone<Score>() && streaming_temporal_smoother<Temporal>),
                "a score with scores_window needs of a query attention, odds or logit alone, and a temporal smoother that "
                "is linear or has fold(running, value, first)");

  Score score{};                          ///< what a token is worth to one query; see `token_score`
  /// Observation window, the last queries, `every_query` for all; unused by scores without queries.
  index_t window = 32;
  Temporal temporal{};                    ///< over the window's queries; see `temporal_smoother`
  Spatial spatial{};                      ///< over tokens; see `spatial_smoother`
  group_reduce group = group_reduce::l2;  ///< over the query heads of a KV head
  Rescoring rescoring{};                  ///< a second look at the smoothed scores; see `rescorer`
  Budget budget{};                        ///< tokens per head; see `budget_allocator`
  protection protect{};                   ///< tokens that are kept whatever their score
  restkv::granularity granularity{};      ///< what is evicted together: tokens, chunks or pages; heads apart or not

  /// Tokens at the end of each sequence that are always kept.
  [[nodiscard]] constexpr index_t recent() const noexcept {
    return needs_window<Score>() && !scores_window<Score>() ? std::max(window, protect.recent) : protect.recent;
  }

  /// Checks every part's parameters; the first bad one is named with its value.
  [[nodiscard]] status check() const noexcept {
    const auto check_part = [](const auto& part) -> status {
      if constexpr (requires { { part.check() } -> std::same_as<status>; }) {
        return part.check();
      } else {
        return {};
      }
    };
    RESTKV_RETURN_IF_FAILED(check_part(score));
    RESTKV_RETURN_IF_FAILED(check_part(temporal));
    RESTKV_RETURN_IF_FAILED(check_part(spatial));
    RESTKV_RETURN_IF_FAILED(check_part(rescoring));
    RESTKV_RETURN_IF_FAILED(check_part(budget));
    RESTKV_RETURN_IF_FAILED(protect.check());
    RESTKV_RETURN_IF_FAILED(granularity.check());
    if constexpr (needs_window<Score>()) RESTKV_RETURN_IF_FAILED(check_window());
    if (granularity.shared && rescoring_reads_cache<Rescoring>()) {
      return status::error(errc::invalid_argument,
                           "the rescorer reads a head's own cache: it does not go with granularity.shared");
    }
    if (granularity.shared && group == group_reduce::none) {
      return status::error(errc::invalid_argument,
                           "granularity.shared reduces the scores of all heads to one row: group may not be none");
    }
    return {};
  }

 private:
  [[nodiscard]] status check_window() const noexcept {
    const index_t longest = needs_attention_alone<Score>() ? every_query : most_window;
    if (window < 1 || window > longest) {
      return status::error(errc::invalid_argument, "the observation window is %lld queries, must be within [1, %lld]",
                           static_cast<long long>(window), static_cast<long long>(longest));
    }
    if (has(features_of<Score>(), feature::logit) && order_of(score) == query_order::after) {
      return status::error(errc::invalid_argument,
                           "the score looks at logits, which belong to one query each: its order must be before");
    }
    if (order_of(score) == query_order::after && !is_average(temporal)) {
      return status::error(errc::invalid_argument,
                           "the order after smooths attention rows: its temporal smoother must be an average of rows, or "
                           "one of them");
    }
    if (!scores_window<Score>() && window <= most_window) return {};
    // The queries are taken block by block.
    if (!streaming_temporal_smoother<Temporal>) {
      return status::error(errc::invalid_argument,
                           "a window of %lld queries needs a temporal smoother that is linear or has fold; beyond %lld "
                           "no other can be used",
                           static_cast<long long>(window), static_cast<long long>(most_window));
    }
    if (order_of(score) == query_order::after) {
      return status::error(errc::invalid_argument,
                           "a window of %lld queries is scored query by query: the score's order must be before",
                           static_cast<long long>(window));
    }
    if (uses_drift(spatial)) {
      return status::error(errc::invalid_argument,
                           "adaptive_window compares the halves of an observation window of at most %lld queries: the "
                           "policy observes %lld",
                           static_cast<long long>(most_window), static_cast<long long>(window));
    }
    return {};
  }
};

/// A policy with another score, temporal smoother and budget, its other parts as they are.
template <class Score, class Temporal, class Spatial, class Budget, class Rescoring, any_score OtherScore,
          temporal_smoother OtherTemporal, budget_allocator OtherBudget>
[[nodiscard]] constexpr eviction_policy<OtherScore, OtherTemporal, Spatial, OtherBudget, Rescoring> with_parts(
    const eviction_policy<Score, Temporal, Spatial, Budget, Rescoring>& policy, const OtherScore& score,
    const OtherTemporal& temporal, const OtherBudget& budget) noexcept {
  return {score,  policy.window,  temporal,          policy.spatial, policy.group, policy.rescoring,
          budget, policy.protect, policy.granularity};
}

}  // namespace restkv
