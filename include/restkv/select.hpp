// SPDX-License-Identifier: Apache-2.0
/// @file
/// `make_plan` and `select`: from a layer's views to the positions each head keeps.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/plan.hpp>
#include <restkv/selection/top_k.hpp>

#include <atomic>
#include <vector>

namespace restkv {

/// Validates a policy for a shape and computes the workspace. Nothing is allocated.
///
/// Errors: a bad parameter of any part; heads that are not a multiple; a budget smaller than the protected tokens; an
/// axis beyond 2^31 - 1 tokens.
template <tensor_backend Backend, class Policy>
[[nodiscard]] status make_plan(const Backend& backend, const Policy& policy, const problem_shape& shape,
                               plan<Policy>& out) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(policy.check());
  if (shape.kv_heads < 1 || shape.query_heads < 1 || shape.query_heads % shape.kv_heads != 0) {
    return status::error(errc::shape_mismatch,
                         "query has %lld heads, key has %lld: query heads must be a multiple of kv heads",
                         ll(shape.query_heads), ll(shape.kv_heads));
  }
  if (shape.head_dim < 1 || shape.head_dim > 4096) {
    return status::error(errc::invalid_argument, "head_dim is %lld, must be within [1, 4096]", ll(shape.head_dim));
  }
  if (shape.batch < 0 || shape.tokens < 0) {
    return status::error(errc::invalid_argument, "the shape has %lld sequences of %lld tokens: neither may be negative",
                         ll(shape.batch), ll(shape.tokens));
  }
  constexpr index_t longest = std::numeric_limits<position_t>::max();
  if (shape.tokens > longest) {
    return status::error(errc::invalid_argument, "the shape has %lld tokens, the longest axis is %lld",
                         ll(shape.tokens), ll(longest));
  }
  if (shape.layers < 1 || shape.layer < 0 || shape.layer >= shape.layers) {
    return status::error(errc::invalid_argument, "layer %lld of %lld layers does not exist", ll(shape.layer),
                         ll(shape.layers));
  }
  constexpr index_t most_rows = index_t(1) << 40;
  if (shape.batch > most_rows / shape.query_heads / std::max<index_t>(1, shape.tokens)) {
    return status::error(errc::invalid_argument, "%lld sequences of %lld heads of %lld tokens pass 2^40 scores",
                         ll(shape.batch), ll(shape.query_heads), ll(shape.tokens));
  }
  plan<Policy> made;
  made.policy = policy;
  made.shape = shape;
  made.heads = policy.group == group_reduce::none ? shape.query_heads : shape.kv_heads;
  const index_t fixed = std::min(shape.tokens, policy.protect.sink + policy.recent());
  const budget_problem longest_sequence{made.heads, shape.tokens, shape.tokens - fixed, shape.layer, shape.layers};
  const index_t budget = policy.budget.tokens_per_head(longest_sequence);
  if (budget < fixed) {
    return status::error(errc::invalid_argument,
                         "the budget is %lld tokens per head, %lld are protected (%lld sinks, %lld recent)",
                         ll(budget), ll(fixed), ll(policy.protect.sink), ll(policy.recent()));
  }
  made.capacity = std::clamp<index_t>(policy.budget.most_per_head(longest_sequence), fixed, shape.tokens);
  workspace counting;
  detail::selection_memory<Backend, Policy> memory(backend, made, counting);
  typename Backend::template scratch<score_request_of<Policy>> scratch(backend, make_score_request(policy, shape),
                                                                       counting);
  RESTKV_RETURN_IF_FAILED(counting.check());
  made.workspace_bytes = counting.required_bytes();
  out = made;
  return {};
}

namespace detail {

/// One sequence's tokens that may be evicted, in numbers: a view on the mask and the two ends.
template <element T>
struct candidate_range {
  const layer_view<T>* layer;
  index_t batch;
  sequence_span span;
  index_t sink;
  index_t end;  ///< first recent token

  [[nodiscard]] bool operator()(index_t n) const noexcept {
    return n >= sink && n < end && (layer->keep_mask.data == nullptr || layer->keep_mask(batch, span.begin + n) == 0);
  }
  [[nodiscard]] index_t count() const noexcept {
    if (layer->keep_mask.data == nullptr) return std::max<index_t>(0, end - sink);
    index_t sum = 0;
    for (index_t n = sink; n < end; ++n) sum += (*this)(n) ? 1 : 0;
    return sum;
  }
};

/// Whether this selection prunes; prepares the rows if so. Not when a smoother's reach is too wide to be certain of, nor
/// when an allocator looks at every key.
template <class Backend, class Policy, class ProblemOf>
[[nodiscard]] bool prunes(const selection_memory<Backend, Policy>& memory, const Policy& policy, index_t heads,
                          index_t batch, const ProblemOf& problem_of) noexcept {
  if constexpr (!may_prune<Backend, Policy>) {
    return false;
  } else {
    if (memory.states == nullptr) return false;
    for (index_t b = 0; b < batch; ++b) {
      const budget_problem problem = problem_of(b).second;
      const bool keeps_all = problem.length <= policy.budget.tokens_per_head(problem);
      if (!keeps_all && policy.budget.deciding_keys(problem) > heads * problem.candidates) return false;
      for (index_t h = 0; h < heads; ++h) {
        const token_reach reach = policy.spatial.reach(row_context{memory.drift(b, h)});
        if (reach.last - reach.first >= widest_direct_reach) return false;
      }
    }
    std::fill_n(memory.states, memory.score.size(), token_state::bounded);
    return true;
  }
}

/// One round of certified pruning: marks the tokens that must be scored next, and returns how many; 0 when the choice by
/// `memory.counts` is certain.
template <class Backend, class Policy, class Request, class ProblemOf, class KeysOf>
[[nodiscard]] index_t want_tokens(Backend& backend, const selection_memory<Backend, Policy>& memory,
                                  const plan<Policy>& plan, const Request& request, const ProblemOf& problem_of,
                                  const KeysOf& keys_of) noexcept {
  using key_t = order_key_t<typename Backend::score_type>;
  const index_t heads = plan.heads;
  const index_t tokens = plan.shape.tokens;
  const auto keeps_all = [&](const budget_problem& problem) {
    return problem.length <= plan.policy.budget.tokens_per_head(problem);
  };
  backend.parallel_for(plan.shape.batch * heads, [&](index_t row) {
    const index_t b = row / heads;
    const index_t length = problem_of(b).second.length;
    memory.rows[row] = {keys_of(row),
                        length,
                        memory.states + row * tokens,
                        memory.settled + row * tokens,
                        request.past_of(length),
                        plan.policy.spatial.reach(row_context{memory.drift(b, row % heads)})};
    memory.rows[row].settle();
  });
  std::atomic<index_t> wanted{0};
  for (index_t b = 0; b < plan.shape.batch; ++b) {
    const budget_problem problem = problem_of(b).second;
    if (keeps_all(problem)) continue;
    const auto pivots = find_deciding(
        std::span<const pruning_row<key_t>>(memory.rows + b * heads, static_cast<std::size_t>(heads)),
        plan.policy.budget.deciding_keys(problem));
    backend.parallel_for(heads, [&](index_t h) {
      const index_t row = b * heads + h;
      wanted += memory.rows[row].want(memory.counts[row], pivots.deciding, pivots.enough);
    });
  }
  return wanted;
}

}  // namespace detail

/// Chooses the tokens each head keeps. `kept` points into the workspace afterwards and is valid as long as that is.
///
/// Sequences that fit their budget keep everything. Kept positions ascend; ties go to the smaller position; NaN scores
/// are chosen last. Allocates nothing. Nothing is written to `kept` on failure.
///
/// Errors: a layer that does not fit the plan; a workspace smaller than planned; a mask that protects more tokens than
/// the budget holds.
template <tensor_backend Backend, class Policy, element T>
[[nodiscard]] status select(Backend& backend, const plan<Policy>& plan, const layer_view<T>& layer, workspace space,
                            kept_tokens& kept,
                            const selection_details<typename Backend::score_type>* details = nullptr) noexcept {
  using real = typename Backend::score_type;
  using key_t = order_key_t<real>;
  using score_t = decltype(plan.policy.score);
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const auto& policy = plan.policy;
  const auto request = make_score_request(policy, plan.shape);
  RESTKV_RETURN_IF_FAILED(check_layer(layer, plan.shape, request.window, needs_window<score_t>(),
                                      needs_values<score_t>(), needs_metric(policy.score)));
  detail::selection_memory<Backend, Policy> memory(backend, plan, space);
  typename Backend::template scratch<score_request_of<Policy>> scratch(backend, request, space);
  RESTKV_RETURN_IF_FAILED(space.check());

  const index_t heads = plan.heads;
  const index_t batch = plan.shape.batch;
  const auto problem_of = [&](index_t b) {
    const sequence_span span = sequence(layer, b);
    const index_t end = std::max<index_t>(0, span.length - policy.recent());
    const detail::candidate_range<T> candidates{&layer, b, span, std::min(policy.protect.sink, end), end};
    return std::pair{candidates,
                     budget_problem{heads, span.length, candidates.count(), plan.shape.layer, plan.shape.layers}};
  };
  for (index_t b = 0; b < batch; ++b) {
    const budget_problem problem = problem_of(b).second;
    const index_t budget = std::min(policy.budget.tokens_per_head(problem), problem.length);
    const index_t fixed = std::min(problem.length, policy.protect.sink + policy.recent());
    if (budget < problem.protected_tokens() && problem.protected_tokens() > fixed) {
      return status::error(errc::invalid_argument,
                           "sequence %lld: the budget is %lld tokens per head, the mask and window protect %lld",
                           ll(b), ll(budget), ll(problem.protected_tokens()));
    }
    if (problem.protected_tokens() > plan.capacity) {
      return status::error(errc::invalid_argument, "sequence %lld protects %lld tokens, the plan's heads keep %lld",
                           ll(b), ll(problem.protected_tokens()), ll(plan.capacity));
    }
    memory.counts[b] = std::max<index_t>(0, budget - request.window_of(problem.length));
  }

  // Drift first: it needs counts[] as input, which the allocator overwrites.
  std::fill_n(memory.drift.data, batch * heads, 0.0);
  if constexpr (needs_drift<decltype(policy.spatial)>()) {
    if (uses_drift(policy.spatial)) {
      RESTKV_RETURN_IF_FAILED(backend.window_drift(request, layer, std::span<const index_t>(memory.counts, batch),
                                                   scratch, scratch.drift()));
      const index_t group = plan.shape.query_heads / heads;
      for (index_t b = 0; b < batch; ++b) {
        for (index_t h = 0; h < heads; ++h) {
          for (index_t j = 0; j < group; ++j) memory.drift(b, h) += scratch.drift()(b, h * group + j);
          memory.drift(b, h) /= static_cast<double>(group);
        }
      }
    }
  }
  const bool pruned = details == nullptr && detail::prunes(memory, policy, heads, batch, problem_of);
  if constexpr (detail::may_prune<Backend, Policy>) {
    if (pruned) RESTKV_RETURN_IF_FAILED(backend.score_bounds(request, layer, scratch, memory.score));
  }
  if (!pruned) RESTKV_RETURN_IF_FAILED(backend.token_scores(request, layer, scratch, memory.score));

  // Smooth each row, then replace its smoothed scores by their order keys.
  const auto keys_of = [&](index_t row) {
    return reinterpret_cast<key_t*>(&memory.smoothed.data[row * plan.shape.tokens]);
  };
  const auto smooth_rows = [&] {
    backend.parallel_for(batch * heads, [&](index_t row) {
      const index_t b = row / heads;
      const index_t h = row % heads;
      const auto candidates = problem_of(b).first;
      const index_t past = request.past_of(candidates.span.length);
      const real* const scores = &memory.score.data[row * plan.shape.tokens];
      real* const smoothed = &memory.smoothed.data[row * plan.shape.tokens];
      policy.spatial(std::span<const real>(scores, static_cast<std::size_t>(past)),
                     std::span<real>(smoothed, static_cast<std::size_t>(past)), row_context{memory.drift(b, h)});
      if (details != nullptr) {
        for (index_t n = 0; n < past; ++n) {
          details->score(b, h, n) = scores[n];
          details->smoothed(b, h, n) = smoothed[n];
        }
        details->drift(b, h) = memory.drift(b, h);
      }
      key_t* const keys = keys_of(row);
      for (index_t n = 0; n < candidates.span.length; ++n) {
        keys[n] = candidates(n) ? order_key(smoothed[n]) : key_t{excluded_key};
      }
    });
  };
  // Budgets, one sequence after the other: heads may compete.
  const auto allocate = [&] {
    for (index_t b = 0; b < batch; ++b) {
      const budget_problem problem = problem_of(b).second;
      const std::span<index_t> counts(memory.counts + b * heads, static_cast<std::size_t>(heads));
      if (problem.length <= policy.budget.tokens_per_head(problem)) {
        std::fill(counts.begin(), counts.end(), problem.candidates);
        continue;
      }
      const tensor_view<const key_t, 2> keys(keys_of(b * heads), {heads, problem.length}, {plan.shape.tokens, 1});
      policy.budget.allocate(problem, keys, counts,
                             std::span<double>(memory.shares + b * heads, static_cast<std::size_t>(heads)));
    }
  };
  smooth_rows();
  allocate();
  if constexpr (detail::may_prune<Backend, Policy>) {
    while (pruned && detail::want_tokens(backend, memory, plan, request, problem_of, keys_of) > 0) {
      RESTKV_RETURN_IF_FAILED(backend.exact_scores(
          request, layer, scratch,
          tensor_view<token_state, 3>(memory.states, {batch, heads, plan.shape.tokens}), memory.score));
      smooth_rows();
      allocate();
    }
  }

  std::atomic<index_t> overfull{-1};
  backend.parallel_for(batch * heads, [&](index_t row) {
    const auto [candidates, problem] = problem_of(row / heads);
    const index_t count = memory.counts[row];
    if (count < 0 || problem.protected_tokens() + count > plan.capacity) {
      overfull = row;
      return;
    }
    const key_t* const keys = keys_of(row);
    position_t* const positions = memory.positions.data + row * plan.capacity;
    const auto pivot = find_pivot<key_t>(
        1, problem.length, [keys](index_t, index_t n) { return keys[n]; }, count);
    index_t equal_left = pivot.equal;
    index_t written = 0;
    for (index_t n = 0; n < problem.length; ++n) {
      const key_t key = keys[n];
      const bool chosen = key == excluded_key || key > pivot.key || (key == pivot.key && equal_left-- > 0);
      if (chosen) positions[written++] = static_cast<position_t>(candidates.span.begin + n);
    }
    memory.lengths.data[row] = static_cast<position_t>(written);
  });
  if (const index_t row = overfull; row >= 0) {
    return status::error(errc::invalid_argument, "the budget allocator gave head %lld %lld tokens, at most %lld fit",
                         ll(row % heads), ll(memory.counts[row]), ll(plan.capacity));
  }
  kept = {memory.positions, memory.lengths};
  return {};
}

/// A kept set that owns its memory, for callers without a workspace of their own. Movable.
class owned_selection {
 public:
  [[nodiscard]] const kept_tokens& kept() const noexcept { return kept_; }
  operator const_kept_tokens() const noexcept { return kept_; }  // NOLINT(google-explicit-constructor)

  /// Plans and selects with memory of its own.
  template <tensor_backend Backend, class Policy, element T>
  [[nodiscard]] status run(Backend& backend, const Policy& policy, const layer_view<T>& layer, index_t index = 0,
                           index_t layers = 1) {
    plan<Policy> made;
    RESTKV_RETURN_IF_FAILED(make_plan(backend, policy, shape_of(layer, index, layers), made));
    memory_.resize(made.workspace_bytes);
    return select(backend, made, layer, workspace(memory_.data(), memory_.size()), kept_);
  }

 private:
  std::vector<std::byte> memory_;
  kept_tokens kept_;
};

#if RESTKV_EXCEPTIONS

/// `make_plan` that throws `restkv::error`.
template <tensor_backend Backend, class Policy>
[[nodiscard]] plan<Policy> make_plan(const Backend& backend, const Policy& policy, const problem_shape& shape) {
  plan<Policy> made;
  throw_if_failed(make_plan(backend, policy, shape, made));
  return made;
}

/// `select` that throws `restkv::error`.
template <tensor_backend Backend, class Policy, element T>
[[nodiscard]] kept_tokens select(Backend& backend, const plan<Policy>& plan, const layer_view<T>& layer,
                                 workspace space) {
  kept_tokens kept;
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
