// SPDX-License-Identifier: Apache-2.0
/// @file
/// Running scores: what a token was worth to every query so far, kept in one number. The concept, and its models.
#pragma once

#include <restkv/core/larger.hpp>
#include <restkv/core/status.hpp>
#include <restkv/score/head_score.hpp>

#include <concepts>
#include <type_traits>
#include <variant>

namespace restkv {

/// A running score: how the scores that one query after the other gives to a token become one number, without the
/// queries being kept. `fold(running, value, observers)` is the number after the next query, `observers` being how many
/// queries came before (0: `running` is not set); `score(running, observers)` is what the token is worth. Optional:
/// `status check() const`.
///
/// It takes the place of a policy's temporal smoother, before the reduction over the query heads of a group.
template <class R>
concept running_score = requires(const R& reduction, double value, index_t observers) {
  { reduction.fold(value, value, observers) } -> std::convertible_to<double>;
  { reduction.score(value, observers) } -> std::convertible_to<double>;
};

/// No running score: at each eviction the policy asks its window of recent queries.
struct no_running {};

/// m = m + s, the sum over all queries since the token came: with attention as the score, H2O (arXiv 2306.14048).
struct running_sum {
  ///@{
  /// See `running_score`.
  [[nodiscard]] RESTKV_HD double fold(double running, double value, index_t observers) const noexcept {
    return observers == 0 ? value : running + value;
  }
  [[nodiscard]] RESTKV_HD double score(double running, index_t) const noexcept { return running; }
  ///@}
};

/// The sum divided by the number of queries that saw the token, so that old tokens have no advantage over new ones
/// (the observed attention of NVIDIA's kvpress).
struct running_mean {
  ///@{
  /// See `running_score`.
  [[nodiscard]] RESTKV_HD double fold(double running, double value, index_t observers) const noexcept {
    return observers == 0 ? value : running + value;
  }
  [[nodiscard]] RESTKV_HD double score(double running, index_t observers) const noexcept {
    return observers == 0 ? 0.0 : running / static_cast<double>(observers);
  }
  ///@}
};

/// m = decay m + (1 - decay) s; the first query sets m = s (InertiaKV, arXiv 2609.03515: decay 0.8, refreshed every 4
/// tokens; 0.95 suits retrieval). `ema{.alpha = a}` over a window has decay 1 - a.
struct running_ema {
  float decay = 0.8f;  ///< weight of what was, in [0, 1)

  ///@{
  /// See `running_score`.
  [[nodiscard]] RESTKV_HD double fold(double running, double value, index_t observers) const noexcept {
    const auto kept = static_cast<double>(decay);
    return observers == 0 ? value : kept * running + (1.0 - kept) * value;
  }
  [[nodiscard]] RESTKV_HD double score(double running, index_t) const noexcept { return running; }
  ///@}
  /// Fails on a decay outside [0, 1).
  [[nodiscard]] status check() const noexcept {
    if (!(decay >= 0.0f && decay < 1.0f)) {
      return status::error(errc::invalid_argument, "running_ema.decay is %g, must be at least 0 and below 1",
                           double{decay});
    }
    return {};
  }
};

/// The largest score of any query so far; NaN once any was NaN.
struct running_maximum {
  ///@{
  /// See `running_score`.
  [[nodiscard]] RESTKV_HD double fold(double running, double value, index_t observers) const noexcept {
    return observers == 0 ? value : detail::larger(running, value);
  }
  [[nodiscard]] RESTKV_HD double score(double running, index_t) const noexcept { return running; }
  ///@}
};

/// The score of the last query: with attention, the group's mean and one kept set for all heads, TOVA (arXiv
/// 2401.06104).
struct running_last {
  ///@{
  /// See `running_score`.
  [[nodiscard]] RESTKV_HD double fold(double, double value, index_t) const noexcept { return value; }
  [[nodiscard]] RESTKV_HD double score(double running, index_t) const noexcept { return running; }
  ///@}
};

/// A running score chosen at run time, see `runtime_parts.hpp`.
struct any_running {
  /// What it behaves like.
  std::variant<running_sum, running_mean, running_ema, running_maximum, running_last> choice{};

  ///@{
  /// See `running_score`; as the choice.
  [[nodiscard]] double fold(double running, double value, index_t observers) const noexcept {
    return std::visit([&](const auto& part) { return part.fold(running, value, observers); }, choice);
  }
  [[nodiscard]] double score(double running, index_t observers) const noexcept {
    return std::visit([&](const auto& part) { return part.score(running, observers); }, choice);
  }
  [[nodiscard]] status check() const noexcept {
    const auto* const average = std::get_if<running_ema>(&choice);
    return average == nullptr ? status{} : average->check();
  }
  ///@}
};

namespace detail {

/// True for a session whose scores run along with its tokens.
template <class R>
inline constexpr bool runs = running_score<R>;

/// A score asked by one query. One that needs of a query nothing but its attention is asked for the query's own token
/// too, as H2O does.
template <class Score>
struct observed_score : Score {
  static constexpr bool scores_window = needs_attention_alone<Score>();
};

/// The running scores of a layer as a score of whole heads, so that they take part in the group reduction, the
/// smoothing and the budget like any other.
template <class Running>
struct running_rows {
  static constexpr cache_part reads = cache_part::none;
  static constexpr bool per_query_head = true;

  tensor_view<const double, 2> running{};          // [query_heads, capacity]
  tensor_view<const std::int32_t, 2> observers{};  // [kv_heads, capacity]
  Running reduction{};

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real>) const noexcept {
    for (index_t n = 0; n < head.length(); ++n) {
      const index_t seen_by = observers(head.kv_head(), n);
      const double kept = seen_by == 0 ? 0.0 : running(head.query_head(), n);
      scores[static_cast<std::size_t>(n)] = static_cast<Real>(reduction.score(kept, seen_by));
    }
  }
};

}  // namespace detail

}  // namespace restkv
