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
  double score_entropy = 0;       ///< of the scores as shares of their sum, relative to the largest possible: within [0, 1]
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
/// * `budget_size budget`: the mean over all layers and heads, protected tokens included. The model keeps layers * heads
///   times that, exactly.
/// * `index_t least`: candidates that every head keeps in any case, its best ones.
/// * `static constexpr bool compares_heads`: whether the best scores of all heads together are kept, or as many in each
///   head. The same of layers with `static constexpr bool compares_layers` (default false): then all scores of the model
///   compete, after `scale(summary)`, a factor for the layer's scores, where the budget has that.
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

/// Layers by how spread and how restless their attention is (CAKE, arXiv 2503.12491): the share of a layer is proportional to
///
///     entropy^(1 / entropy_temperature) * variance^(1 / variance_temperature)
///
/// with the summary's attention_entropy and attention_variance; every head of a layer keeps as many. Published temperatures
/// (entropy, variance): Llama 3.1 (1.6, 0.4) for 1024 tokens, (1.6, 0.6) for 128; Mistral 0.3 (0.8, 0.5) and (1, 0.8);
/// Qwen 2.5 (1.5, 0.6) and (0.4, 0.6); else (1, 1). The published policy: `snap_kv` with `mean_variance` over 32 queries,
/// the group's mean, `average_pool` of 5. The released code cuts shares off and hands the rest out evenly; here they are
/// apportioned, so that the total is exact and a layer's share never rises while layers come in.
struct cake_budget {
  budget_size budget{};               ///< mean over all layers and heads
  index_t least = 0;                  ///< candidates that every head keeps
  float entropy_temperature = 1.0f;   ///< > 0
  float variance_temperature = 1.0f;  ///< > 0

  ///@{
  /// See `model_budget`.
  static constexpr bool compares_heads = false;
  static constexpr bool needs_attention = true;

  [[nodiscard]] double preference(const layer_summary& summary) const noexcept {
    return std::pow(summary.attention_entropy, 1.0 / static_cast<double>(entropy_temperature)) *
           std::pow(summary.attention_variance, 1.0 / static_cast<double>(variance_temperature));
  }
  ///@}
  /// Fails on a temperature that is not above 0 and on a bad budget.
  [[nodiscard]] status check() const noexcept {
    for (const float temperature : {entropy_temperature, variance_temperature}) {
      if (temperature > 0.0f && std::isfinite(temperature)) continue;
      return status::error(errc::invalid_argument, "cake_budget has a temperature of %g, must be above 0",
                           double{temperature});
    }
    return detail::check_model_size("cake_budget", budget, least);
  }
};

/// Layers by the entropy of their scores, heads by competition (LAVa, arXiv 2509.09754): the share of a layer is
/// proportional to the summary's score_entropy, and the best scores of the layer's heads together are kept. With `lava` as the
/// policy's rescoring, which makes the heads' scores comparable.
struct lava_budget {
  budget_size budget{};  ///< mean over all layers and heads
  index_t least = 0;     ///< candidates that every head keeps

  ///@{
  /// See `model_budget`.
  static constexpr bool compares_heads = true;

  [[nodiscard]] constexpr double preference(const layer_summary& summary) const noexcept {
    return summary.score_entropy;
  }
  ///@}
  /// Fails on a bad budget.
  [[nodiscard]] status check() const noexcept { return detail::check_model_size("lava_budget", budget, least); }
};

/// One competition of all scores of all layers and heads (LaProx, arXiv 2605.07234; Layer-DefensiveKV, arXiv 2510.13334). With
/// `normalise` a layer's scores count as shares of their sum, for scores whose size differs from layer to layer.
struct global_budget {
  budget_size budget{};   ///< mean over all layers and heads
  index_t least = 0;      ///< candidates that every head keeps
  bool normalise = false;  ///< divide scores by the sum of their layer's

  ///@{
  /// See `model_budget`.
  static constexpr bool compares_heads = true;
  static constexpr bool compares_layers = true;

  [[nodiscard]] double scale(const layer_summary& summary) const noexcept {
    return normalise && summary.score_sum > 0 && std::isfinite(summary.score_sum) ? 1.0 / summary.score_sum : 1.0;
  }
  ///@}
  /// Fails on a bad budget.
  [[nodiscard]] status check() const noexcept { return detail::check_model_size("global_budget", budget, least); }
};

static_assert(model_budget<cake_budget> && model_budget<lava_budget> && model_budget<global_budget>);

}  // namespace restkv
