// SPDX-License-Identifier: Apache-2.0
/// @file
/// `make_session_plan`, and the memory of a session: carved by the same code when planning and when running.
#pragma once

#include <restkv/session/session_layer.hpp>
#include <restkv/session/session_plan.hpp>

#include <memory>

namespace restkv {

namespace detail {

/// The layers, and what they share.
template <tensor_backend Backend, class SessionPolicy, element T>
struct session_memory {
  session_layer<T>* layers = nullptr;               // [layers]
  index_t* first_slots = nullptr;                   // of tokens that are accepted, [kv_heads]
  typename Backend::score_type* scores = nullptr;   // of an observation, [query_heads, capacity]
  std::byte* selection = nullptr;                   // a selection's workspace, or an observation's

  session_memory() = default;
  session_memory(const session_plan<SessionPolicy>& plan, workspace& space) noexcept {
    const problem_shape& shape = plan.shape;
    const index_t capacity = shape.tokens;
    constexpr bool running = runs<typename SessionPolicy::running_type>;
    layers = space.take<session_layer<T>>(shape.layers);
    for (index_t i = 0; i < shape.layers; ++i) {
      session_layer<T> layer;
      const std::array<index_t, 3> cache{shape.kv_heads, capacity, shape.head_dim};
      layer.key = {space.take<T>(cache[0], cache[1], cache[2]), cache};
      layer.value = {space.take<T>(cache[0], cache[1], cache[2]), cache};
      layer.positions = {space.take<position_t>(shape.kv_heads, capacity), {shape.kv_heads, capacity}};
      layer.lengths = {space.take<std::int32_t>(shape.kv_heads), {1, shape.kv_heads}};
      layer.queries = {space.take<T>(shape.query_heads, 2, plan.query_rows, shape.head_dim),
                       {shape.query_heads, 2 * plan.query_rows, shape.head_dim}};
      if (running) {
        layer.running = {space.take<double>(shape.query_heads, capacity), {shape.query_heads, capacity}};
        layer.observers = {space.take<std::int32_t>(shape.kv_heads, capacity), {shape.kv_heads, capacity}};
      }
      if (plan.policy.attention_rows) {
        const std::array<index_t, 3> rows{plan.policy.speculation, shape.query_heads, capacity};
        layer.attention = {space.take<double>(rows[0], rows[1], rows[2]), rows};
      }
      // A workspace that is too small hands out null from where it ends.
      if (layer.lengths.data != nullptr) std::fill_n(layer.lengths.data, shape.kv_heads, 0);
      if (layers != nullptr && space.check().ok()) std::construct_at(layers + i, layer);
    }
    first_slots = space.take<index_t>(shape.kv_heads);
    if (running) scores = space.take<typename Backend::score_type>(shape.query_heads, capacity);
    selection = space.take<std::byte>(static_cast<index_t>(plan.selection_bytes));
  }
};

}  // namespace detail

/// Validates a session's policy for a model and computes the memory that one session needs, for elements T of keys,
/// values and queries. `shape.batch` must be 1, `shape.tokens` and `shape.layer` do not act. Nothing is allocated.
///
/// Memory: the cache at its largest, (high_water + speculation) tokens per head where heads keep the same number, more
/// where they compete (up to what one head can win); the ring of queries; 8 bytes per token and query head for running
/// scores; one selection's workspace, which layers share.
///
/// Errors: as `make_plan`; a mark that is not above what an eviction keeps; a policy without group reduction; recent
/// tokens fewer than a window of queries or a refresh needs; what a running score or attention rows do not give.
template <element T, tensor_backend Backend, class SessionPolicy>
[[nodiscard]] status make_session_plan(const Backend& backend, const SessionPolicy& policy, const problem_shape& shape,
                                       session_plan<SessionPolicy>& out) noexcept {
  RESTKV_RETURN_IF_FAILED(detail::check_session_policy(policy));
  if (shape.batch != 1) {
    return status::error(errc::invalid_argument, "a session holds 1 sequence, the shape has %lld",
                         static_cast<long long>(shape.batch));
  }
  constexpr index_t most_layers = index_t(1) << 16;
  if (shape.layers < 1 || shape.layers > most_layers) {
    return status::error(errc::invalid_argument, "the shape has %lld layers, must be within [1, %lld]",
                         static_cast<long long>(shape.layers), static_cast<long long>(most_layers));
  }
  const auto selecting = detail::make_selecting_policy(policy);
  session_plan<SessionPolicy> made;
  made.policy = policy;
  made.shape = shape;
  made.shape.layer = 0;
  made.element_bytes = sizeof(T);
  made.shape.tokens = policy.high_water;
  plan<std::remove_cv_t<decltype(selecting)>> probe;
  // Heads and layers, before anything is computed with them.
  RESTKV_RETURN_IF_FAILED(make_plan(backend, selecting, made.shape, probe));
  index_t capacity = 0;
  for (index_t layer = 0; layer < shape.layers; ++layer) {
    made.shape.layer = layer;
    RESTKV_RETURN_IF_FAILED(detail::session_capacity(selecting, made.shape, policy.high_water, capacity));
  }
  made.shape.tokens = capacity + policy.speculation;
  for (index_t layer = 0; layer < shape.layers; ++layer) {
    made.shape.layer = layer;
    RESTKV_RETURN_IF_FAILED(make_plan(backend, selecting, made.shape, probe));
    made.selection_bytes = std::max(made.selection_bytes, probe.workspace_bytes);
  }
  made.shape.layer = 0;
  if (detail::keeps_queries<SessionPolicy>) made.window = policy.policy.window;
  const bool speculates_queries = needs_window<detail::session_score<SessionPolicy>>() && !policy.attention_rows;
  made.query_rows = made.window + (speculates_queries ? policy.speculation : 0);
  if constexpr (detail::runs<typename SessionPolicy::running_type>) {
    using request_t = detail::observation_request<SessionPolicy>;
    workspace counting;
    typename Backend::template scratch<request_t> scratch(
        backend, detail::make_observation_request(policy, made.shape), counting);
    RESTKV_RETURN_IF_FAILED(counting.check());
    made.selection_bytes = std::max(made.selection_bytes, counting.required_bytes());
  }
  workspace counting;
  detail::session_memory<Backend, SessionPolicy, T> memory(made, counting);
  RESTKV_RETURN_IF_FAILED(counting.check());
  made.memory_bytes = counting.required_bytes();
  out = made;
  return {};
}

#if RESTKV_EXCEPTIONS

/// `make_session_plan` that throws `restkv::error`.
template <element T, tensor_backend Backend, class SessionPolicy>
[[nodiscard]] session_plan<SessionPolicy> make_session_plan(const Backend& backend, const SessionPolicy& policy,
                                                            const problem_shape& shape) {
  session_plan<SessionPolicy> made;
  throw_if_failed(make_session_plan<T>(backend, policy, shape, made));
  return made;
}

#endif

}  // namespace restkv
