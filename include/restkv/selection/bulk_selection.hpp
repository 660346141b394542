// SPDX-License-Identifier: Apache-2.0
/// @file
/// What `select` does on a bulk backend, step by step. The host looks at shapes, lengths and masks, and enqueues.
#pragma once

#include <restkv/selection/bulk_memory.hpp>
#include <restkv/selection/bulk_pruning.hpp>
#include <restkv/selection/bulk_steps.hpp>
#include <restkv/selection/selection_problem.hpp>

#include <array>
#include <utility>

namespace restkv::detail {

/// Collects values on the stack and uploads them in pieces, in order.
template <class Backend, class T, std::size_t Room>
class uploader {
 public:
  uploader(Backend& backend, T* to) noexcept : backend_(backend), to_(to) {}

  [[nodiscard]] status add(const T& value) {
    values_[count_++] = value;
    return count_ == Room ? flush() : status{};
  }
  [[nodiscard]] status flush() {
    const std::size_t count = std::exchange(count_, 0);
    if (count == 0) return {};
    RESTKV_RETURN_IF_FAILED(backend_.upload(to_, std::span<const T>(values_.data(), count)));
    to_ += count;
    return {};
  }

 private:
  Backend& backend_;
  T* to_;
  std::size_t count_ = 0;
  std::array<T, Room> values_{};
};

/// One selection: the steps of `select`, in the order in which they run, over memory that was carved before.
template <class Backend, class Policy, class T>
class bulk_selection {
 public:
  static constexpr memory_space space = space_of<Backend>();
  using request_t = score_request_of<Policy>;
  using scratch_t = typename Backend::template scratch<request_t>;
  using memory_t = bulk_memory<Backend, plan<Policy>>;
  using details_t = selection_details<float, space>;

  bulk_selection(Backend& backend, const plan<Policy>& plan, const layer_view<T, space>& layer,
                 const request_t& request, memory_t& memory, scratch_t& scratch, const details_t* details) noexcept
      : backend_(backend),
        plan_(plan),
        layer_(layer),
        problem_(plan, layer),
        request_(request),
        memory_(memory),
        scratch_(scratch),
        details_(details) {
    rows_ = {.spans = memory.spans,
             .count = problem_.rows(),
             .rows_per_span = heads_differ() ? 1 : plan.rows,
             .stride = plan.shape.tokens * (plan.heads / plan.rows),
             .unit = plan.policy.granularity.tokens};
  }

  [[nodiscard]] status run(basic_kept_tokens<position_t, space>& kept) {
    RESTKV_RETURN_IF_FAILED(count_candidates());
    bool anything = details_ != nullptr;
    for (index_t b = 0; b < batch(); ++b) anything = anything || !sequence_of(b).keeps_all();
    prunes_ = details_ == nullptr && memory_.pruning.keys != nullptr && (decides_by_pool() || decides_without_keys());
    RESTKV_RETURN_IF_FAILED(upload_spans());
    const bulk_kept out{memory_.positions.data, memory_.lengths.data, plan_.capacity, plan_.heads / plan_.rows};
    if (!anything) {
      const index_t width = std::max<index_t>(1, out.capacity);
      RESTKV_RETURN_IF_FAILED(
          backend_.for_each(rows_.count * out.copies * width, bulk::keep_everything{rows_, out, width}));
    } else {
      RESTKV_RETURN_IF_FAILED(upload_mask());
      RESTKV_RETURN_IF_FAILED(measure_drift());
      RESTKV_RETURN_IF_FAILED(score());
      RESTKV_RETURN_IF_FAILED(backend_.find_pivots(memory_.top_k, keys(), rows_, 1, memory_.counts, memory_.pivots));
      RESTKV_RETURN_IF_FAILED(backend_.write_chosen(memory_.top_k, keys(), rows_, memory_.pivots, out));
    }
    kept = {memory_.positions, memory_.lengths};
    return {};
  }

  /// The host's part of `run`, before anything is enqueued: candidates, and whether the budgets hold what is protected.
  [[nodiscard]] status count_candidates() {
    for (index_t b = 0; b < batch(); ++b) {
      problem_.count_candidates(b, candidates_.data());
      alike_candidates_[static_cast<std::size_t>(b)] = candidates_[0];
      RESTKV_RETURN_IF_FAILED(problem_.check_budget(b, candidates_.data()));
    }
    return {};
  }
  /// The first half of `run` alone, after `count_candidates`, for choices that look beyond the layer: every candidate
  /// is scored and has its key.
  [[nodiscard]] status rank_all() {
    RESTKV_RETURN_IF_FAILED(upload_spans());
    RESTKV_RETURN_IF_FAILED(upload_mask());
    RESTKV_RETURN_IF_FAILED(measure_drift());
    RESTKV_RETURN_IF_FAILED(backend_.token_scores(request_, layer_, scratch_, memory_.score));
    return rank();
  }
  /// The rows, and where their keys lie.
  [[nodiscard]] const bulk_rows& rows() const noexcept { return rows_; }
  /// Order keys of the rows' units, `excluded_key` where a unit is protected.
  [[nodiscard]] std::uint32_t* keys() const noexcept {
    return prunes_ ? memory_.pruning.keys : reinterpret_cast<std::uint32_t*>(memory_.score.data);
  }
  /// See `selection_problem`.
  [[nodiscard]] row_problem<T, space> problem_of(index_t row) const noexcept { return problem_.row(row); }
  /// Units of a row that may be evicted, after `count_candidates`.
  [[nodiscard]] index_t candidates_of(index_t row) const noexcept {
    return heads_differ() ? problem_of(row).count_candidates()
                          : alike_candidates_[static_cast<std::size_t>(row / plan_.rows)];
  }
  /// Units of the layer's longest row.
  [[nodiscard]] index_t longest_row() const noexcept { return (tokens() + rows_.unit - 1) / rows_.unit; }
  /// Room for scores of all heads once the layer is ranked, [batch, heads, tokens].
  [[nodiscard]] const tensor_view<float, 3, space>& score_room() const noexcept { return memory_.smoothed; }

 private:
  [[nodiscard]] index_t batch() const noexcept { return plan_.shape.batch; }
  /// Tokens of the layer's longest row: none has more.
  [[nodiscard]] index_t tokens() const noexcept { return layer_.key.extent(2); }
  [[nodiscard]] bool heads_differ() const noexcept { return layer_.head_lengths.data != nullptr; }
  /// Sequence b and, in `candidates_`, its rows' candidates; valid until the next call. A mask was counted before: it
  /// does not go with heads that differ, whose candidates follow from their lengths.
  [[nodiscard]] sequence_problem sequence_of(index_t b) {
    if (heads_differ()) {
      problem_.count_candidates(b, candidates_.data());
    } else {
      std::fill_n(candidates_.begin(), plan_.rows, alike_candidates_[static_cast<std::size_t>(b)]);
    }
    return problem_.sequence(b, candidates_.data());
  }

  [[nodiscard]] status upload_spans() {
    uploader<Backend, bulk_span, 128> spans(backend_, memory_.spans);
    for (index_t row = 0; row < rows_.count; row += rows_.rows_per_span) {
      const row_problem<T, space> of_row = problem_.row(row);
      RESTKV_RETURN_IF_FAILED(spans.add({.begin = static_cast<position_t>(of_row.span.begin),
                                         .length = static_cast<position_t>(of_row.span.length),
                                         .past = static_cast<position_t>(request_.past_of(of_row.span.length)),
                                         .first = static_cast<position_t>(of_row.first),
                                         .end = static_cast<position_t>(of_row.end),
                                         .candidates = static_cast<position_t>(candidates_of(row))}));
    }
    return spans.flush();
  }

  /// The mask as bits, counted from the beginning of each sequence.
  [[nodiscard]] status upload_mask() {
    if (layer_.keep_mask.data == nullptr) return {};
    const index_t words = mask_words(plan_.shape.tokens);
    uploader<Backend, std::uint32_t, 512> bits(backend_, memory_.mask);
    for (index_t b = 0; b < batch(); ++b) {
      const sequence_span span = sequence(layer_, b, 0);
      for (index_t w = 0; w < words; ++w) {
        std::uint32_t word = 0;
        for (index_t n = w * 32; n < std::min(span.length, (w + 1) * 32); ++n) {
          if (layer_.keep_mask(b, span.begin + n) != 0) word |= std::uint32_t{1} << (n % 32);
        }
        RESTKV_RETURN_IF_FAILED(bits.add(word));
      }
    }
    return bits.flush();
  }

  [[nodiscard]] status measure_drift() {
    if constexpr (needs_drift<decltype(plan_.policy.spatial)>()) {
      if (uses_drift(plan_.policy.spatial)) {
        for (index_t b = 0; b < batch(); ++b) {
          const sequence_problem problem = sequence_of(b);
          const index_t length = shortest_head(layer_, b);
          const index_t budget = std::min(problem.units_per_head * plan_.policy.granularity.tokens, length);
          most_attended_[static_cast<std::size_t>(b)] = std::max<index_t>(0, budget - request_.window_of(length));
        }
        RESTKV_RETURN_IF_FAILED(backend_.window_drift(
            request_, layer_, std::span<const index_t>(most_attended_.data(), static_cast<std::size_t>(batch())),
            scratch_, scratch_.drift()));
        return backend_.for_each(
            rows_.count, bulk::mean_drift{scratch_.drift().data, memory_.drift, plan_.shape.query_heads / plan_.rows});
      }
    }
    return backend_.for_each(rows_.count, bulk::no_drift{memory_.drift});
  }

  /// From the layer to the rows' keys and counts.
  [[nodiscard]] status score() {
    if constexpr (may_prune<Backend, Policy>) {
      if (prunes_) return score_by_bounds();
    }
    RESTKV_RETURN_IF_FAILED(backend_.token_scores(request_, layer_, scratch_, memory_.score));
    RESTKV_RETURN_IF_FAILED(rank());
    return allocate();
  }

  /// The same with scores where they matter and bounds elsewhere: see bulk_pruning.hpp. Rounds: the tokens with the
  /// largest bounds; those that reach the threshold these give; in between, where heads share a pool, those that reach
  /// the pool's.
  [[nodiscard]] status score_by_bounds() {
    auto& memory = memory_.pruning;
    RESTKV_RETURN_IF_FAILED(backend_.score_bounds(request_, layer_, scratch_, memory_.score));
    RESTKV_RETURN_IF_FAILED(rank());
    if (decides_by_pool()) {
      RESTKV_RETURN_IF_FAILED(upload_pooled(true));
      RESTKV_RETURN_IF_FAILED(find_pooled_pivots(keys()));
      RESTKV_RETURN_IF_FAILED(
          backend_.for_each(rows_.count, bulk::want_even_shares{memory_.pooled, plan_.rows, memory.wanted}));
      RESTKV_RETURN_IF_FAILED(find_wanted_pivots(keys()));
      RESTKV_RETURN_IF_FAILED(score_from(memory_.pivots, memory.pooled_pivots, true));
      RESTKV_RETURN_IF_FAILED(upload_pooled(false));
      RESTKV_RETURN_IF_FAILED(settle());
      RESTKV_RETURN_IF_FAILED(find_pooled_pivots(memory.settled));
      RESTKV_RETURN_IF_FAILED(score_from(nullptr, memory.pooled_pivots, false));
      RESTKV_RETURN_IF_FAILED(allocate());
    } else {
      RESTKV_RETURN_IF_FAILED(allocate());
      RESTKV_RETURN_IF_FAILED(
          backend_.for_each(rows_.count, bulk::want_counts{rows_, memory_.counts, memory.wanted, true}));
      RESTKV_RETURN_IF_FAILED(find_wanted_pivots(keys()));
      RESTKV_RETURN_IF_FAILED(score_from(memory_.pivots, nullptr, true));
    }
    RESTKV_RETURN_IF_FAILED(
        backend_.for_each(rows_.count, bulk::want_counts{rows_, memory_.counts, memory.wanted, false}));
    RESTKV_RETURN_IF_FAILED(settle());
    RESTKV_RETURN_IF_FAILED(find_wanted_pivots(memory.settled));
    return score_from(memory_.pivots, nullptr, false);
  }

  [[nodiscard]] status find_wanted_pivots(const std::uint32_t* of) {
    return backend_.find_pivots(memory_.top_k, of, rows_, 1, memory_.pruning.wanted, memory_.pivots);
  }
  [[nodiscard]] status find_pooled_pivots(const std::uint32_t* of) {
    return backend_.find_pivots(memory_.top_k, of, rows_, plan_.rows, memory_.pooled, memory_.pruning.pooled_pivots);
  }
  [[nodiscard]] status settle() {
    using settle_keys = bulk::settle_keys<decltype(plan_.policy.spatial)>;
    const auto& memory = memory_.pruning;
    return backend_.for_each(rows_.count * tokens(), settle_keys{plan_.policy.spatial, memory.keys, memory.states.data,
                                                                 memory.settled, memory_.drift, rows_, tokens()});
  }
  /// Scores what the keys from the pivots on depend on, and ranks again.
  [[nodiscard]] status score_from(const top_k_pivot<std::uint32_t>* pivots,
                                  const top_k_pivot<std::uint32_t>* pooled_pivots, bool first) {
    using mark_wanted = bulk::mark_wanted<decltype(plan_.policy.spatial)>;
    const auto& memory = memory_.pruning;
    RESTKV_RETURN_IF_FAILED(backend_.for_each(
        rows_.count * tokens(), mark_wanted{plan_.policy.spatial, memory.keys, memory.states.data, memory_.drift, rows_,
                                            tokens(), pivots, pooled_pivots, plan_.rows, first}));
    RESTKV_RETURN_IF_FAILED(backend_.exact_scores(request_, layer_, scratch_, memory.states, memory_.score));
    return rank();
  }

  [[nodiscard]] status rank() {
    const index_t copies = plan_.heads / plan_.rows;
    if (plan_.policy.granularity.shared) {
      RESTKV_RETURN_IF_FAILED(backend_.for_each(
          batch() * tokens(),
          bulk::share_heads{memory_.score.data, rows_, request_.group, plan_.heads, tokens(), plan_.shape.tokens}));
    }
    using smooth = bulk::smooth_rows<decltype(plan_.policy.spatial)>;
    RESTKV_RETURN_IF_FAILED(backend_.for_each(
        rows_.count * tokens(), smooth{plan_.policy.spatial, memory_.score.data, memory_.smoothed.data, memory_.drift,
                                       rows_, plan_.rows, tokens()}));
    if (details_ != nullptr) {
      RESTKV_RETURN_IF_FAILED(backend_.for_each(
          rows_.count * copies * tokens(),
          bulk::describe_scores<space>{memory_.score.data, memory_.smoothed.data, memory_.drift, rows_, copies,
                                       plan_.heads, tokens(), details_->score, details_->smoothed, details_->drift}));
    }
    const index_t units = longest_row();
    const std::uint32_t* const mask = layer_.keep_mask.data == nullptr ? nullptr : memory_.mask;
    return backend_.for_each(rows_.count * units,
                             bulk::make_keys{plan_.policy.granularity, memory_.smoothed.data, keys(), mask, rows_,
                                             plan_.rows, mask_words(plan_.shape.tokens), units});
  }

  /// How many units each row chooses: known to the host where no key decides.
  [[nodiscard]] status allocate() {
    const auto& budget = plan_.policy.budget;
    using budget_t = std::remove_cvref_t<decltype(budget)>;
    const index_t* const candidates = heads_differ() ? memory_.candidates : nullptr;
    if (candidates != nullptr) {
      RESTKV_RETURN_IF_FAILED(backend_.for_each(rows_.count, bulk::list_candidates{rows_, memory_.candidates}));
    }
    const bulk::sequence_budget problem_of{rows_, plan_.rows, candidates, plan_.shape.layer, plan_.shape.layers};
    if constexpr (pooled_budget_allocator<budget_t>) {
      if (budget.pools()) {
        RESTKV_RETURN_IF_FAILED(upload_pooled(false));
        RESTKV_RETURN_IF_FAILED(
            backend_.find_pivots(memory_.top_k, keys(), rows_, plan_.rows, memory_.pooled, memory_.pivots));
        RESTKV_RETURN_IF_FAILED(
            backend_.count_chosen(memory_.top_k, keys(), rows_, plan_.rows, memory_.pivots, memory_.counts));
        return backend_.for_each(batch(),
                                 bulk::share_pools<budget_t>{budget, problem_of, memory_.counts, memory_.shares});
      }
    }
    if (!decides_without_keys()) {
      if constexpr (space == memory_space::host) {
        return backend_.for_each(
            batch(), bulk::allocate_by_keys<budget_t>{budget, problem_of, keys(), memory_.counts, memory_.shares});
      }
    }
    uploader<Backend, index_t, 128> counts(backend_, memory_.counts);
    std::array<index_t, static_cast<std::size_t>(most_bulk_rows)> of_heads;
    std::array<double, static_cast<std::size_t>(most_bulk_rows)> shares;
    const auto heads = static_cast<std::size_t>(plan_.rows);
    for (index_t b = 0; b < batch(); ++b) {
      const sequence_problem problem = sequence_of(b);
      if (problem.keeps_all()) {
        std::copy_n(candidates_.begin(), heads, of_heads.begin());
      } else {
        budget.allocate(problem.budget, tensor_view<const std::uint32_t, 2>(), std::span(of_heads).first(heads),
                        std::span(shares).first(heads));
      }
      for (std::size_t h = 0; h < heads; ++h) RESTKV_RETURN_IF_FAILED(counts.add(of_heads[h]));
    }
    return counts.flush();
  }

  /// How many keys each sequence's heads compete for; `first`: as many as the first round of pruning scores. None where
  /// all are kept.
  [[nodiscard]] status upload_pooled(bool first) {
    if constexpr (pooled_budget_allocator<decltype(plan_.policy.budget)>) {
      uploader<Backend, index_t, 128> pooled(backend_, memory_.pooled);
      for (index_t b = 0; b < batch(); ++b) {
        const sequence_problem problem = sequence_of(b);
        const index_t count = problem.keeps_all() ? 0 : plan_.policy.budget.pooled_keys(problem.budget);
        RESTKV_RETURN_IF_FAILED(
            pooled.add(first && count > 0 ? pruning_row<std::uint32_t>::first_round(count) : count));
      }
      return pooled.flush();
    }
    return {};
  }

  /// True where the heads of a sequence compete in one pool.
  [[nodiscard]] bool decides_by_pool() const noexcept {
    if constexpr (pooled_budget_allocator<decltype(plan_.policy.budget)>) return plan_.policy.budget.pools();
    return false;
  }

  /// True where the allocator looks at no key, for any sequence of the layer.
  [[nodiscard]] bool decides_without_keys() {
    if constexpr (ranking_budget_allocator<decltype(plan_.policy.budget)>) {
      for (index_t b = 0; b < batch(); ++b) {
        if (plan_.policy.budget.deciding_keys(sequence_of(b).budget) != 0) return false;
      }
      return true;
    }
    return false;
  }

  Backend& backend_;
  const plan<Policy>& plan_;
  const layer_view<T, space>& layer_;
  selection_problem<Policy, T, space> problem_;
  const request_t& request_;
  memory_t& memory_;
  scratch_t& scratch_;
  const details_t* details_;
  bulk_rows rows_;
  bool prunes_ = false;
  using row_numbers = std::array<index_t, static_cast<std::size_t>(most_bulk_rows)>;
  row_numbers candidates_{};        // of the sequence looked at last, [rows]
  row_numbers alike_candidates_{};  // of each row of a sequence, [batch]; where heads do not differ
  row_numbers most_attended_{};     // [batch]
};

}  // namespace restkv::detail
