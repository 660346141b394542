// SPDX-License-Identifier: Apache-2.0
/// @file
/// Budgets across the layers of a model: the `model_budget` concept.
#pragma once

#include <restkv/budget/budget.hpp>

namespace restkv {

/// What is known of one sequence in one layer when the layers' shares are decided.
struct layer_summary {
  index_t layer = 0;              ///< index of the layer
  index_t layers = 1;             ///< layers of the model
  index_t candidates = 0;         ///< units that may be evicted, all heads together
  double score_sum = 0;           ///< of the candidates' smoothed scores, all heads together; of a unit, its score
  double score_entropy = 0;  ///< of the scores as shares of their sum, relative to the largest possible: within [0, 1]
  /// -sum of a log(a + 1e-10) over query heads, the window's queries and the tokens before it; needs_attention
  double attention_entropy = 0;
  /// sum over query heads and tokens before the window of the variance of a over the window's queries; needs_attention
  double attention_variance = 0;
};

namespace detail {

template <class B>
concept has_model_size = requires(const B& budget) {
  { budget.budget } -> std::convertible_to<budget_size>;
  { budget.least } -> std::convertible_to<index_t>;
};

template <class B>
concept divides_by_preference = requires(const B& budget, const layer_summary& summary) {
  { budget.preference(summary) } -> std::convertible_to<double>;
};

}  // namespace detail

/// A budget across layers:
///
/// * `budget_size budget`: the mean over all layers and heads, protected tokens included. The model keeps layers *
///   heads times that, exactly.
/// * `index_t least`: candidates that every head keeps in any case, its best ones.
/// * `static constexpr bool compares_heads`: whether the best scores of all heads together are kept, or as many in each
///   head. The same of layers with `static constexpr bool compares_layers` (default false): then all scores of the
///   model compete, after `scale(summary)`, a factor for the layer's scores, where the budget has that.
/// * `double preference(const layer_summary&)`, where layers do not compete by scores: what a layer's share is
///   proportional to. Negative numbers and NaN count as 0.
/// * `static constexpr bool needs_attention` (default false): whether the summary's attention_entropy and
///   attention_variance are wanted. The policy then needs an observation window.
/// * `status check() const`.
template <class B>
concept model_budget = detail::has_model_size<B> && requires {
  { B::compares_heads } -> std::convertible_to<bool>;
} && (detail::divides_by_preference<B> || requires { requires bool(B::compares_layers); });

/// True where the scores of all layers compete.
template <model_budget B>
[[nodiscard]] constexpr bool compares_layers() noexcept {
  if constexpr (requires { { B::compares_layers } -> std::convertible_to<bool>; }) return B::compares_layers;
  return false;
}

/// True where a budget looks at the window's attention.
template <model_budget B>
[[nodiscard]] constexpr bool needs_attention() noexcept {
  if constexpr (requires { { B::needs_attention } -> std::convertible_to<bool>; }) return B::needs_attention;
  return false;
}

namespace detail {

/// What the checks of model budgets share.
[[nodiscard]] inline status check_model_size(const char* owner, const budget_size& budget, index_t least) noexcept {
  if (least < 0) {
    return status::error(errc::invalid_argument, "%s.least is %lld, must be at least 0", owner,
                         static_cast<long long>(least));
  }
  return budget.check(owner);
}

}  // namespace detail

}  // namespace restkv
