// SPDX-License-Identifier: Apache-2.0
/// @file
/// Rescoring: a second look at a head's smoothed scores before tokens are chosen. The `rescorer` concept.
///
/// What a score of single tokens cannot say: two-stage choices (CriticalKV), a penalty for keys that repeat each other
/// (R-KV), a factor that is the same for a whole head (LAVa), the output of the scores themselves (CAOTE over any score).
#pragma once

#include <restkv/score/head_score.hpp>

#include <concepts>
#include <span>

namespace restkv {

/// What a rescorer knows of its row besides the head.
template <std::floating_point Real>
struct rescoring_context {
  /// The rescorer's weights, of the tokens that scores are defined for; empty where it has none.
  std::span<const Real> weights{};
  /// Attention of the same tokens, the mean over the window's queries and the row's query heads; empty unless asked for.
  std::span<const Real> attention{};

  index_t keep = 0;   ///< candidates the head keeps: its own number with `after_budget`, the layer's mean otherwise
  index_t heads = 1;  ///< query heads whose scores the row holds: head.query_head() is the first
  index_t protected_tokens = 0;              ///< tokens of the head that are kept whatever their score
  index_t first = 0;                         ///< first candidate
  index_t end = 0;                           ///< one behind the last
  tensor_view<const std::uint8_t, 1> mask{};  ///< keep_mask of the head's tokens; null where there is none

  /// True for a candidate.
  [[nodiscard]] constexpr bool may_evict(index_t n) const noexcept {
    return n >= first && n < end && (mask.data == nullptr || mask(n) == 0);
  }
};

/// The weight of a rescorer that needs none.
struct no_weight {
  ///@{
  /// See `token_score`.
  static constexpr feature needs = feature::none;
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD constexpr Real operator()(const token_features<Real>&) const noexcept {
    return Real(0);
  }
  ///@}
};

namespace detail {

template <class R, class Real>
concept rescores_rows = requires(const R& rescorer, const head_view<float>& head, const rescoring_context<Real>& context,
                                 std::span<Real> row) { rescorer.rescore(head, context, row, row); };

template <class R>
concept has_weight = any_score<decltype(R::weight)>;

}  // namespace detail

/// A rescorer:
///
///     template <restkv::element T, std::floating_point Real>
///     void rescore(const restkv::head_view<T>& head, const restkv::rescoring_context<Real>& context,
///                  std::span<Real> scores, std::span<Real> scratch) const noexcept;
///
/// replaces the smoothed scores of one row, those of the tokens that scores are defined for, by others. Optional members:
/// `weight`, a score without queries that the backend evaluates for every token beforehand (mean over the query heads
/// of the row), and `static constexpr bool weights_are_shares = true`, for weights that are divided by their sum over the
/// heads of the layer, token by token; `static constexpr bool reads_attention = true`; `index_t scratch_size(const problem_shape&) const`; `static constexpr
/// bool after_budget = true`, for a rescorer that reorders tokens within a head once the heads' budgets were given by
/// the scores before it; `static constexpr cache_part reads`; `status check() const`.
template <class R>
concept rescorer = detail::rescores_rows<R, float> && detail::rescores_rows<R, double>;

/// The scores as they are.
struct no_rescoring {
  ///@{
  /// See `rescorer`.
  template <element T, std::floating_point Real>
  constexpr void rescore(const head_view<T>&, const rescoring_context<Real>&, std::span<Real>,
                         std::span<Real>) const noexcept {}
  ///@}
};

/// True for a rescorer that does anything.
template <rescorer R>
inline constexpr bool rescores = !std::is_same_v<R, no_rescoring>;

/// True for a rescorer that runs once the heads' budgets are known.
template <rescorer R>
[[nodiscard]] constexpr bool rescores_after_budget() noexcept {
  if constexpr (requires { { R::after_budget } -> std::convertible_to<bool>; }) return R::after_budget;
  return false;
}

/// The score that a rescorer's weights come from.
template <rescorer R>
[[nodiscard]] constexpr auto weight_of(const R& rescoring) noexcept {
  if constexpr (detail::has_weight<R>) {
    return rescoring.weight;
  } else {
    return no_weight{};
  }
}

/// True for a rescorer whose weights are divided by their sum over the heads of the layer.
template <rescorer R>
[[nodiscard]] constexpr bool weights_are_shares() noexcept {
  if constexpr (requires { { R::weights_are_shares } -> std::convertible_to<bool>; }) return R::weights_are_shares;
  return false;
}

/// True for a rescorer that looks at the window's attention.
template <rescorer R>
[[nodiscard]] constexpr bool rescoring_reads_attention() noexcept {
  if constexpr (requires { { R::reads_attention } -> std::convertible_to<bool>; }) return R::reads_attention;
  return false;
}

/// What the rescorer reads of a head's cache by itself.
template <rescorer R>
[[nodiscard]] constexpr cache_part parts_of() noexcept {
  if constexpr (requires { typename std::integral_constant<cache_part, R::reads>; }) return R::reads;
  return cache_part::none;
}

/// True when the rescorer reads a head's cache by itself.
template <rescorer R>
[[nodiscard]] constexpr bool rescoring_reads_cache() noexcept {
  return parts_of<R>() != cache_part::none;
}

/// True when the rescorer reads values, by itself or for its weights.
template <rescorer R>
[[nodiscard]] constexpr bool rescoring_needs_values() noexcept {
  return has(parts_of<R>(), cache_part::values) || needs_values<decltype(weight_of(std::declval<const R&>()))>();
}

}  // namespace restkv
