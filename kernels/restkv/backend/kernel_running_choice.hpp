// SPDX-License-Identifier: Apache-2.0
/// @file
/// Running scores in the memory of a `kernel_backend`: their plan, their memory, and the choice of what an eviction
/// keeps. See `kernel_running.hpp` for the whole.
#pragma once

#include <restkv/backend/kernel_compact_in_place.hpp>
#include <restkv/select.hpp>
#include <restkv/session/session_plan.hpp>

#include <limits>

namespace restkv {

/// The running scores of a layer, in a backend's memory, and what the host knows of them. Slots [0, lengths(b, h)) of a
/// head are in use.
template <memory_space Space>
struct running_layer {
  tensor_view<double, 3, Space> running{};          ///< [batch, query_heads, capacity]
  tensor_view<std::int32_t, 3, Space> observers{};  ///< queries that saw the token, [batch, kv_heads, capacity]
  tensor_view<position_t, 3, Space> positions{};    ///< in the sequence as it was appended, [batch, kv_heads, capacity]
  tensor_view<position_t, 2, Space> lengths{};      ///< tokens of each head, [batch, kv_heads]
  index_t longest = 0;                              ///< no head has more tokens
  index_t mean = 0;                                 ///< nor has a sequence, on average over its heads
  index_t seen = 0;                                 ///< tokens appended
  index_t since_eviction = 0;                       ///< tokens since the last eviction
  bool alike = true;                                ///< every head has `longest` tokens

  running_layer() = default;
  /// Carved from a workspace, or counted by one; shape.tokens is the capacity.
  running_layer(const problem_shape& shape, workspace& from) noexcept
      : running(from.take<double>(shape.batch * shape.query_heads * shape.tokens),
                {shape.batch, shape.query_heads, shape.tokens}),
        observers(from.take<std::int32_t>(shape.batch * shape.kv_heads * shape.tokens),
                  {shape.batch, shape.kv_heads, shape.tokens}),
        positions(from.take<position_t>(shape.batch * shape.kv_heads * shape.tokens),
                  {shape.batch, shape.kv_heads, shape.tokens}),
        lengths(from.take<position_t>(shape.batch * shape.kv_heads), {shape.batch, shape.kv_heads}) {}

  /// The tokens of each head as a kept set: where in the sequence they came from.
  [[nodiscard]] constexpr basic_kept_tokens<position_t, Space> tokens() const noexcept { return {positions, lengths}; }
};

/// What an eviction keeps, and what the host knows of it.
template <memory_space Space>
struct running_choice {
  basic_kept_tokens<position_t, Space> kept{};  ///< slots of each head; lies in the workspace of the choice
  index_t longest = 0;                          ///< of the layer afterwards
  index_t mean = 0;                             ///< of the layer afterwards
  bool alike = true;                            ///< of the layer afterwards
};

namespace detail {

/// Stands for the running scores in a policy; `running_backend` fills them in.
struct running_total {
  static constexpr feature needs = feature::none;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>&) const noexcept {
    return 0;
  }
};

/// The policy that chooses by running scores.
template <class SessionPolicy>
[[nodiscard]] constexpr auto make_running_policy(const SessionPolicy& session) noexcept {
  return with_parts(session.policy, running_total{}, mean{}, session.policy.budget);
}
template <class SessionPolicy>
using running_policy_of = std::remove_cv_t<decltype(make_running_policy(std::declval<const SessionPolicy&>()))>;

/// out(b, h, n) = the group reduction of what token n was worth to the query heads of KV head h. For each (row, token).
template <class Running, memory_space Space>
struct score_running {
  Running reduction;
  running_layer<Space> layer;
  group_reduce group;
  index_t tokens;
  tensor_view<float, 3, Space> out;  ///< [batch, kv_heads, tokens]

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t n = item % tokens;
    const index_t h = item / tokens % layer.lengths.extent(1);
    const index_t b = item / tokens / layer.lengths.extent(1);
    if (n >= layer.lengths(b, h)) return;
    const index_t heads = layer.running.extent(1) / layer.lengths.extent(1);
    const index_t seen_by = layer.observers(b, h, n);
    float folded = 0;
    for (index_t j = 0; j < heads; ++j) {
      const double kept = seen_by == 0 ? 0.0 : layer.running(b, h * heads + j, n);
      folded = group_fold(group, folded, static_cast<float>(reduction.score(kept, seen_by)), j == 0);
    }
    out(b, h, n) = finite_score(group_finish(group, folded, heads));
  }
};

/// A kernel backend whose scores of tokens are the running ones of a layer.
template <class Executor, class Running>
class running_backend : public kernel_backend<Executor> {
 public:
  static constexpr memory_space space = Executor::space;

  running_backend(const kernel_backend<Executor>& backend, const Running& reduction,
                  const running_layer<space>& layer) noexcept
      : kernel_backend<Executor>(backend), reduction_(reduction), layer_(layer) {}

  template <class Request>
  struct scratch {
    scratch(const running_backend&, const Request&, workspace&) noexcept {}
    [[nodiscard]] tensor_view<double, 2, space> drift() const noexcept { return {}; }
  };

  template <class Request, element T>
  [[nodiscard]] status token_scores(const Request& request, const layer_view<T, space>&, scratch<Request>&,
                                    tensor_view<float, 3, space> out) {
    return this->for_each(layer_.lengths.size() * layer_.longest,
                          score_running<Running, space>{reduction_, layer_, request.group, layer_.longest, out});
  }
  /// Never asked for: the policy's smoother may not look at the drift.
  template <class Request, element T>
  [[nodiscard]] status window_drift(const Request&, const layer_view<T, space>&, std::span<const index_t>,
                                    scratch<Request>&, tensor_view<double, 2, space>) {
    return status::error(errc::unsupported, "running scores have no window whose drift could be measured");
  }

 private:
  Running reduction_;
  running_layer<space> layer_;
};

/// The memory of `observe`.
template <class Backend, class SessionPolicy>
struct observation_memory {
  using request_t = observation_request<SessionPolicy>;

  typename Backend::template scratch<request_t> scratch;
  tensor_view<float, 3, space_of<Backend>()> scores;  // [batch, query_heads, capacity]

  observation_memory(const Backend& backend, const request_t& request, workspace& from)
      : scratch(backend, request, from),
        scores(from.take<float>(request.shape.batch * request.shape.query_heads * request.shape.tokens),
               {request.shape.batch, request.shape.query_heads, request.shape.tokens}) {}
};

}  // namespace detail

/// What the running scores of a layer need to know, computed once.
template <class SessionPolicy>
struct running_plan {
  SessionPolicy policy{};                                    ///< as it was given
  problem_shape shape{};                                     ///< of the cache; `tokens` is the capacity of a head
  plan<detail::running_policy_of<SessionPolicy>> selection;  ///< of an eviction
  std::size_t state_bytes = 0;                               ///< of a `running_layer`, in the backend's memory
  std::size_t workspace_bytes = 0;  ///< of `observe` and `choose`, in the backend's memory; layers may share it
};

/// Validates a session's policy for one layer and computes the memory that its running scores need. `shape.tokens` does
/// not act: the capacity follows from the policy's mark, as in a session. All sequences of a batch get their tokens in
/// step. Nothing is allocated.
///
/// Errors: as `make_session_plan`; speculation, which is for sessions on the CPU; what the backend does not serve.
template <class Executor, class SessionPolicy>
[[nodiscard]] status make_running_plan(const kernel_backend<Executor>& backend, const SessionPolicy& policy,
                                       const problem_shape& shape, running_plan<SessionPolicy>& out) noexcept {
  static_assert(detail::runs<typename SessionPolicy::running_type>,
                "a session_policy with a running score is needed: running_sum, running_ema, ...");
  static_assert(std::is_trivially_copyable_v<typename SessionPolicy::running_type>);
  RESTKV_RETURN_IF_FAILED(detail::check_session_policy(policy));
  if (policy.speculation != 0) {
    return status::error(errc::unsupported, "speculation is %lld: a running layer takes no token back",
                         static_cast<long long>(policy.speculation));
  }
  running_plan<SessionPolicy> made;
  made.policy = policy;
  made.shape = shape;
  made.shape.tokens = policy.high_water;
  const auto choosing = detail::make_running_policy(policy);
  const detail::running_backend<Executor, typename SessionPolicy::running_type> chooser(backend, policy.running, {});
  // Heads and layers, before anything is computed with them.
  RESTKV_RETURN_IF_FAILED(make_plan(chooser, choosing, made.shape, made.selection));
  index_t capacity = 0;
  RESTKV_RETURN_IF_FAILED(detail::session_capacity(choosing, made.shape, policy.high_water, capacity));
  made.shape.tokens = capacity;
  RESTKV_RETURN_IF_FAILED(make_plan(chooser, choosing, made.shape, made.selection));
  workspace observing;
  const auto request = detail::make_observation_request(policy, made.shape);
  const detail::observation_memory<kernel_backend<Executor>, SessionPolicy> memory(backend, request, observing);
  static_cast<void>(memory);
  RESTKV_RETURN_IF_FAILED(observing.check());
  workspace state;
  const running_layer<Executor::space> layer(made.shape, state);
  static_cast<void>(layer);
  RESTKV_RETURN_IF_FAILED(state.check());
  made.state_bytes = state.required_bytes();
  made.workspace_bytes = std::max(made.selection.workspace_bytes, observing.required_bytes());
  out = made;
  return {};
}

namespace detail {

/// That a layer was begun by the plan.
template <class SessionPolicy, memory_space Space>
[[nodiscard]] status check_running_layer(const running_plan<SessionPolicy>& plan,
                                         const running_layer<Space>& layer) noexcept {
  RESTKV_RETURN_IF_FAILED(
      check_equal("layer.running", "sequences", layer.running.extent(0), "the plan", plan.shape.batch));
  RESTKV_RETURN_IF_FAILED(
      check_equal("layer.running", "query heads", layer.running.extent(1), "the plan", plan.shape.query_heads));
  RESTKV_RETURN_IF_FAILED(
      check_equal("layer.observers", "KV heads", layer.observers.extent(1), "the plan", plan.shape.kv_heads));
  return check_equal("layer.running", "slots", layer.running.extent(2), "the plan", plan.shape.tokens);
}

/// That a view holds the tokens of a running layer, each at its slot.
template <memory_space Space, class T>
[[nodiscard]] status check_running_view(const running_layer<Space>& layer, const layer_view<T, Space>& view) noexcept {
  if (view.lengths.data != nullptr) {
    return status::error(errc::unsupported, "the view has %lld lengths of sequences: a running layer has head_lengths",
                         static_cast<long long>(view.lengths.extent(0)));
  }
  index_t tokens = view.key.extent(2);
  if (view.head_lengths.data == nullptr) {
    if (!layer.alike) {
      return status::error(errc::missing_input,
                           "heads have up to %lld tokens, not all the same: set head_lengths to layer.lengths",
                           static_cast<long long>(layer.longest));
    }
  } else {
    tokens = 0;
    for (index_t b = 0; b < view.head_lengths.extent(0); ++b) {
      for (index_t h = 0; h < view.head_lengths.extent(1); ++h) {
        tokens = std::max<index_t>(tokens, view.head_lengths(b, h));
      }
    }
    if (view.pad != padding::right) {
      return status::error(errc::invalid_argument,
                           "the %lld tokens of a head begin at slot 0: head_lengths need padding::right",
                           static_cast<long long>(tokens));
    }
  }
  if (layer.alike ? tokens == layer.longest : tokens <= layer.longest) return {};
  return status::error(errc::shape_mismatch, "the view has %lld tokens, the running layer has %lld",
                       static_cast<long long>(tokens), static_cast<long long>(layer.longest));
}

/// lengths(b, h) = kept.length(b, h). For each row.
template <memory_space Space>
struct take_lengths {
  kernel::kept_rows kept;
  tensor_view<position_t, 2, Space> lengths;

  RESTKV_HD void operator()(index_t row) const noexcept {
    const index_t b = row / kept.heads;
    const index_t h = row % kept.heads;
    lengths(b, h) = static_cast<position_t>(kept.length(b, h));
  }
};

/// [batch, heads, slots] as [batch, heads, slots, 1].
template <class T, memory_space Space>
[[nodiscard]] constexpr tensor_view<T, 4, Space> as_channel(const tensor_view<T, 3, Space>& view) noexcept {
  return {view.data,
          {view.extent(0), view.extent(1), view.extent(2), 1},
          {view.stride(0), view.stride(1), view.stride(2), 1}};
}

}  // namespace detail

/// Chooses what an eviction keeps: the tokens that a session on the CPU would keep, by the same running scores.
/// `choice.kept` points into the workspace and is valid as long as that is.
///
/// view: the cache as it is, for its sizes and its mask: key [batch, kv_heads, tokens, head_dim] is not read.
/// workspace: plan.workspace_bytes of the backend's memory. Enqueues; nothing is written to `choice` on failure. Fails
/// as `select`.
template <class Executor, class SessionPolicy, element T>
[[nodiscard]] status choose(const kernel_backend<Executor>& backend, const running_plan<SessionPolicy>& plan,
                            const running_layer<Executor::space>& layer, const layer_view<T, Executor::space>& view,
                            workspace space, running_choice<Executor::space>& choice) {
  RESTKV_RETURN_IF_FAILED(detail::check_running_layer(plan, layer));
  RESTKV_RETURN_IF_FAILED(detail::check_running_view(layer, view));
  detail::running_backend<Executor, typename SessionPolicy::running_type> chooser(backend, plan.policy.running, layer);
  running_choice<Executor::space> made;
  RESTKV_RETURN_IF_FAILED(select(chooser, plan.selection, view, space, made.kept));
  const auto& policy = plan.selection.policy;
  const index_t unit = policy.granularity.tokens;
  const auto problem = detail::budget_of_span(policy, plan.shape, plan.selection.rows, layer.longest);
  const index_t each = detail::tokens_after_eviction(policy, problem);
  made.alike = unit == 1 && policy.budget.most_per_head(problem) <= policy.budget.tokens_per_head(problem);
  made.longest = std::min(layer.longest, made.alike ? each : made.kept.capacity());
  made.mean = std::min(layer.mean, each);
  made.alike = made.alike && layer.alike;
  choice = made;
  return {};
}

/// The running scores of the kept tokens move as these do, and the rest is forgotten. After `choose`, before tokens are
/// appended. Enqueues; the choice's workspace may be used again by what is enqueued later.
///
/// Cost: one read and one write of the running scores that move.
template <class Executor, class SessionPolicy>
[[nodiscard]] status keep(kernel_backend<Executor>& backend, const running_plan<SessionPolicy>& plan,
                          running_layer<Executor::space>& layer, const running_choice<Executor::space>& choice) {
  RESTKV_RETURN_IF_FAILED(detail::check_running_layer(plan, layer));
  const detail::kept_of<Executor> kept = choice.kept;
  const tensor_view<std::int32_t, 4, Executor::space> observers = detail::as_channel(layer.observers);
  RESTKV_RETURN_IF_FAILED(detail::check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(detail::check_rows_in_place(kept, "the running layer", observers));
  const kernel::kept_rows rows(kept);
  const index_t group = plan.shape.group();
  const tensor_view<double, 4, Executor::space> running(  // the query heads of a KV head are its tokens' channels
      layer.running.data, {plan.shape.batch, plan.shape.kv_heads, layer.running.extent(2), group},
      {layer.running.stride(0), group * layer.running.stride(1), layer.running.stride(2), layer.running.stride(1)});
  kernel::compact_in_place(backend.executor(), rows, kernel::rows_of(running));
  kernel::compact_in_place(backend.executor(), rows, kernel::rows_of(observers));
  kernel::compact_in_place(backend.executor(), rows, kernel::rows_of(detail::as_channel(layer.positions)));
  RESTKV_RETURN_IF_FAILED(backend.for_each(rows.count(), detail::take_lengths<Executor::space>{rows, layer.lengths}));
  layer.longest = choice.longest;
  layer.mean = choice.mean;
  layer.alike = choice.alike;
  layer.since_eviction = 0;
  return {};
}

}  // namespace restkv
