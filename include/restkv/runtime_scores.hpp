// SPDX-License-Identifier: Apache-2.0
/// @file
/// Head scores chosen at run time: for programs that read their policy from a file. Each type holds one of the scores of
/// its kind and behaves exactly like it; one instantiation of `select` then serves all of them.
#pragma once

#include <restkv/score/cap_kv.hpp>
#include <restkv/score/cur_dkv.hpp>
#include <restkv/score/expected_attention.hpp>
#include <restkv/score/given_scores.hpp>
#include <restkv/score/key_diff.hpp>
#include <restkv/score/key_redundancy.hpp>
#include <restkv/score/knorm.hpp>
#include <restkv/score/lag_kv.hpp>
#include <restkv/score/leverage_score.hpp>
#include <restkv/score/q_filter.hpp>
#include <restkv/score/value_range.hpp>
#include <restkv/selection/la_cache.hpp>

#include <type_traits>
#include <variant>

namespace restkv {

namespace detail {

/// One of several head scores.
template <bool PerQueryHead, class... Scores>
struct head_score_choice {
  std::variant<Scores...> choice{};  ///< the score it behaves like

  ///@{
  /// See `head_score`; as the choice.
  static constexpr cache_part reads = cache_part::keys | cache_part::values;
  static constexpr bool per_query_head = PerQueryHead;

  [[nodiscard]] index_t scratch_size(const problem_shape& shape) const noexcept {
    return std::visit([&](const auto& score) { return scratch_size_of(score, shape); }, choice);
  }
  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    std::visit([&](const auto& score) { score.score_head(head, scores, scratch); }, choice);
  }
  [[nodiscard]] status check() const noexcept {
    return std::visit(
        [](const auto& score) -> status {
          if constexpr (requires { score.check(); }) return score.check();
          return {};
        },
        choice);
  }
  [[nodiscard]] status check(const problem_shape& shape) const noexcept {
    return std::visit(
        [&](const auto& score) -> status {
          if constexpr (requires { score.check(shape); }) return score.check(shape);
          return {};
        },
        choice);
  }
  ///@}
};

}  // namespace detail

/// A score of a KV head's cache: the same for all query heads of a group. A layer must have values, whatever the choice.
struct any_head_score
    : detail::head_score_choice<false, knorm, key_diff, lag_kv, cur_dkv, leverage_score, key_redundancy, value_range,
                                q_filter, la_cache_score, given_scores<score_rows::kv_heads>> {};

/// A score of a KV head's cache that differs between the query heads of a group. A layer must have values, whatever the
/// choice.
struct any_query_head_score : detail::head_score_choice<true, expected_attention, cap_kv,
                                                        given_scores<score_rows::query_heads>> {};

static_assert(head_score<any_head_score> && std::is_trivially_copyable_v<any_head_score>);
static_assert(head_score<any_query_head_score> && scores_query_heads<any_query_head_score>() &&
              std::is_trivially_copyable_v<any_query_head_score>);

}  // namespace restkv
