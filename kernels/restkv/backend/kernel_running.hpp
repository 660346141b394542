// SPDX-License-Identifier: Apache-2.0
/// @file
/// Running scores in the memory of a `kernel_backend`: what a token was worth to every query so far, updated at each
/// decode step, and the tokens that an eviction keeps by it. The counterpart of a `session` for engines whose cache
/// lies on a GPU: the cache stays the engine's, and the steps are calls of its decode loop.
///
/// ```text
/// make_running_plan, begin_running                     once
/// running_room(plan, layer) == 0 ?                     then an eviction:
///   choose(backend, plan, layer, view, workspace, choice)
///   compact_in_place(backend, choice.kept, key, value)   any form of it: dense, paged, quantised
///   keep(backend, plan, layer, choice)
/// the engine writes the new token's key and value to slot lengths(b, h) of each head
/// append_tokens(backend, plan, layer, 1)
/// observe(backend, plan, layer, view, workspace)       or observe_scores, with the attention of the engine's kernel
/// ```
///
/// Everything is enqueued: nothing is allocated, waited for or read back. Where all heads keep the same number of
/// tokens (`uniform`, `pyramid`), the host knows their lengths. Where heads compete or whole chunks are kept it knows
/// bounds, and the views handed over need `head_lengths`: copy `running_layer::lengths` back after an eviction.
#pragma once

#include <restkv/backend/kernel_running_choice.hpp>
#include <restkv/kernel/running_update.hpp>

namespace restkv {

namespace detail {

/// The newest tokens' places. For each (row, token).
template <memory_space Space>
struct begin_tokens {
  running_layer<Space> layer;
  index_t tokens;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t h = item / tokens % layer.lengths.extent(1);
    const index_t b = item / tokens / layer.lengths.extent(1);
    const index_t slot = layer.lengths(b, h) + item % tokens;
    layer.observers(b, h, slot) = 0;
    layer.positions(b, h, slot) = static_cast<position_t>(layer.seen + item % tokens);
  }
};

/// lengths(row) = or += tokens. For each row.
template <memory_space Space>
struct add_to_lengths {
  tensor_view<position_t, 2, Space> lengths;
  position_t tokens;
  bool anew;

  RESTKV_HD void operator()(index_t row) const noexcept {
    position_t& length = lengths(row / lengths.extent(1), row % lengths.extent(1));
    length = (anew ? 0 : length) + tokens;
  }
};

/// Folds [batch, query_heads, tokens] scores of a query, of all but the last `unscored` tokens of each head.
template <class Executor, class Running>
void fold_scores(Executor& executor, const Running& reduction,
                 const std::type_identity_t<tensor_view<const float, 3, Executor::space>>& scores, index_t unscored,
                 const running_layer<Executor::space>& layer) {
  if (layer.longest == 0) return;
  for (index_t b = 0; b < layer.lengths.extent(0); ++b) {
    kernel::fold_scores(executor, reduction, scores[b],
                        tensor_view<const position_t, 1, Executor::space>(layer.lengths[b]), unscored,
                        layer.running[b].slice(1, 0, layer.longest), layer.observers[b]);
  }
}

}  // namespace detail

/// Carves a layer's running scores from `memory`, plan.state_bytes of the backend's memory, and enqueues that it holds
/// no token. Fails, with `layer` as it was, where the memory is too small.
template <class Executor, class SessionPolicy>
[[nodiscard]] status begin_running(kernel_backend<Executor>& backend, const running_plan<SessionPolicy>& plan,
                                   workspace memory, running_layer<Executor::space>& layer) {
  if (memory.counting()) {
    return status::error(errc::workspace_too_small, "the workspace has no memory, the plan needs %zu bytes",
                         plan.state_bytes);
  }
  const running_layer<Executor::space> made(plan.shape, memory);
  RESTKV_RETURN_IF_FAILED(memory.check());
  RESTKV_RETURN_IF_FAILED(
      backend.for_each(made.lengths.size(), detail::add_to_lengths<Executor::space>{made.lengths, 0, true}));
  layer = made;
  return {};
}

/// Tokens that can come before an eviction is due; 0 when it is. As `session::room`.
template <class SessionPolicy, memory_space Space>
[[nodiscard]] index_t running_room(const running_plan<SessionPolicy>& plan,
                                   const running_layer<Space>& layer) noexcept {
  index_t tokens = std::min(plan.policy.high_water - layer.mean, plan.shape.tokens - layer.longest);
  if (plan.policy.evict_every > 0) tokens = std::min(tokens, plan.policy.evict_every - layer.since_eviction);
  return std::max<index_t>(0, tokens);
}

/// n more tokens lie behind those of each head: no query has seen them yet. Fails, with nothing changed, when heads
/// have no room for them.
template <class Executor, class SessionPolicy>
[[nodiscard]] status append_tokens(kernel_backend<Executor>& backend, const running_plan<SessionPolicy>& plan,
                                   running_layer<Executor::space>& layer, index_t n) {
  RESTKV_RETURN_IF_FAILED(detail::check_running_layer(plan, layer));
  const auto ll = [](index_t count) { return static_cast<long long>(count); };
  if (n < 0) return status::error(errc::invalid_argument, "%lld tokens are appended", ll(n));
  if (n > plan.shape.tokens - layer.longest) {
    return status::error(errc::shape_mismatch, "%lld tokens behind %lld pass the plan's %lld tokens of a head", ll(n),
                         ll(layer.longest), ll(plan.shape.tokens));
  }
  constexpr index_t longest = std::numeric_limits<position_t>::max();
  if (n > longest - layer.seen) {
    return status::error(errc::invalid_argument, "%lld tokens behind %lld pass the longest sequence, %lld", ll(n),
                         ll(layer.seen), ll(longest));
  }
  if (n == 0) return {};
  constexpr memory_space space = Executor::space;
  RESTKV_RETURN_IF_FAILED(backend.for_each(layer.lengths.size() * n, detail::begin_tokens<space>{layer, n}));
  RESTKV_RETURN_IF_FAILED(backend.for_each(
      layer.lengths.size(), detail::add_to_lengths<space>{layer.lengths, static_cast<position_t>(n), false}));
  layer.longest += n;
  layer.mean += n;
  layer.seen += n;
  layer.since_eviction += n;
  return {};
}

/// Folds what the newest query gave to the tokens into the running scores, as a session with attention rows does where
/// that query's token is refreshed at (`session_policy::refresh`); nothing to do otherwise.
///
/// scores: [batch, query_heads, at least the longest head], slot by slot: with a score that is attention alone (H2O,
/// SnapKV, TOVA) the attention that the query paid. Enqueues. Cost: one read of the scores, one read and write of the
/// running ones.
template <class Executor, class SessionPolicy>
[[nodiscard]] status observe_scores(kernel_backend<Executor>& backend, const running_plan<SessionPolicy>& plan,
                                    const running_layer<Executor::space>& layer,
                                    const std::type_identity_t<tensor_view<const float, 3, Executor::space>>& scores) {
  RESTKV_RETURN_IF_FAILED(detail::check_running_layer(plan, layer));
  RESTKV_RETURN_IF_FAILED(detail::check_view("scores", scores));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("scores", "sequences", scores.extent(0), "the plan", plan.shape.batch));
  RESTKV_RETURN_IF_FAILED(
      detail::check_equal("scores", "query heads", scores.extent(1), "the plan", plan.shape.query_heads));
  if (scores.extent(2) < layer.longest) {
    return status::error(errc::shape_mismatch, "scores has %lld tokens, the longest head has %lld",
                         static_cast<long long>(scores.extent(2)), static_cast<long long>(layer.longest));
  }
  const byte_range read = touched_bytes(scores);
  RESTKV_RETURN_IF_FAILED(detail::check_disjoint("scores", read, "layer.running", touched_bytes(layer.running)));
  RESTKV_RETURN_IF_FAILED(detail::check_disjoint("scores", read, "layer.observers", touched_bytes(layer.observers)));
  if (layer.seen % plan.policy.refresh != 0) return {};
  detail::fold_scores(backend.executor(), plan.policy.running, scores, 0, layer);
  return backend.outcome("running scores");
}

/// Asks the policy's score by the newest query and folds it in, as a session does where that query's token is refreshed
/// at; nothing to do otherwise.
///
/// view: the cache as it is, and the newest query [batch, query_heads, 1, head_dim]; with `head_lengths` where heads
/// have different tokens. workspace: plan.workspace_bytes of the backend's memory. Enqueues; fails as `select` does of
/// a layer that does not fit. Cost: one query's scores, and as `observe_scores`.
template <class Executor, class SessionPolicy, element T>
[[nodiscard]] status observe(kernel_backend<Executor>& backend, const running_plan<SessionPolicy>& plan,
                             const running_layer<Executor::space>& layer, const layer_view<T, Executor::space>& view,
                             workspace space) {
  const auto request = detail::make_observation_request(plan.policy, plan.shape);
  using score_t = detail::session_score<SessionPolicy>;
  RESTKV_RETURN_IF_FAILED(detail::check_running_layer(plan, layer));
  RESTKV_RETURN_IF_FAILED(
      check_layer(view, plan.shape, 1, true, needs_values<score_t>(), needs_metric(plan.policy.policy.score)));
  if constexpr (needs_projection<score_t>()) RESTKV_RETURN_IF_FAILED(check_projection(view, plan.shape));
  RESTKV_RETURN_IF_FAILED(detail::check_running_view(layer, view));
  if (layer.seen == 0 || layer.seen % plan.policy.refresh != 0) return {};
  if (space.counting()) {
    return status::error(errc::workspace_too_small, "the workspace has no memory, the plan needs %zu bytes",
                         plan.workspace_bytes);
  }
  detail::observation_memory<kernel_backend<Executor>, SessionPolicy> memory(backend, request, space);
  RESTKV_RETURN_IF_FAILED(space.check());
  RESTKV_RETURN_IF_FAILED(backend.token_scores(request, view, memory.scratch, memory.scores));
  detail::fold_scores(backend.executor(), plan.policy.running, memory.scores, 1 - request.past_of(1), layer);
  return backend.outcome("running scores");
}

}  // namespace restkv
