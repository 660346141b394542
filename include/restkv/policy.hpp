// SPDX-License-Identifier: Apache-2.0
/// @file
/// `eviction_policy`: a policy put together from its parts.
#pragma once

#include <restkv/budget/ada_kv.hpp>
#include <restkv/budget/pyramid.hpp>
#include <restkv/budget/uniform.hpp>
#include <restkv/score/group_reduce.hpp>
#include <restkv/score/random.hpp>
#include <restkv/score/rest_kv.hpp>
#include <restkv/score/snap_kv.hpp>
#include <restkv/score/streaming_llm.hpp>
#include <restkv/selection/protection.hpp>
#include <restkv/smoothing/adaptive_window.hpp>
#include <restkv/smoothing/spatial.hpp>
#include <restkv/smoothing/temporal.hpp>

namespace restkv {

/// Which tokens to keep, as a value. Data flows score -> temporal (over the window's queries) -> group (over the query
/// heads of a KV head) -> spatial (over tokens) -> budget (over heads) -> the best tokens of each head, and the
/// protected ones.
///
/// Written with designated initialisers, the part types are deduced (GCC 11, Clang 17 or newer; older compilers name
/// them: `eviction_policy<snap_kv, mean>{}`). What is left out is the library's default policy.
template <class Score = rest_kv, class Temporal = mean, class Spatial = average_pool, class Budget = ada_kv>
struct eviction_policy {
  // Asserted rather than constrained: where a part's type is deduced, clang does not say why it rejects one.
  static_assert(token_score<Score>,
                "a score needs `static constexpr restkv::feature needs` and a const call operator from token_features");
  static_assert(temporal_smoother<Temporal>,
                "a temporal smoother needs a const call operator from the window's values, a span, to one value");
  static_assert(spatial_smoother<Spatial>,
                "a spatial smoother needs a const call operator (span in, span out, const row_context&)");
  static_assert(budget_allocator<Budget>,
                "a budget allocator needs tokens_per_head(problem), most_per_head(problem) and allocate(...)");

  Score score{};                          ///< what a token is worth to one query; see `token_score`
  index_t window = 32;                    ///< observation window, the last queries; unused by scores without queries
  Temporal temporal{};                    ///< over the window's queries; see `temporal_smoother`
  Spatial spatial{};                      ///< over tokens; see `spatial_smoother`
  group_reduce group = group_reduce::l2;  ///< over the query heads of a KV head
  Budget budget{};                        ///< tokens per head; see `budget_allocator`
  protection protect{};                   ///< tokens that are kept whatever their score

  /// Tokens at the end of each sequence that are always kept.
  [[nodiscard]] constexpr index_t recent() const noexcept {
    return needs_window<Score>() ? std::max(window, protect.recent) : protect.recent;
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
    RESTKV_RETURN_IF_FAILED(check_part(budget));
    RESTKV_RETURN_IF_FAILED(protect.check());
    if (needs_window<Score>() && (window < 1 || window > 1024)) {
      return status::error(errc::invalid_argument, "the observation window is %lld queries, must be within [1, 1024]",
                           static_cast<long long>(window));
    }
    return {};
  }
};

}  // namespace restkv
