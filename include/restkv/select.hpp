// SPDX-License-Identifier: Apache-2.0
/// @file
/// `select`: from a layer's views to the positions each head keeps.
#pragma once

#include <restkv/plan.hpp>
#include <restkv/selection/pruning.hpp>
#include <restkv/selection/top_k.hpp>

#include <atomic>
#include <memory>
#include <vector>

namespace restkv {

namespace detail {

/// One selection: the steps of `select`, in the order in which they run, over memory that was carved before.
template <class Backend, class Policy, class T>
class selection_run {
  using real = typename Backend::score_type;
  using key_t = order_key_t<real>;
  using request_t = score_request_of<Policy>;
  using scratch_t = typename Backend::template scratch<request_t>;

 public:
  selection_run(Backend& backend, const plan<Policy>& plan, const layer_view<T>& layer, const request_t& request,
                selection_memory<Backend, Policy>& memory, scratch_t& scratch,
                const selection_details<real>* details) noexcept
      : backend_(backend), plan_(plan), layer_(layer), request_(request), memory_(memory), scratch_(scratch),
        details_(details) {}

  [[nodiscard]] status run(kept_tokens& kept) {
    RESTKV_RETURN_IF_FAILED(check_budgets());
    if (details_ != nullptr || anything_to_choose()) {
      RESTKV_RETURN_IF_FAILED(measure_drift());
      const bool pruned = details_ == nullptr && may_prune_now();
      if constexpr (may_prune<Backend, Policy>) {
        if (pruned) RESTKV_RETURN_IF_FAILED(backend_.score_bounds(request_, layer_, scratch_, memory_.score));
      }
      if (!pruned) RESTKV_RETURN_IF_FAILED(backend_.token_scores(request_, layer_, scratch_, memory_.score));
      smooth();
      allocate();
      if constexpr (may_prune<Backend, Policy>) {
        while (pruned && want_tokens() > 0) {
          RESTKV_RETURN_IF_FAILED(backend_.exact_scores(request_, layer_, scratch_, memory_.states, memory_.score));
          smooth();
          allocate();
        }
      }
    } else {
      // Whatever the scores: every candidate is kept.
      backend_.parallel_for(rows(), [this](index_t row) { make_keys(row, [](index_t) { return key_t{1}; }); });
      allocate();
    }
    RESTKV_RETURN_IF_FAILED(choose());
    kept = {memory_.positions, memory_.lengths};
    return {};
  }

 private:
  /// A sequence of the batch: its tokens, and which of them may be evicted.
  struct sequence_problem {
    const layer_view<T>* layer = nullptr;
    index_t batch = 0;
    sequence_span span{};
    index_t sink = 0;
    index_t end = 0;  ///< first recent token
    budget_problem budget{};
    index_t tokens_per_head = 0;

    [[nodiscard]] bool may_evict(index_t n) const noexcept {
      return n >= sink && n < end && (layer->keep_mask.data == nullptr || layer->keep_mask(batch, span.begin + n) == 0);
    }
    [[nodiscard]] bool keeps_all() const noexcept { return span.length <= tokens_per_head; }
  };

  [[nodiscard]] sequence_problem problem_of(index_t b) const noexcept {
    const Policy& policy = plan_.policy;
    sequence_problem problem;
    problem.layer = &layer_;
    problem.batch = b;
    problem.span = sequence(layer_, b);
    problem.end = std::max<index_t>(0, problem.span.length - policy.recent());
    problem.sink = std::min(policy.protect.sink, problem.end);
    index_t candidates = problem.end - problem.sink;
    if (layer_.keep_mask.data != nullptr) {
      candidates = 0;
      for (index_t n = problem.sink; n < problem.end; ++n) candidates += problem.may_evict(n) ? 1 : 0;
    }
    problem.budget = {plan_.heads, problem.span.length, candidates, plan_.shape.layer, plan_.shape.layers};
    problem.tokens_per_head = policy.budget.tokens_per_head(problem.budget);
    return problem;
  }

  [[nodiscard]] index_t batch() const noexcept { return plan_.shape.batch; }
  [[nodiscard]] index_t rows() const noexcept { return batch() * plan_.heads; }
  [[nodiscard]] real* smoothed_row(index_t row) const noexcept {
    return memory_.smoothed.data + row * plan_.shape.tokens;
  }
  /// A row's order keys lie where its smoothed scores lay: `make_keys` turns one into the other.
  [[nodiscard]] key_t* key_row(index_t row) const noexcept { return reinterpret_cast<key_t*>(smoothed_row(row)); }
  [[nodiscard]] row_context context_of(index_t row) const noexcept {
    return {memory_.drift(row / plan_.heads, row % plan_.heads)};
  }

  /// Fails where a sequence protects more tokens than its budget or the plan's capacity holds.
  [[nodiscard]] status check_budgets() const noexcept {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    for (index_t b = 0; b < batch(); ++b) {
      const sequence_problem problem = problem_of(b);
      const index_t kept = problem.budget.protected_tokens();
      const index_t budget = std::min(problem.tokens_per_head, problem.span.length);
      const index_t fixed = std::min(problem.span.length, plan_.policy.protect.sink + plan_.policy.recent());
      if (budget < kept && kept > fixed) {
        return status::error(errc::invalid_argument,
                             "sequence %lld: the budget is %lld tokens per head, the mask and window protect %lld",
                             ll(b), ll(budget), ll(kept));
      }
      if (kept > plan_.capacity) {
        return status::error(errc::invalid_argument, "sequence %lld protects %lld tokens, the plan's heads keep %lld",
                             ll(b), ll(kept), ll(plan_.capacity));
      }
    }
    return {};
  }

  [[nodiscard]] bool anything_to_choose() const {
    for (index_t b = 0; b < batch(); ++b) {
      if (!problem_of(b).keeps_all()) return true;
    }
    return false;
  }

  [[nodiscard]] status measure_drift() const {
    std::fill_n(memory_.drift.data, rows(), 0.0);
    if constexpr (needs_drift<decltype(plan_.policy.spatial)>()) {
      if (!uses_drift(plan_.policy.spatial)) return {};
      for (index_t b = 0; b < batch(); ++b) {
        const sequence_problem problem = problem_of(b);
        const index_t budget = std::min(problem.tokens_per_head, problem.span.length);
        memory_.counts[b] = std::max<index_t>(0, budget - request_.window_of(problem.span.length));
      }
      RESTKV_RETURN_IF_FAILED(backend_.window_drift(
          request_, layer_, std::span<const index_t>(memory_.counts, static_cast<std::size_t>(batch())), scratch_,
          scratch_.drift()));
      const index_t group = plan_.shape.query_heads / plan_.heads;
      for (index_t b = 0; b < batch(); ++b) {
        for (index_t h = 0; h < plan_.heads; ++h) {
          for (index_t j = 0; j < group; ++j) memory_.drift(b, h) += scratch_.drift()(b, h * group + j);
          memory_.drift(b, h) /= static_cast<double>(group);
        }
      }
    }
    return {};
  }

  /// Not when a smoother's reach is too wide to be certain of, nor when an allocator looks at every key.
  [[nodiscard]] bool may_prune_now() const noexcept {
    if constexpr (may_prune<Backend, Policy>) {
      if (memory_.states.data == nullptr) return false;
      for (index_t b = 0; b < batch(); ++b) {
        const sequence_problem problem = problem_of(b);
        const index_t deciding = plan_.policy.budget.deciding_keys(problem.budget);
        if (!problem.keeps_all() && deciding > plan_.heads * problem.budget.candidates) return false;
      }
      for (index_t row = 0; row < rows(); ++row) {
        const token_reach reach = plan_.policy.spatial.reach(context_of(row));
        if (reach.last - reach.first >= widest_direct_reach) return false;
      }
      std::fill_n(memory_.states.data, memory_.states.size(), token_state::bounded);
      return true;
    } else {
      return false;
    }
  }

  /// Smooths each row, then replaces its smoothed scores by their order keys.
  void smooth() const {
    backend_.parallel_for(rows(), [this](index_t row) {
      const index_t b = row / plan_.heads;
      const index_t h = row % plan_.heads;
      const auto past = static_cast<std::size_t>(request_.past_of(sequence(layer_, b).length));
      const real* const scores = memory_.score.data + row * plan_.shape.tokens;
      real* const smoothed = smoothed_row(row);
      std::uninitialized_default_construct_n(smoothed, past);  // where keys were: no instruction
      plan_.policy.spatial(std::span<const real>(scores, past), std::span<real>(smoothed, past), context_of(row));
      if (details_ != nullptr) {
        for (std::size_t n = 0; n < past; ++n) {
          details_->score(b, h, n) = scores[n];
          details_->smoothed(b, h, n) = smoothed[n];
        }
        details_->drift(b, h) = memory_.drift(b, h);
      }
      make_keys(row, [smoothed](index_t n) { return order_key(smoothed[n]); });
    });
  }

  template <class KeyOf>
  void make_keys(index_t row, const KeyOf& key_of) const noexcept {
    const sequence_problem problem = problem_of(row / plan_.heads);
    key_t* const keys = key_row(row);
    for (index_t n = 0; n < problem.span.length; ++n) {
      std::construct_at(keys + n, problem.may_evict(n) ? key_of(n) : key_t{excluded_key});
    }
  }

  /// Budgets, one sequence after the other: heads may compete.
  void allocate() const noexcept {
    const auto heads = static_cast<std::size_t>(plan_.heads);
    for (index_t b = 0; b < batch(); ++b) {
      const sequence_problem problem = problem_of(b);
      const std::span<index_t> counts(memory_.counts + b * plan_.heads, heads);
      if (problem.keeps_all()) {
        std::fill(counts.begin(), counts.end(), problem.budget.candidates);
        continue;
      }
      const tensor_view<const key_t, 2> keys(key_row(b * plan_.heads), {plan_.heads, problem.span.length},
                                             {plan_.shape.tokens, 1});
      plan_.policy.budget.allocate(problem.budget, keys, counts,
                                   std::span<double>(memory_.shares + b * plan_.heads, heads));
    }
  }

  /// One round of certified pruning: marks the tokens that must be scored next, and returns how many; 0 when the choice
  /// by `counts` is certain.
  [[nodiscard]] index_t want_tokens() const {
    const index_t heads = plan_.heads;
    backend_.parallel_for(rows(), [this](index_t row) {
      const index_t length = sequence(layer_, row / plan_.heads).length;
      memory_.rows[row] = {key_row(row),
                           length,
                           memory_.states.data + row * plan_.shape.tokens,
                           memory_.settled + row * plan_.shape.tokens,
                           request_.past_of(length),
                           plan_.policy.spatial.reach(context_of(row))};
      memory_.rows[row].settle();
    });
    std::atomic<index_t> wanted{0};
    for (index_t b = 0; b < batch(); ++b) {
      const sequence_problem problem = problem_of(b);
      if (problem.keeps_all()) continue;
      const pruning_row<key_t>* const first = memory_.rows + b * heads;
      const auto pivots = find_deciding(std::span(first, static_cast<std::size_t>(heads)),
                                        plan_.policy.budget.deciding_keys(problem.budget));
      backend_.parallel_for(heads, [&](index_t h) {
        wanted += first[h].want(memory_.counts[b * heads + h], pivots.deciding, pivots.enough);
      });
    }
    return wanted;
  }

  /// The `counts` best candidates of each row and the protected tokens, ascending.
  [[nodiscard]] status choose() const {
    RESTKV_RETURN_IF_FAILED(check_counts());
    backend_.parallel_for(rows(), [&](index_t row) {
      const sequence_problem problem = problem_of(row / plan_.heads);
      const index_t count = memory_.counts[row];
      const key_t* const keys = key_row(row);
      position_t* const positions = memory_.positions.data + row * plan_.capacity;
      const auto pivot = find_pivot<key_t>(
          1, problem.span.length, [keys](index_t, index_t n) { return keys[n]; }, count);
      index_t equal_left = pivot.equal;
      index_t written = 0;
      for (index_t n = 0; n < problem.span.length; ++n) {
        const key_t key = keys[n];
        const bool chosen = key == excluded_key || key > pivot.key || (key == pivot.key && equal_left-- > 0);
        if (chosen) positions[written++] = static_cast<position_t>(problem.span.begin + n);
      }
      memory_.lengths.data[row] = static_cast<position_t>(written);
    });
    return {};
  }

  /// Fails where an allocator breaks its promises: what it gave may pass the end of a row.
  [[nodiscard]] status check_counts() const {
    for (index_t b = 0; b < batch(); ++b) {
      const budget_problem problem = problem_of(b).budget;
      const index_t most = std::min(problem.candidates, plan_.capacity - problem.protected_tokens());
      for (index_t h = 0; h < plan_.heads; ++h) {
        const index_t count = memory_.counts[b * plan_.heads + h];
        if (count >= 0 && count <= most) continue;
        return status::error(errc::invalid_argument,
                             "the budget allocator gave head %lld of sequence %lld %lld tokens to choose, at most %lld "
                             "are left",
                             static_cast<long long>(h), static_cast<long long>(b), static_cast<long long>(count),
                             static_cast<long long>(most));
      }
    }
    return {};
  }

  Backend& backend_;
  const plan<Policy>& plan_;
  const layer_view<T>& layer_;
  const request_t& request_;
  selection_memory<Backend, Policy>& memory_;
  scratch_t& scratch_;
  const selection_details<real>* details_;
};

}  // namespace detail

/// Chooses the tokens each head keeps. `kept` points into the workspace afterwards and is valid as long as that is.
///
/// Sequences that fit their budget keep everything. Kept positions ascend; ties go to the smaller position; NaN scores
/// are chosen last. Allocates nothing. Nothing is written to `kept` on failure.
///
/// Errors: a layer that does not fit the plan; a workspace smaller than planned; details without room; a mask that
/// protects more tokens than the budget holds; an allocator that gives a head more than it said. Throws only what the
/// backend throws: nothing with `eigen_backend`, std::bad_alloc with the reference.
template <tensor_backend Backend, class Policy, element T>
[[nodiscard]] status select(Backend& backend, const plan<Policy>& plan, const layer_view<T>& layer, workspace space,
                            kept_tokens& kept,
                            const selection_details<typename Backend::score_type>* details = nullptr) {
  using score_t = decltype(plan.policy.score);
  const auto request = make_score_request(plan.policy, plan.shape);
  RESTKV_RETURN_IF_FAILED(check_layer(layer, plan.shape, request.window, needs_window<score_t>(),
                                      needs_values<score_t>(), needs_metric(plan.policy.score)));
  if (details != nullptr) {
    RESTKV_RETURN_IF_FAILED(details->check(plan.shape.batch, plan.heads, layer.key.extent(2)));
  }
  detail::selection_memory<Backend, Policy> memory(backend, plan, space);
  typename Backend::template scratch<score_request_of<Policy>> scratch(backend, request, space);
  RESTKV_RETURN_IF_FAILED(space.check());
  return detail::selection_run<Backend, Policy, T>(backend, plan, layer, request, memory, scratch, details).run(kept);
}

/// A kept set that owns its memory, for callers without a workspace of their own. Movable.
class owned_selection {
 public:
  /// What the last successful `run` chose. Valid until the next, and as long as this object lives.
  [[nodiscard]] const kept_tokens& kept() const noexcept { return kept_; }
  /// The same.
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
