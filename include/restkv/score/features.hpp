// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a score is computed from: named per-token features, and the `token_score` concept.
///
/// A backend computes features, never a policy by name. A score is a struct that says which features it needs and
/// combines them; that is all it takes for a user's own score to run on every backend.
#pragma once

#include <restkv/core/config.hpp>
#include <restkv/core/counter_random.hpp>

#include <cmath>
#include <concepts>
#include <limits>
#include <type_traits>

namespace restkv {

/// Facts about one token under one query (or under the smoothed attention, see `query_order`). Combine with `|`.
enum class feature : unsigned {
  none = 0,
  attention = 1u << 0,    ///< a = softmax(q k / sqrt(d))[n]
  odds = 1u << 1,         ///< a / (1 - a), computed without cancellation
  distance = 1u << 2,     ///< ||o - v_n||, or ||W (o - v_n)|| in the projection metric
  output_norm = 1u << 3,  ///< ||o||, or ||W o||
  value_norm = 1u << 4,   ///< ||v_n||, or ||W v_n||
  key_norm = 1u << 5,     ///< ||k_n||
  logit = 1u << 6,        ///< z = q k / sqrt(d)
  alignment = 1u << 7,    ///< <o, v_n>, or <W o, W v_n> in the projection metric
  value_norm_l1 = 1u << 8,  ///< the sum of |v_n[c]| over the channels c, whatever the metric
  projected_norm_l1 = 1u << 10,  ///< ||W[h] v_n||_1, the sum over the hidden channels; needs layer.projection
  mean_distance = 1u << 9,  ///< as distance, with the mean of the sequence's values in place of the output
};

/// Both sets together.
[[nodiscard]] RESTKV_HD constexpr feature operator|(feature a, feature b) noexcept {
  return static_cast<feature>(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}

/// True when `set` holds at least one of the features in `wanted`.
[[nodiscard]] RESTKV_HD constexpr bool has(feature set, feature wanted) noexcept {
  return (static_cast<unsigned>(set) & static_cast<unsigned>(wanted)) != 0;
}

/// The features that come from window queries; a score without any of them needs no queries at all.
inline constexpr feature window_features = feature::attention | feature::odds | feature::distance |
                                           feature::output_norm | feature::logit | feature::alignment;

/// The features that come from the attention output of a query.
inline constexpr feature output_features = feature::distance | feature::output_norm | feature::alignment;

/// The features that a value takes part in.
inline constexpr feature value_features =
    output_features | feature::value_norm | feature::value_norm_l1 | feature::mean_distance | feature::projected_norm_l1;

/// The features that are measured in a metric.
inline constexpr feature metric_features = output_features | feature::value_norm | feature::mean_distance;

/// The least part of its attention that a query leaves to all tokens but one: where those would get less, they get this
/// together, in their true proportions. What deleting the one token does to the output depends on the proportions
/// alone, so its score stays what it is, and no odds pass 1 / least_rest.
inline constexpr double least_rest = 1e-30;

/// When the queries of the window are reduced to one row.
enum class query_order {
  before,  ///< score each query's attention, over all tokens, then reduce the scores (the ReST-KV paper)
  after,   ///< reduce the attention rows first, over past tokens, then score once (the ReST-KV release)
};

/// The longest window of scores that need more of a query than its attention.
inline constexpr index_t most_window = 1024;

/// In which norm a change of the output is measured.
enum class metric {
  identity,    ///< ||x||, the head's own output
  projection,  ///< ||W[h] x||, the layer's hidden output
};

/// What is done to the logits before their softmax: z becomes (z + noise) / temperature, the noise a standard Gumbel
/// number for each sequence, query head, query and token, the same on every backend.
struct logit_perturbation {
  float temperature = 1.0f;  ///< > 0
  bool gumbel = false;       ///< add the noise
  std::uint64_t seed = 0;    ///< of the noise

  /// True where logits change at all.
  [[nodiscard]] constexpr bool active() const noexcept { return gumbel || temperature != 1.0f; }
  /// The perturbed logit of a token under the query at position `query` of its sequence.
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(Real logit, index_t batch, index_t head, index_t query,
                                          index_t token) const noexcept {
    if (gumbel) {
      constexpr auto least = static_cast<Real>(2.98023223876953125e-08);  // 2^-25, so that no logarithm is infinite
      const Real uniform = uniform_of<Real>(counter_bits(seed, batch, head, query, token));
      logit -= std::log(-std::log(uniform > least ? uniform : least));
    }
    return logit / static_cast<Real>(temperature);
  }
};

/// The same for a part of a layer's query heads, whose first is head `first_head` of the layer.
struct head_perturbation {
  logit_perturbation noise{};  ///< of the layer
  index_t first_head = 0;      ///< of those at hand

  constexpr head_perturbation() = default;
  /// Of heads from `first` on.
  constexpr head_perturbation(const logit_perturbation& of_layer,  // NOLINT(google-explicit-constructor)
                              index_t first = 0) noexcept
      : noise(of_layer), first_head(first) {}
  /// True where logits change at all.
  [[nodiscard]] constexpr bool active() const noexcept { return noise.active(); }
  /// The perturbed logit; `head` counts the heads at hand.
  template <std::floating_point Real>
  [[nodiscard]] Real operator()(Real logit, index_t batch, index_t head, index_t query, index_t token) const noexcept {
    return noise(logit, batch, first_head + head, query, token);
  }
};

/// The features of one token. Only those a score asks for are set; the rest are 0.
template <std::floating_point Real>
struct token_features {
  Real attention = 0;    ///< see feature::attention
  Real odds = 0;         ///< see feature::odds
  Real distance = 0;     ///< see feature::distance
  Real output_norm = 0;  ///< see feature::output_norm
  Real value_norm = 0;   ///< see feature::value_norm
  Real key_norm = 0;     ///< see feature::key_norm
  Real logit = 0;        ///< see feature::logit
  Real alignment = 0;    ///< see feature::alignment
  Real value_norm_l1 = 0;  ///< see feature::value_norm_l1
  Real mean_distance = 0;  ///< see feature::mean_distance
  Real projected_norm_l1 = 0;  ///< see feature::projected_norm_l1
  index_t position = 0;  ///< in its sequence, 0 the oldest
  index_t length = 0;    ///< tokens of its sequence
  index_t batch = 0;     ///< sequence
  index_t head = 0;      ///< query head
  index_t layer = 0;     ///< index of the layer
};

/// A score as every backend gives it on: clamped to finite numbers; NaN stays NaN.
[[nodiscard]] RESTKV_HD constexpr float finite_score(float score) noexcept {
  constexpr float most = std::numeric_limits<float>::max();
  return score > most ? most : score < -most ? -most : score;
}

namespace detail {

template <class S>
concept has_constant_needs = requires { typename std::integral_constant<feature, S::needs>; };

template <class S, class Real>
concept scores_token_features = requires(const S& score, const token_features<Real>& features) {
  { score(features) } -> std::convertible_to<Real>;
};

}  // namespace detail

/// A score: `static constexpr feature needs`, and a const call operator from `token_features<Real>` to Real for float
/// and double. Larger is kept. Optional members: `restkv::query_order order` (default `before`),
/// `restkv::metric metric_of_distance` (default identity), `static constexpr bool monotone_in_distance = true`
/// for a score that is never negative and never falls when only the distance grows, which admits certified pruning,
/// and `static constexpr bool scores_window = true` (see `scores_window`), for scores that need of a query nothing but
/// its attention, odds or logit. `logit_perturbation perturbation() const` changes the logits of such a score;
/// `int attention_pool`, odd, averages the attention of a query over neighbouring tokens of the past (zeros beyond) and
/// scales it back to its sum, before it is scored, for scores that need nothing but attention.
template <class S>
concept token_score = detail::has_constant_needs<S> && detail::scores_token_features<S, float> &&
                      detail::scores_token_features<S, double>;

/// `score.order` where the score has one.
template <class S>
[[nodiscard]] constexpr query_order order_of(const S& score) noexcept {
  if constexpr (requires { { score.order } -> std::convertible_to<query_order>; }) return score.order;
  return query_order::before;
}

/// `score.metric_of_distance` where the score has one.
template <class S>
[[nodiscard]] constexpr metric metric_of(const S& score) noexcept {
  if constexpr (requires { { score.metric_of_distance } -> std::convertible_to<metric>; }) {
    return score.metric_of_distance;
  }
  return metric::identity;
}

/// True when the score says that it grows with the distance.
template <class S>
[[nodiscard]] constexpr bool monotone_in_distance() noexcept {
  if constexpr (requires { { S::monotone_in_distance } -> std::convertible_to<bool>; }) return S::monotone_in_distance;
  return false;
}

/// What the score does to the logits: `score.perturbation()` where it has one.
template <class S>
[[nodiscard]] constexpr logit_perturbation perturbation_of(const S& score) noexcept {
  if constexpr (requires { { score.perturbation() } -> std::convertible_to<logit_perturbation>; }) {
    return score.perturbation();
  }
  return {};
}

/// The neighbours over which each query's attention is averaged before it is scored: `score.attention_pool`, 1 where the
/// score has none.
template <class S>
[[nodiscard]] constexpr int attention_pool_of(const S& score) noexcept {
  if constexpr (requires { { score.attention_pool } -> std::convertible_to<int>; }) return score.attention_pool;
  return 1;
}

/// True for a score that has `attention_pool`.
template <class S>
[[nodiscard]] constexpr bool pools_attention() noexcept {
  return requires(const S& score) {
    { score.attention_pool } -> std::convertible_to<int>;
  };
}

/// The features a score asks for; none for one that is not a `token_score`.
template <class S>
[[nodiscard]] constexpr feature features_of() noexcept {
  if constexpr (token_score<S>) return S::needs;
  return feature::none;
}

/// True when the score needs queries, that is, an observation window.
template <class S>
[[nodiscard]] constexpr bool needs_window() noexcept {
  return has(features_of<S>(), window_features);
}

/// True when the score is defined for the tokens of the window too, by the queries that see them: they are candidates
/// like the others, and the window may be as long as the prompt.
template <class S>
[[nodiscard]] constexpr bool scores_window() noexcept {
  if constexpr (requires { { S::scores_window } -> std::convertible_to<bool>; }) return S::scores_window;
  return false;
}

/// True when the score needs of a query nothing but what the softmax gives: its window may then be of any length.
template <class S>
[[nodiscard]] constexpr bool needs_attention_alone() noexcept {
  return needs_window<S>() && !has(features_of<S>(), value_features | feature::key_norm);
}

/// True when this score measures through W_O and a layer must therefore carry its metric.
template <class S>
[[nodiscard]] constexpr bool needs_metric(const S& score) noexcept {
  return has(features_of<S>(), metric_features) && metric_of(score) == metric::projection;
}

}  // namespace restkv
