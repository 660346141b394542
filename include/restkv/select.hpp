// SPDX-License-Identifier: Apache-2.0
/// @file
/// `select`: from a layer's views to the positions each head keeps.
#pragma once

#include <restkv/selection/bulk_selection.hpp>
#include <restkv/selection/selection_run.hpp>

#include <vector>

namespace restkv {

namespace detail {

/// Checks the arguments of a selection.
template <class Policy, element T, memory_space Space, class Real>
[[nodiscard]] status check_selection(const plan<Policy>& plan, const layer_view<T, Space>& layer,
                                     const workspace& space, const selection_details<Real, Space>* details) {
  using score_t = decltype(plan.policy.score);
  if (space.counting()) {
    return status::error(errc::workspace_too_small, "the workspace has no memory, the plan needs %zu bytes",
                         plan.workspace_bytes);
  }
  const auto& rescoring = plan.policy.rescoring;
  using rescoring_t = std::remove_cvref_t<decltype(rescoring)>;
  constexpr bool attends = rescoring_reads_attention<rescoring_t>();
  const index_t window = attends ? plan.policy.window : make_score_request(plan.policy, plan.shape).window;
  RESTKV_RETURN_IF_FAILED(check_layer(layer, plan.shape, window, needs_window<score_t>() || attends,
                                      needs_values<score_t>() || rescoring_needs_values<rescoring_t>(),
                                      needs_metric(plan.policy.score) || needs_metric(weight_of(rescoring))));
  if constexpr (needs_projection<score_t>() || needs_projection<decltype(weight_of(rescoring))>()) {
    RESTKV_RETURN_IF_FAILED(check_projection(layer, plan.shape));
  }
  if (details != nullptr) {
    RESTKV_RETURN_IF_FAILED(details->check(plan.shape.batch, plan.heads, layer.key.extent(2)));
  }
  return {};
}

/// Checks the arguments of a selection, carves its memory and calls use(run, weigh): a `selection_run`, and what fills
/// its rescorer's weights.
template <tensor_backend Backend, class Policy, element T, class Use>
[[nodiscard]] status with_selection_run(Backend& backend, const plan<Policy>& plan, const layer_view<T>& layer,
                                        workspace& space,
                                        const selection_details<typename Backend::score_type>* details,
                                        const Use& use) {
  RESTKV_RETURN_IF_FAILED(check_selection(plan, layer, space, details));
  using rescoring_t = decltype(plan.policy.rescoring);
  const auto request = make_score_request(plan.policy, plan.shape);
  selection_memory<Backend, Policy> memory(backend, plan, space);
  typename Backend::template scratch<score_request_of<Policy>> scratch(backend, request, space);
  selection_run<Backend, Policy, T> run(backend, plan, layer, request, memory, scratch, details);
  if constexpr (rescores<rescoring_t>) {
    rescoring_inputs<Backend, Policy> inputs(backend, plan.policy, plan.shape, space);
    RESTKV_RETURN_IF_FAILED(space.check());
    return use(run, [&] { return inputs.compute(backend, layer, memory); });
  } else {
    RESTKV_RETURN_IF_FAILED(space.check());
    return use(run, [] { return status(); });
  }
}

/// Checks the arguments of a selection on a bulk backend, carves its memory and calls use(run) with a `bulk_selection`.
template <bulk_backend Backend, class Policy, element T, memory_space Space, class Use>
[[nodiscard]] status with_bulk_selection(Backend& backend, const plan<Policy>& plan, const layer_view<T, Space>& layer,
                                         workspace& space,
                                         const std::type_identity_t<selection_details<float, Space>>* details,
                                         const Use& use) {
  RESTKV_RETURN_IF_FAILED(check_bulk_plan<Backend>(plan));  // it may be another backend's
  RESTKV_RETURN_IF_FAILED(check_selection(plan, layer, space, details));
  const auto request = make_score_request(plan.policy, plan.shape);
  bulk_memory<Backend, restkv::plan<Policy>> memory(backend, plan, space);
  typename Backend::template scratch<score_request_of<Policy>> scratch(backend, request, space);
  RESTKV_RETURN_IF_FAILED(space.check());
  bulk_selection<Backend, Policy, T> run(backend, plan, layer, request, memory, scratch, details);
  return use(run);
}

}  // namespace detail

/// Chooses the tokens each head keeps. `kept` points into the workspace afterwards and is valid as long as that is.
///
/// Sequences that fit their budget keep everything. Kept positions ascend; ties go to the smaller position; NaN scores
/// are chosen last. Allocates nothing. Nothing is written to `kept` on failure.
///
/// Errors: a layer that does not fit the plan; a workspace smaller than planned; details without room; a mask that
/// protects more tokens than the budget holds; an allocator that gives a head more than it said. Throws only what the
/// backend throws: nothing with `eigen_backend`, std::bad_alloc with the reference.
///
/// On a `bulk_backend` the layer's tensors, the workspace and what `kept` points at lie in the backend's memory, lengths and
/// the mask in the host's; the host waits for nothing, and nothing is read back. There the keys of one selection may be
/// read by an allocator only as `pooled_budget_allocator` says.
template <tensor_backend Backend, class Policy, element T, memory_space Space>
  requires(Space == detail::space_of<Backend>())
[[nodiscard]] status select(Backend& backend, const plan<Policy>& plan, const layer_view<T, Space>& layer,
                            workspace space, basic_kept_tokens<position_t, Space>& kept,
                            const std::type_identity_t<selection_details<typename Backend::score_type, Space>>* details =
                                nullptr) {
  if constexpr (detail::selects_in_bulk<Backend, Policy>) {
    return detail::with_bulk_selection(backend, plan, layer, space, details, [&](auto& run) { return run.run(kept); });
  } else {
    return detail::with_selection_run(backend, plan, layer, space, details,
                                      [&](auto& run, const auto& weigh) { return run.run(weigh, kept); });
  }
}

/// A kept set that owns its memory, for callers without a workspace of their own. Movable.
class owned_selection {
 public:
  /// What the last `run` chose; nothing after a selection that failed. Valid until the next, and as long as this object
  /// lives.
  [[nodiscard]] const kept_tokens& kept() const noexcept { return kept_; }
  /// The same.
  operator const_kept_tokens() const noexcept { return kept_; }  // NOLINT(google-explicit-constructor)

  /// Plans and selects with memory of its own.
  template <tensor_backend Backend, class Policy, element T>
  [[nodiscard]] status run(Backend& backend, const Policy& policy, const layer_view<T>& layer, index_t index = 0,
                           index_t layers = 1) {
    plan<Policy> made;
    RESTKV_RETURN_IF_FAILED(make_plan(backend, policy, shape_of(layer, index, layers), made));
    kept_ = {};  // lies in memory that is written now, or left
    memory_.resize(made.workspace_bytes);
    return select(backend, made, layer, workspace(memory_.data(), memory_.size()), kept_);
  }

 private:
  std::vector<std::byte> memory_;
  kept_tokens kept_;
};

#if RESTKV_EXCEPTIONS

/// `select` that throws `restkv::error`.
template <tensor_backend Backend, class Policy, element T, memory_space Space>
[[nodiscard]] basic_kept_tokens<position_t, Space> select(Backend& backend, const plan<Policy>& plan,
                                                          const layer_view<T, Space>& layer, workspace space) {
  basic_kept_tokens<position_t, Space> kept;
  throw_if_failed(select(backend, plan, layer, space, kept));
  return kept;
}

/// `select` with memory of its own, that throws `restkv::error`. Allocates: for scripts and tests.
template <tensor_backend Backend, class Policy, element T>
[[nodiscard]] owned_selection select(Backend& backend, const Policy& policy, const layer_view<T>& layer) {
  owned_selection chosen;
  throw_if_failed(chosen.run(backend, policy, layer));
  return chosen;
}

#endif

}  // namespace restkv
