// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a selection knows before it sees a score: where each row's tokens lie, which may be evicted, and what the budget
/// holds. All of it follows from shapes, lengths and masks, which the host can read wherever keys and values lie.
#pragma once

#include <restkv/plan.hpp>

#include <algorithm>

namespace restkv::detail {

/// One row of scores: where its tokens lie, and which of them may be evicted. Tokens are counted from the beginning of the
/// sequence; units hold `unit` of them.
template <class T, memory_space Space = memory_space::host>
struct row_problem {
  const layer_view<T, Space>* layer = nullptr;
  index_t batch = 0;
  index_t head = 0;  ///< of the plan's rows
  sequence_span span{};
  index_t unit = 1;
  index_t first = 0;  ///< first unit without a sink
  index_t end = 0;    ///< first unit behind it with a recent token, or that is not full

  [[nodiscard]] index_t units() const noexcept { return (span.length + unit - 1) / unit; }
  [[nodiscard]] index_t end_of(index_t u) const noexcept { return std::min(span.length, (u + 1) * unit); }
  [[nodiscard]] bool may_evict(index_t u) const noexcept {
    if (u < first || u >= end) return false;
    if (layer->keep_mask.data == nullptr) return true;
    for (index_t n = u * unit; n < end_of(u); ++n) {
      if (layer->keep_mask(batch, span.begin + n) != 0) return false;
    }
    return true;
  }
  [[nodiscard]] index_t count_candidates() const noexcept {
    if (layer->keep_mask.data == nullptr) return std::max<index_t>(0, end - first);
    index_t candidates = 0;
    for (index_t u = first; u < end; ++u) candidates += may_evict(u) ? 1 : 0;
    return candidates;
  }
};

/// A sequence as an allocator sees it.
struct sequence_problem {
  budget_problem budget{};
  index_t units_per_head = 0;  ///< the budget, protected units included
  [[nodiscard]] bool keeps_all() const noexcept { return budget.length <= units_per_head; }
};

/// The rows and sequences of one selection. Candidates are counted once by the caller, who has the memory:
/// `candidates` points at plan.rows of them, those of sequence b.
template <class Policy, class T, memory_space Space = memory_space::host>
class selection_problem {
 public:
  /// Refers to both.
  selection_problem(const plan<Policy>& plan, const layer_view<T, Space>& layer) noexcept : plan_(plan), layer_(layer) {}

  /// Rows of all sequences.
  [[nodiscard]] index_t rows() const noexcept { return plan_.shape.batch * plan_.rows; }
  /// Where a row's tokens lie; row b * plan.rows + h is that of head h of sequence b.
  [[nodiscard]] row_problem<T, Space> row(index_t row) const noexcept {
    row_problem<T, Space> problem;
    problem.layer = &layer_;
    problem.batch = row / plan_.rows;
    problem.head = row % plan_.rows;
    problem.span = restkv::sequence(layer_, problem.batch, kv_head_of(problem.head));
    problem.unit = plan_.policy.granularity.tokens;
    const budget_problem units = budget_of_span(plan_.policy, plan_.shape, plan_.rows, problem.span.length);
    problem.end = std::max<index_t>(0, problem.span.length - plan_.policy.recent()) / problem.unit;
    problem.first = problem.end - units.candidates;
    return problem;
  }

  /// Fills candidates[0 .. plan.rows).
  void count_candidates(index_t b, index_t* candidates) const noexcept {
    const bool alike = layer_.head_lengths.data == nullptr;  // then the mask is looked at once
    for (index_t h = 0; h < plan_.rows; ++h) {
      candidates[h] = alike && h > 0 ? candidates[0] : row(b * plan_.rows + h).count_candidates();
    }
  }

  /// A sequence as its allocator sees it; refers to `candidates`.
  [[nodiscard]] sequence_problem sequence(index_t b, const index_t* candidates) const noexcept {
    sequence_problem problem;
    index_t longest = 0;
    index_t longest_row = 0;
    for (index_t h = 0; h < plan_.rows; ++h) {
      const index_t length = restkv::sequence(layer_, b, kv_head_of(h)).length;
      if (length > longest) longest_row = h;
      longest = std::max(longest, length);
    }
    problem.budget = budget_of_span(plan_.policy, plan_.shape, plan_.rows, longest);
    problem.budget.candidates = candidates[longest_row];
    if (layer_.head_lengths.data != nullptr) {
      problem.budget.head_candidates = {candidates, static_cast<std::size_t>(plan_.rows)};
    }
    problem.units_per_head = plan_.policy.budget.tokens_per_head(problem.budget);
    return problem;
  }

  /// Fails where a sequence protects more tokens than its budget or the plan's capacity holds, and where heads that are
  /// to share a kept set have different tokens.
  [[nodiscard]] status check_budget(index_t b, const index_t* candidates) const noexcept {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    const sequence_problem problem = sequence(b, candidates);
    RESTKV_RETURN_IF_FAILED(check_problem(plan_.policy.budget, problem.budget));
    const index_t kept = problem.budget.protected_tokens();
    const index_t budget = std::min(problem.units_per_head, problem.budget.length);
    const index_t fixed =
        budget_of_span(plan_.policy, plan_.shape, plan_.rows, restkv::sequence(layer_, b, kv_head_of(0)).length)
            .protected_tokens();
    if (budget < kept && kept > fixed) {
      return status::error(errc::invalid_argument,
                           "sequence %lld: the budget is %lld %s per head, the mask and window protect %lld", ll(b),
                           ll(budget), plan_.policy.granularity.tokens == 1 ? "tokens" : "chunks or pages", ll(kept));
    }
    for (index_t h = 0; h < plan_.rows; ++h) {
      const row_problem<T, Space> of_head = row(b * plan_.rows + h);
      const index_t tokens = of_head.span.length - candidates[h] * of_head.unit;
      if (tokens > plan_.capacity) {
        return status::error(errc::invalid_argument, "sequence %lld protects %lld tokens, the plan's heads keep %lld",
                             ll(b), ll(tokens), ll(plan_.capacity));
      }
    }
    if (!plan_.policy.granularity.shared) return {};
    for (index_t h = 1; h < layer_.head_lengths.extent(1); ++h) {
      if (layer_.head_lengths(b, h) == layer_.head_lengths(b, 0)) continue;
      return status::error(errc::invalid_argument,
                           "sequence %lld: head 0 has %lld tokens, head %lld has %lld: heads that share a kept set "
                           "must have the same",
                           ll(b), ll(layer_.head_lengths(b, 0)), ll(h), ll(layer_.head_lengths(b, h)));
    }
    return {};
  }

 private:
  [[nodiscard]] index_t kv_head_of(index_t head) const noexcept {
    return head * plan_.shape.kv_heads / plan_.heads;
  }

  const plan<Policy>& plan_;
  const layer_view<T, Space>& layer_;
};

}  // namespace restkv::detail
