// SPDX-License-Identifier: Apache-2.0
/// @file
/// `model_plan`: a policy and a budget across layers, validated for a model.
#pragma once

#include <restkv/model/bulk_layer_sums.hpp>
#include <restkv/model/kept_pool.hpp>
#include <restkv/model/model_budget.hpp>
#include <restkv/model/model_room.hpp>
#include <restkv/plan.hpp>
#include <restkv/score/attention_entropy.hpp>
#include <restkv/smoothing/mean_variance.hpp>

namespace restkv {

/// A policy with another budget, its other parts as they are.
template <class Policy, budget_allocator Other>
[[nodiscard]] constexpr auto with_budget(const Policy& policy, const Other& budget) noexcept {
  return with_parts(policy, policy.score, policy.temporal, budget);
}

/// What `model_selection` needs to know, computed once. A plain value.
template <class Policy, model_budget Budget>
struct model_plan {
  using layer_policy = decltype(with_budget(Policy{}, uniform{}));  ///< how a layer is ranked

  plan<layer_policy> layer{};       ///< of a layer: the policy with the mean budget for each head
  Budget budget{};                  ///< as it was given
  index_t entries = 0;              ///< units that a sequence holds at most: what it keeps, and one layer that came in
  std::size_t state_bytes = 0;      ///< what a model_selection holds from layer to layer
  std::size_t workspace_bytes = 0;  ///< what it needs besides while a layer comes in
};

namespace detail {

/// Sums over a layer's attention that a budget may ask for.
using entropy_request = score_request<attention_entropy, sum>;
using variance_request = score_request<snap_kv, variance>;

template <class Request, class Policy>
[[nodiscard]] constexpr Request make_attention_sum(const Policy& policy, const problem_shape& shape) noexcept {
  return {{}, {}, policy.window, policy.group == group_reduce::none ? group_reduce::none : group_reduce::sum, shape};
}

/// Both, with what a backend needs for them.
template <class Backend>
struct attention_sums {
  entropy_request entropy;
  variance_request variance;
  typename Backend::template scratch<entropy_request> entropy_scratch;
  typename Backend::template scratch<variance_request> variance_scratch;

  /// Counts where the workspace counts.
  template <class Policy>
  attention_sums(const Backend& backend, const Policy& policy, const problem_shape& shape, workspace& from)
      : entropy(make_attention_sum<entropy_request>(policy, shape)),
        variance(make_attention_sum<variance_request>(policy, shape)),
        entropy_scratch(backend, entropy, from),
        variance_scratch(backend, variance, from) {}
};

/// The memory that a model_selection keeps, carved by the same code when planning and when running.
template <std::unsigned_integral Key, class ModelPlan>
struct model_memory {
  struct span {
    position_t begin;
    position_t length;
  };

  span* spans = nullptr;              // [layers, batch, rows]
  double* preferences = nullptr;      // [batch, layers]
  double* entropies = nullptr;        // [batch], of the layer that comes in
  double* variances = nullptr;        // [batch], likewise
  index_t* ceilings = nullptr;        // [layers]
  index_t* counts = nullptr;          // [layers]
  index_t* totals = nullptr;          // [batch], units that the model keeps
  index_t* reserved = nullptr;        // [batch], units that a layer to come will hold for good
  index_t* held = nullptr;            // [batch], units held for good so far
  index_t* dropped = nullptr;         // [layers], units that the last layer to come in evicted
  tensor_view<position_t, 3> positions{};       // [batch, heads, tokens]
  tensor_view<position_t, 3> slot_positions{};  // [batch, heads, tokens]
  tensor_view<position_t, 2> lengths{};         // [batch, heads]
  kept_pool<Key>* pools = nullptr;    // [batch]

  model_memory(const ModelPlan& p, workspace& space) noexcept {
    const problem_shape& shape = p.layer.shape;
    spans = space.take<span>(shape.layers, shape.batch, p.layer.rows);
    preferences = space.take<double>(shape.batch, shape.layers);
    entropies = space.take<double>(shape.batch);
    variances = space.take<double>(shape.batch);
    ceilings = space.take<index_t>(shape.layers);
    counts = space.take<index_t>(shape.layers);
    totals = space.take<index_t>(shape.batch);
    reserved = space.take<index_t>(shape.batch);
    held = space.take<index_t>(shape.batch);
    dropped = space.take<index_t>(shape.layers);
    const std::array room{shape.batch, p.layer.heads, shape.tokens};
    positions = {space.take<position_t>(room[0], room[1], room[2]), room};
    slot_positions = {space.take<position_t>(room[0], room[1], room[2]), room};
    lengths = {space.take<position_t>(room[0], room[1]), {room[0], room[1]}};
    pools = space.take<kept_pool<Key>>(shape.batch);
    for (index_t b = 0; b < shape.batch; ++b) {
      const kept_pool<Key> pool(shape.layers * p.layer.rows, p.entries, space);
      if (pools != nullptr) std::construct_at(pools + b, pool);
    }
  }
};

}  // namespace detail

/// Validates a policy and a budget across layers for a model whose layers all have `shape` (shape.layers of them;
/// shape.layer does not act). The policy's own budget does not act. Nothing is allocated.
///
/// Errors: those of `make_plan`; a bad parameter of the budget; one that looks at attention where the policy has no
/// observation window; `least` and the protected tokens beyond the budget.
template <tensor_backend Backend, class Policy, model_budget Budget>
[[nodiscard]] status make_model_plan(const Backend& backend, const Policy& policy, const Budget& budget,
                                     const problem_shape& shape, model_plan<Policy, Budget>& out) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(budget.check());
  model_plan<Policy, Budget> made;
  made.budget = budget;
  problem_shape first = shape;
  first.layer = 0;
  RESTKV_RETURN_IF_FAILED(make_plan(backend, with_budget(policy, uniform{budget.budget}), first, made.layer));
  const budget_problem longest = detail::budget_of_span(policy, first, made.layer.rows, shape.tokens);
  const index_t per_head = budget_size(budget.budget).of(longest);
  const index_t least = std::min<index_t>(budget.least, longest.candidates);
  if (longest.protected_tokens() + least > per_head) {
    return status::error(errc::invalid_argument,
                         "the budget is %lld %s per head, %lld are protected and at least %lld kept", ll(per_head),
                         longest.unit == 1 ? "tokens" : "chunks or pages", ll(longest.protected_tokens()), ll(least));
  }
  constexpr index_t most_sequences = 1 << 20;  // each has a pool of its own
  if (shape.batch > most_sequences) {
    return status::error(errc::invalid_argument, "%lld sequences, at most %lld are possible", ll(shape.batch),
                         ll(most_sequences));
  }
  if (needs_attention<Budget>() && !needs_window<decltype(policy.score)>()) {
    return status::error(errc::invalid_argument,
                         "the budget looks at the window's attention: the policy's score must observe a window");
  }
  if (needs_attention<Budget>() && policy.window > most_window) {
    return status::error(
        errc::invalid_argument,
        "the budget looks at the attention of an observation window of at most %lld queries: the policy "
        "observes %lld",
        ll(most_window), ll(policy.window));
  }
  // What is kept, and a whole layer on top of it before the eviction. A shorter sequence may protect a unit more.
  const index_t whole = made.layer.rows * longest.length;
  const index_t most = per_head + (longest.unit == 1 ? 0 : 1);
  made.entries = std::min(shape.layers * whole, shape.layers * made.layer.rows * most + whole);
  workspace state;
  workspace sums;
  if constexpr (detail::space_of<Backend>() == memory_space::host) {
    const detail::model_memory<order_key_t<typename Backend::score_type>, model_plan<Policy, Budget>> memory(made,
                                                                                                             state);
    static_cast<void>(memory);
  } else {
    const detail::bulk_model_state<Backend, model_plan<Policy, Budget>> memory(made, state);
    const detail::bulk_model_scratch<Backend, model_plan<Policy, Budget>> scratch(backend, made, memory.pool.rows(),
                                                                                  sums);
    static_cast<void>(scratch);
  }
  RESTKV_RETURN_IF_FAILED(state.check());
  if constexpr (needs_attention<Budget>()) {
    const detail::attention_sums<Backend> memory(backend, policy, first, sums);
    static_cast<void>(memory);
  }
  RESTKV_RETURN_IF_FAILED(sums.check());
  made.state_bytes = state.required_bytes();
  made.workspace_bytes = made.layer.workspace_bytes + sums.required_bytes();
  out = made;
  return {};
}

#if RESTKV_EXCEPTIONS

/// `make_model_plan` that throws `restkv::error`.
template <tensor_backend Backend, class Policy, model_budget Budget>
[[nodiscard]] model_plan<Policy, Budget> make_model_plan(const Backend& backend, const Policy& policy,
                                                         const Budget& budget, const problem_shape& shape) {
  model_plan<Policy, Budget> made;
  throw_if_failed(make_model_plan(backend, policy, budget, shape, made));
  return made;
}

#endif

}  // namespace restkv
