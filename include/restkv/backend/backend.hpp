// SPDX-License-Identifier: Apache-2.0
/// @file
/// The `tensor_backend` concept: the primitives a backend provides, and nothing about policies.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/core/workspace.hpp>
#include <restkv/policy.hpp>

#include <concepts>
#include <span>

namespace restkv {

/// What a scoring primitive is asked for: the parts of a policy that come before spatial smoothing, without the rest.
template <class Score, temporal_smoother Temporal>
struct score_request {
  Score score{};                            ///< per-token score
  Temporal temporal{};                      ///< reduction over the window's queries
  index_t window = 0;                       ///< observation window; 0 when the score needs no queries
  group_reduce group = group_reduce::none;  ///< reduction over the query heads of a KV head
  problem_shape shape{};                    ///< the plan's

  /// Rows of scores per sequence.
  [[nodiscard]] constexpr index_t heads() const noexcept {
    return group == group_reduce::none ? shape.query_heads : shape.kv_heads;
  }
  /// Queries of a sequence's observation window: all of a sequence that is shorter than the window.
  [[nodiscard]] constexpr index_t window_of(index_t length) const noexcept { return std::min(window, length); }
  /// Tokens of a sequence that scores are defined for: those before the window, or all.
  [[nodiscard]] constexpr index_t past_of(index_t length) const noexcept {
    return scores_window<Score>() ? length : length - window_of(length);
  }
};

/// The request that a policy's parts make.
template <class Policy>
using score_request_of = score_request<decltype(Policy::score), decltype(Policy::temporal)>;

/// The scoring part of a policy for a shape.
template <class Policy>
[[nodiscard]] constexpr score_request_of<Policy> make_score_request(const Policy& policy,
                                                                    const problem_shape& shape) noexcept {
  return {policy.score, policy.temporal, needs_window<decltype(policy.score)>() ? policy.window : 0, policy.group,
          shape};
}

namespace detail {
using archetype_request = score_request<rest_kv, mean>;
struct archetype_body {
  void operator()(index_t) const noexcept {}
};

template <class B>
concept has_floating_score_type = std::floating_point<typename B::score_type>;

/// Where a backend's tensors lie: `B::space`, the host's memory where it has none.
template <class B>
[[nodiscard]] constexpr memory_space space_of() noexcept {
  if constexpr (requires { typename std::integral_constant<memory_space, B::space>; }) return B::space;
  return memory_space::host;
}

template <class B>
concept has_parallel_for = requires(B& backend) { backend.parallel_for(index_t{}, archetype_body{}); };

template <class B>
using archetype_scratch = typename B::template scratch<archetype_request>;

template <class B>
concept has_scratch = std::constructible_from<archetype_scratch<B>, const B&, const archetype_request&, workspace&>;

template <class B>
concept has_scratch_with_drift = requires(archetype_scratch<B>& scratch) {
  { scratch.drift() } -> std::same_as<tensor_view<double, 2, space_of<B>()>>;
};

template <class B>
concept has_token_scores = requires(B& backend, const archetype_request& request,
                                    const layer_view<float, space_of<B>()>& layer, archetype_scratch<B>& scratch,
                                    tensor_view<typename B::score_type, 3, space_of<B>()> rows) {
  { backend.token_scores(request, layer, scratch, rows) } -> std::same_as<status>;
};

template <class B>
concept has_window_drift = requires(B& backend, const archetype_request& request,
                                    const layer_view<float, space_of<B>()>& layer,
                                    std::span<const index_t> most_attended, archetype_scratch<B>& scratch,
                                    tensor_view<double, 2, space_of<B>()> drift) {
  { backend.window_drift(request, layer, most_attended, scratch, drift) } -> std::same_as<status>;
};

}  // namespace detail

/// A backend.
///
/// * `score_type`: float, or double in the reference.
/// * `space`, optional: where the tensors of its layers, its workspace and its results lie; the host's memory otherwise.
/// * `parallel_for(n, body)`: runs body(0) .. body(n - 1), each once, in any order, and returns when all are done.
///   Neither allocates nor throws. A backend with memory of a device has `bulk_backend`'s loops instead.
/// * `scratch<Request>`: working memory of the two primitives below, carved by its constructor
///   `(backend, request, workspace)`; constructed once with a counting workspace and once with a real one. Its
///   `drift()` is room for the drift of every query head, [batch, query_heads].
/// * `token_scores(request, layer, scratch, out)`: window attention, the score's features, the temporal reduction and
///   the group reduction; or a head score's rows and the group reduction. Fills out[b][h][0 .. past), out is [batch,
///   heads, tokens], tokens counted from the beginning of each head's sequence.
/// * `window_drift(request, layer, most_attended, scratch, out)`: the drift of each query head's attention, see
///   adaptive_window; out is [batch, query_heads]; most_attended[b] is how many tokens per query take part.
template <class B>
concept tensor_backend = detail::has_floating_score_type<B> &&
                         (detail::space_of<B>() == memory_space::device || detail::has_parallel_for<B>) &&
                         detail::has_scratch<B> && detail::has_scratch_with_drift<B> && detail::has_token_scores<B> &&
                         detail::has_window_drift<B>;

/// A backend that holds a part of a layer's heads, the rest being elsewhere:
///
/// * `fold_heads(running, fold)`: fold(first) folds the heads that lie here into the span `running`, `first` where they are
///   the layer's first ones; afterwards `running` is what folding all heads of the layer in order gives.
/// * `heads_of_layer(here)`: how many heads the layer has where `here` of them lie here.
template <class B>
concept head_sharing_backend =
    tensor_backend<B> && requires(B& backend, std::span<typename B::score_type> running, void (*fold)(bool)) {
      { backend.fold_heads(running, fold) } -> std::same_as<status>;
      { backend.heads_of_layer(index_t{}) } -> std::same_as<index_t>;
    };

namespace detail {

/// backend.fold_heads where it has that; all heads lie here otherwise.
template <class Backend, class T, class Fold>
[[nodiscard]] status fold_heads(Backend& backend, std::span<T> running, const Fold& fold) {
  if constexpr (head_sharing_backend<Backend>) {
    return backend.fold_heads(running, fold);
  } else {
    fold(true);
    return {};
  }
}

/// backend.heads_of_layer likewise.
template <class Backend>
[[nodiscard]] index_t heads_of_layer(const Backend& backend, index_t here) noexcept {
  if constexpr (head_sharing_backend<Backend>) return backend.heads_of_layer(here);
  return here;
}

}  // namespace detail

/// True for requests whose scores can be bounded without the distances: what else the score needs of a value is its
/// output's alone, and it and the temporal reduction grow with the distance.
template <class Request>
[[nodiscard]] constexpr bool bounded_by_distance() noexcept {
  using score = std::remove_cvref_t<decltype(Request::score)>;
  constexpr feature known = feature::attention | feature::odds | feature::distance | feature::output_norm;
  return has(features_of<score>(), feature::distance) && (features_of<score>() | known) == known &&
         monotone_in_distance<score>() && monotone_temporal_smoother<std::remove_cvref_t<decltype(Request::temporal)>>;
}

/// What is known of a token's score while certified pruning runs.
enum class token_state : std::uint8_t {
  bounded,  ///< its score is an upper bound
  wanted,   ///< a bound, to be replaced by the score
  scored,   ///< its score
};

/// A backend that can bound the scores of a request cheaply, and score single tokens afterwards.
///
/// * `bounds_pay(request)`: false when bounds would cost as much as scores, or pruning is turned off.
/// * `score_bounds(request, layer, scratch, out)`: fills out[b][h][0 .. past) with numbers that no score passes, as it is
///   computed; never NaN.
/// * `exact_scores(request, layer, scratch, states, out)`: replaces the bounds of the tokens that states [batch, heads,
///   tokens] marks `wanted` by the very scores that `token_scores` gives, and marks them `scored`. Follows `score_bounds`.
template <class B, class Request>
concept bounding_backend = tensor_backend<B> && requires(B& backend, const Request& request,
                                                         const layer_view<float, detail::space_of<B>()>& layer,
                                                         typename B::template scratch<Request>& scratch,
                                                         tensor_view<token_state, 3, detail::space_of<B>()> states,
                                                         tensor_view<typename B::score_type, 3, detail::space_of<B>()>
                                                             rows) {
  { backend.bounds_pay(request) } -> std::same_as<bool>;
  { backend.score_bounds(request, layer, scratch, rows) } -> std::same_as<status>;
  { backend.exact_scores(request, layer, scratch, states, rows) } -> std::same_as<status>;
};

}  // namespace restkv
