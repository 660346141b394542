// SPDX-License-Identifier: Apache-2.0
/// @file
/// What `select` does, step by step.
#pragma once

#include <restkv/plan.hpp>
#include <restkv/selection/pruning.hpp>
#include <restkv/selection/selection_problem.hpp>
#include <restkv/selection/top_k.hpp>

#include <atomic>
#include <memory>

namespace restkv {

namespace detail {

/// One selection: the steps of `select`, in the order in which they run, over memory that was carved before.
template <class Backend, class Policy, class T>
class selection_run {
  using real = typename Backend::score_type;
  using key_t = order_key_t<real>;
  using request_t = score_request_of<Policy>;
  using scratch_t = typename Backend::template scratch<request_t>;
  using rescoring_t = decltype(Policy::rescoring);

 public:
  selection_run(Backend& backend, const plan<Policy>& plan, const layer_view<T>& layer, const request_t& request,
                selection_memory<Backend, Policy>& memory, scratch_t& scratch,
                const selection_details<real>* details) noexcept
      : backend_(backend), plan_(plan), layer_(layer), problem_(plan, layer), request_(request), memory_(memory),
        scratch_(scratch), details_(details) {}

  /// `weigh()` fills the rescorer's weights.
  template <class Weigh>
  [[nodiscard]] status run(const Weigh& weigh, kept_tokens& kept) {
    count_candidates();
    RESTKV_RETURN_IF_FAILED(check_budgets());
    if (details_ != nullptr || anything_to_choose()) {
      RESTKV_RETURN_IF_FAILED(weigh());
      RESTKV_RETURN_IF_FAILED(measure_drift());
      const bool pruned = details_ == nullptr && may_prune_now();
      if constexpr (may_prune<Backend, Policy>) {
        if (pruned) RESTKV_RETURN_IF_FAILED(backend_.score_bounds(request_, layer_, scratch_, memory_.score));
      }
      if (!pruned) RESTKV_RETURN_IF_FAILED(backend_.token_scores(request_, layer_, scratch_, memory_.score));
      RESTKV_RETURN_IF_FAILED(share());
      rank(rescores<rescoring_t> && !rescores_after_budget<rescoring_t>());
      allocate();
      if constexpr (rescores<rescoring_t> && rescores_after_budget<rescoring_t>()) rank(true);
      if constexpr (may_prune<Backend, Policy>) {
        while (pruned && want_tokens() > 0) {
          RESTKV_RETURN_IF_FAILED(backend_.exact_scores(request_, layer_, scratch_, memory_.states, memory_.score));
          rank(false);
          allocate();
        }
      }
    } else {
      // Whatever the scores: every candidate is kept.
      backend_.parallel_for(rows(), [this](index_t row) { make_keys(row, [](index_t) { return key_t{1}; }); });
      allocate();
    }
    return choose(memory_.counts, kept);
  }

  /// The first half of `run` alone, for choices that look beyond the layer or try many sizes: every candidate is scored
  /// and ranked. A rescorer that wants the heads' budgets gets those of the policy's own.
  template <class Weigh>
  [[nodiscard]] status rank_all(const Weigh& weigh) {
    count_candidates();
    RESTKV_RETURN_IF_FAILED(check_budgets());
    RESTKV_RETURN_IF_FAILED(weigh());
    RESTKV_RETURN_IF_FAILED(measure_drift());
    RESTKV_RETURN_IF_FAILED(backend_.token_scores(request_, layer_, scratch_, memory_.score));
    RESTKV_RETURN_IF_FAILED(share());
    rank(rescores<rescoring_t> && !rescores_after_budget<rescoring_t>());
    if constexpr (rescores<rescoring_t> && rescores_after_budget<rescoring_t>()) {
      allocate();
      rank(true);
    }
    return {};
  }

  /// The second half: the `counts` best units of each row [batch * rows] and the protected ones, ascending.
  [[nodiscard]] status choose(const index_t* counts, kept_tokens& kept) {
    RESTKV_RETURN_IF_FAILED(check_counts(counts));
    choose_units(counts);
    kept = {memory_.positions, memory_.lengths};
    return {};
  }

  /// Rows of all sequences.
  [[nodiscard]] index_t rows() const noexcept { return problem_.rows(); }
  /// See `selection_problem`.
  [[nodiscard]] row_problem<T> problem_of(index_t row) const noexcept { return problem_.row(row); }
  /// The order keys of a row that was ranked, one for each of its units; `excluded_key` where a unit is protected.
  [[nodiscard]] std::span<const key_t> keys_of(index_t row) const noexcept {
    return {key_row(row), static_cast<std::size_t>(problem_of(row).units())};
  }
  /// Units of a row that may be evicted.
  [[nodiscard]] index_t candidates_of(index_t row) const noexcept { return memory_.candidates[row]; }
  /// Room for scores of all heads before the layer is ranked, [batch, heads, tokens].
  [[nodiscard]] tensor_view<real, 3> score_room() const noexcept { return memory_.score; }

 private:
  [[nodiscard]] index_t batch() const noexcept { return plan_.shape.batch; }
  /// Rows that the backend fills: those of all heads, whether they share a kept set or not.
  [[nodiscard]] index_t head_row(index_t row) const noexcept {
    return row / plan_.rows * plan_.heads + row % plan_.rows;
  }
  [[nodiscard]] sequence_problem sequence_of(index_t b) const noexcept {
    return problem_.sequence(b, memory_.candidates + b * plan_.rows);
  }

  [[nodiscard]] real* score_row(index_t row) const noexcept {
    return memory_.score.data + head_row(row) * plan_.shape.tokens;
  }
  [[nodiscard]] real* smoothed_row(index_t row) const noexcept {
    return memory_.smoothed.data + head_row(row) * plan_.shape.tokens;
  }
  /// A row's order keys lie where its smoothed scores lay: `make_keys` turns one into the other.
  [[nodiscard]] key_t* key_row(index_t row) const noexcept { return reinterpret_cast<key_t*>(smoothed_row(row)); }
  [[nodiscard]] row_context context_of(index_t row) const noexcept {
    return {.drift = memory_.drift.data[head_row(row)], .sequence = row / plan_.rows};
  }

  void count_candidates() const noexcept {
    for (index_t b = 0; b < batch(); ++b) problem_.count_candidates(b, memory_.candidates + b * plan_.rows);
  }

  [[nodiscard]] status check_budgets() const noexcept {
    for (index_t b = 0; b < batch(); ++b) {
      RESTKV_RETURN_IF_FAILED(problem_.check_budget(b, memory_.candidates + b * plan_.rows));
    }
    return {};
  }

  [[nodiscard]] bool anything_to_choose() const {
    for (index_t b = 0; b < batch(); ++b) {
      if (!sequence_of(b).keeps_all()) return true;
    }
    return false;
  }

  [[nodiscard]] status measure_drift() const {
    std::fill_n(memory_.drift.data, batch() * plan_.heads, 0.0);
    if constexpr (needs_drift<decltype(plan_.policy.spatial)>()) {
      if (!uses_drift(plan_.policy.spatial)) return {};
      for (index_t b = 0; b < batch(); ++b) {
        const sequence_problem problem = sequence_of(b);
        const index_t length = shortest_head(layer_, b);
        const index_t budget = std::min(problem.units_per_head * plan_.policy.granularity.tokens, length);
        memory_.counts[b] = std::max<index_t>(0, budget - request_.window_of(length));
      }
      RESTKV_RETURN_IF_FAILED(backend_.window_drift(
          request_, layer_, std::span<const index_t>(memory_.counts, static_cast<std::size_t>(batch())), scratch_,
          scratch_.drift()));
      const index_t group = plan_.shape.query_heads / plan_.rows;
      for (index_t b = 0; b < batch(); ++b) {
        for (index_t h = 0; h < plan_.rows; ++h) {
          double& drift = memory_.drift(b, h);
          const auto add_heads = [&](bool) {
            for (index_t j = 0; j < group; ++j) drift += scratch_.drift()(b, h * group + j);
          };
          if (plan_.policy.granularity.shared) {
            RESTKV_RETURN_IF_FAILED(fold_heads(backend_, std::span(&drift, 1), add_heads));
            drift /= static_cast<double>(heads_of_layer(backend_, group));
          } else {
            add_heads(true);
            drift /= static_cast<double>(group);
          }
        }
      }
    }
    return {};
  }

  /// Not when a smoother's reach is too wide to be certain of, nor when an allocator looks at every key, nor where a
  /// key is that of several tokens or heads.
  [[nodiscard]] bool may_prune_now() const noexcept {
    if constexpr (may_prune<Backend, Policy>) {
      const granularity& unit = plan_.policy.granularity;
      if (memory_.states.data == nullptr || unit.tokens > 1 || unit.shared) return false;
      if (layer_.head_lengths.data != nullptr) return false;  // rows of different lengths
      for (index_t b = 0; b < batch(); ++b) {
        const sequence_problem problem = sequence_of(b);
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

  /// Reduces the rows of all heads to the first, where heads share a kept set; a rescorer's weights and attention to
  /// their means.
  [[nodiscard]] status share() const {
    if (!plan_.policy.granularity.shared) return {};
    if constexpr (head_sharing_backend<Backend>) {  // which speaks to others: one sequence after the other
      for (index_t b = 0; b < batch(); ++b) RESTKV_RETURN_IF_FAILED(share_sequence(b));
    } else {
      backend_.parallel_for(batch(), [this](index_t b) { static_cast<void>(share_sequence(b)); });
    }
    return {};
  }

  /// Folds in the row of smoothed scores, which are yet to come.
  [[nodiscard]] status share_sequence(index_t b) const {
    const index_t past = request_.past_of(sequence(layer_, b, 0).length);
    const std::span<real> folded(smoothed_row(b), static_cast<std::size_t>(past));
    std::uninitialized_default_construct(folded.begin(), folded.end());
    const auto reduce = [&](group_reduce how, real* rows) -> status {
      RESTKV_RETURN_IF_FAILED(fold_heads(backend_, folded, [&](bool first) {
        for (index_t n = 0; n < past; ++n) {
          real& sum = folded[static_cast<std::size_t>(n)];
          for (index_t h = 0; h < plan_.heads; ++h) {
            sum = group_fold(how, sum, rows[h * plan_.shape.tokens + n], first && h == 0);
          }
        }
      }));
      const index_t heads = heads_of_layer(backend_, plan_.heads);
      std::transform(folded.begin(), folded.end(), rows,
                     [&](real sum) { return group_finish(how, sum, heads); });
      return {};
    };
    RESTKV_RETURN_IF_FAILED(reduce(request_.group, score_row(b)));
    for (const tensor_view<real, 3>* rows : {&memory_.weights, &memory_.attention}) {
      if (rows->data != nullptr) RESTKV_RETURN_IF_FAILED(reduce(group_reduce::mean, (*rows)[b].data));
    }
    return {};
  }

  /// Smooths each row, rescores it where asked, and replaces the result by its order keys.
  void rank(bool rescore) const {
    backend_.parallel_for(rows(), [&](index_t row) {
      const row_problem<T> problem = problem_of(row);
      const auto past = static_cast<std::size_t>(request_.past_of(problem.span.length));
      const real* const scores = score_row(row);
      real* const smoothed = smoothed_row(row);
      std::uninitialized_default_construct_n(smoothed, past);  // where keys were: no instruction
      plan_.policy.spatial(std::span<const real>(scores, past), std::span<real>(smoothed, past), context_of(row));
      if constexpr (rescores<rescoring_t>) {
        if (rescore) rescore_row(row, std::span<real>(smoothed, past));
      }
      if (details_ != nullptr) describe(problem, scores, smoothed, past);
      make_keys(row, [&](index_t u) {
        if (problem.unit == 1) return order_key(smoothed[u]);
        const auto tokens = static_cast<std::size_t>(problem.unit);
        return order_key(plan_.policy.granularity(std::span<const real>(smoothed + u * problem.unit, tokens)));
      });
    });
  }

  void rescore_row(index_t row, std::span<real> scores) const noexcept {
    const sequence_problem sequence = sequence_of(row / plan_.rows);
    const index_t unit = plan_.policy.granularity.tokens;
    const index_t heads = plan_.shape.query_heads / plan_.rows;
    const row_problem<T> problem = problem_of(row);
    const auto row_of = [&](const tensor_view<real, 3>& rows, index_t tokens) {
      if (rows.data == nullptr) return std::span<const real>();
      return std::span<const real>(rows.data + head_row(row) * plan_.shape.tokens, static_cast<std::size_t>(tokens));
    };
    const index_t before_window = std::max<index_t>(0, problem.span.length - plan_.policy.window);
    rescoring_context<real> context{
        .weights = row_of(memory_.weights, static_cast<index_t>(scores.size())),
        .attention = row_of(memory_.attention, before_window),
        .keep = unit * (rescores_after_budget<rescoring_t>()
                            ? memory_.counts[row]
                            : chosen_per_head(plan_.policy.budget, sequence.budget)),
        .heads = heads,
        .protected_tokens = problem.span.length - memory_.candidates[row] * unit,
        .first = problem.first * unit,
        .end = problem.end * unit};
    if (layer_.keep_mask.data != nullptr) {
      context.mask = layer_.keep_mask[problem.batch].slice(0, problem.span.begin, problem.span.length);
    }
    const index_t elements = scratch_size_of(plan_.policy.rescoring, plan_.shape);
    const head_view<T> head(layer_, plan_.shape, row / plan_.rows, row % plan_.rows * heads);
    plan_.policy.rescoring.rescore(
        head, context, scores,
        std::span<real>(memory_.rescoring + row * elements, static_cast<std::size_t>(elements)));
  }

  void describe(const row_problem<T>& problem, const real* scores, const real* smoothed, std::size_t past) const noexcept {
    const index_t copies = plan_.heads / plan_.rows;
    for (index_t h = problem.head * copies; h < (problem.head + 1) * copies; ++h) {
      for (std::size_t n = 0; n < past; ++n) {
        details_->score(problem.batch, h, n) = scores[n];
        details_->smoothed(problem.batch, h, n) = smoothed[n];
      }
      details_->drift(problem.batch, h) = memory_.drift(problem.batch, problem.head);
    }
  }

  /// Key u is written where the score of token u lay, after those of unit u, none of which comes before it, were read.
  template <class KeyOf>
  void make_keys(index_t row, const KeyOf& key_of) const noexcept {
    const row_problem<T> problem = problem_of(row);
    key_t* const keys = key_row(row);
    for (index_t u = 0; u < problem.units(); ++u) {
      std::construct_at(keys + u, problem.may_evict(u) ? key_of(u) : key_t{excluded_key});
    }
  }

  /// Budgets, one sequence after the other: heads may compete.
  void allocate() const noexcept {
    const auto heads = static_cast<std::size_t>(plan_.rows);
    for (index_t b = 0; b < batch(); ++b) {
      const sequence_problem problem = sequence_of(b);
      const std::span<index_t> counts(memory_.counts + b * plan_.rows, heads);
      if (problem.keeps_all()) {
        std::copy_n(memory_.candidates + b * plan_.rows, plan_.rows, counts.begin());
        continue;
      }
      // Heads with fewer tokens than the longest: the rest of their rows is no candidate.
      for (index_t h = 0; h < plan_.rows && layer_.head_lengths.data != nullptr; ++h) {
        key_t* const keys = key_row(b * plan_.rows + h);
        for (index_t u = problem_of(b * plan_.rows + h).units(); u < problem.budget.length; ++u) {
          std::construct_at(keys + u, key_t{excluded_key});
        }
      }
      const tensor_view<const key_t, 2> keys(key_row(b * plan_.rows), {plan_.rows, problem.budget.length},
                                             {plan_.shape.tokens, 1});
      plan_.policy.budget.allocate(problem.budget, keys, counts,
                                   std::span<double>(memory_.shares + b * plan_.rows, heads));
    }
  }

  /// One round of certified pruning: marks the tokens that must be scored next, and returns how many; 0 when the choice
  /// by `counts` is certain.
  [[nodiscard]] index_t want_tokens() const {
    const index_t heads = plan_.heads;
    backend_.parallel_for(rows(), [this](index_t row) {
      const index_t length = problem_of(row).span.length;
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
      const sequence_problem problem = sequence_of(b);
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

  /// See `choose`.
  void choose_units(const index_t* counts) const {
    backend_.parallel_for(rows(), [&](index_t row) {
      const row_problem<T> problem = problem_of(row);
      const index_t count = counts[row];
      const key_t* const keys = key_row(row);
      position_t* const positions = memory_.positions.data + head_row(row) * plan_.capacity;
      const auto pivot = find_pivot<key_t>(
          1, problem.units(), [keys](index_t, index_t u) { return keys[u]; }, count);
      index_t equal_left = pivot.equal;
      index_t written = 0;
      for (index_t u = 0; u < problem.units(); ++u) {
        const key_t key = keys[u];
        const bool chosen = key == excluded_key || key > pivot.key || (key == pivot.key && equal_left-- > 0);
        for (index_t n = u * problem.unit; chosen && n < problem.end_of(u); ++n) {
          positions[written++] = static_cast<position_t>(problem.span.begin + n);
        }
      }
      const index_t copies = plan_.heads / plan_.rows;
      for (index_t h = 0; h < copies; ++h) {
        memory_.lengths.data[head_row(row) + h] = static_cast<position_t>(written);
        if (h > 0) std::copy_n(positions, written, positions + h * plan_.capacity);
      }
    });
  }

  /// Fails where an allocator breaks its promises: what it gave may pass the end of a row.
  [[nodiscard]] status check_counts(const index_t* counts) const {
    for (index_t row = 0; row < rows(); ++row) {
      const row_problem<T> problem = problem_of(row);
      const index_t candidates = memory_.candidates[row];
      const index_t fixed = problem.span.length - candidates * problem.unit;
      const index_t most = std::min(candidates, (plan_.capacity - fixed) / problem.unit);
      const index_t count = counts[row];
      if (count >= 0 && count <= most) continue;
      return status::error(errc::invalid_argument,
                           "the budget allocator gave head %lld of sequence %lld %lld tokens to choose, at most %lld "
                           "are left",
                           static_cast<long long>(problem.head), static_cast<long long>(problem.batch),
                           static_cast<long long>(count), static_cast<long long>(most));
    }
    return {};
  }

  Backend& backend_;
  const plan<Policy>& plan_;
  const layer_view<T>& layer_;
  selection_problem<Policy, T> problem_;
  const request_t& request_;
  selection_memory<Backend, Policy>& memory_;
  scratch_t& scratch_;
  const selection_details<real>* details_;
};

}  // namespace detail

}  // namespace restkv
