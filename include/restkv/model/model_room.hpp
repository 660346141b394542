// SPDX-License-Identifier: Apache-2.0
/// @file
/// How much the layers of a model may keep: what lengths, masks and the budget say before a score is known.
#pragma once

#include <restkv/model/model_budget.hpp>
#include <restkv/plan.hpp>

#include <algorithm>

namespace restkv::detail {

/// Counts the units of every sequence while layers come in. A run is a selection whose candidates are counted: it has
/// problem_of(row) and candidates_of(row) for the rows b * plan.layer.rows + r.
template <class ModelPlan>
class model_room {
 public:
  /// Refers to the plan; of numbers, it has [batch] of each.
  model_room(const ModelPlan& plan, index_t* totals, index_t* reserved, index_t* held) noexcept
      : plan_(plan), totals_(totals), reserved_(reserved), held_(held) {}

  /// Forgets all layers.
  void forget() const noexcept {
    for (index_t b = 0; b < plan_.layer.shape.batch; ++b) totals_[b] = reserved_[b] = held_[b] = 0;
  }

  /// Fails on a layer too many.
  [[nodiscard]] status check_layer(index_t layer) const noexcept {
    if (layer < plan_.layer.shape.layers) return {};
    return status::error(errc::invalid_argument, "layer %lld of a model of %lld layers", static_cast<long long>(layer),
                         static_cast<long long>(plan_.layer.shape.layers));
  }

  /// Fails where a layer holds more for good than its part of the budget.
  template <class Run>
  [[nodiscard]] status check(const Run& run, index_t layer) const noexcept {
    for (index_t b = 0; b < plan_.layer.shape.batch; ++b) {
      const index_t held = held_of_layer(run, b);
      const index_t whole = (layer == 0 ? total_of(run, b) : totals_[b]) / plan_.layer.shape.layers;
      if (held <= whole) continue;
      return status::error(
          errc::invalid_argument,
          "sequence %lld of layer %lld holds %lld %s whatever their score, the budget of a layer is %lld",
          static_cast<long long>(b), static_cast<long long>(layer), static_cast<long long>(held),
          unit() == 1 ? "tokens" : "chunks or pages", static_cast<long long>(whole));
    }
    return {};
  }

  /// Takes in sequence b of a layer. Returns how many candidates of all layers so far are kept. What all layers hold
  /// for good, those to come as the first, is not to be chosen.
  template <class Run>
  [[nodiscard]] index_t enter(const Run& run, index_t b, index_t layer) const noexcept {
    const index_t held = held_of_layer(run, b);
    if (layer == 0) {
      totals_[b] = total_of(run, b);
      reserved_[b] = held;
    }
    held_[b] += held;
    const index_t to_come = (plan_.layer.shape.layers - 1 - layer) * reserved_[b];
    return std::max<index_t>(0, totals_[b] - held_[b] - to_come);
  }

  /// Units of the layers so far that are held for good.
  [[nodiscard]] index_t held(index_t b) const noexcept { return held_[b]; }

 private:
  [[nodiscard]] index_t rows() const noexcept { return plan_.layer.rows; }
  [[nodiscard]] index_t unit() const noexcept { return plan_.layer.policy.granularity.tokens; }

  /// A sequence of the layer as a budget sees it.
  template <class Run>
  [[nodiscard]] budget_problem problem_of(const Run& run, index_t b) const noexcept {
    index_t longest = 0;
    index_t candidates = 0;
    for (index_t r = 0; r < rows(); ++r) {
      const index_t units = run.problem_of(b * rows() + r).units();
      if (units >= longest) candidates = run.candidates_of(b * rows() + r);
      longest = std::max(longest, units);
    }
    return {.heads = rows(),
            .length = longest,
            .candidates = candidates,
            .layer = plan_.layer.shape.layer,
            .layers = plan_.layer.shape.layers,
            .unit = unit()};
  }
  [[nodiscard]] index_t least_of(index_t candidates) const noexcept {
    return std::min<index_t>(plan_.budget.least, candidates);
  }
  /// The budget of a head, where it is not less than what the policy protects of a sequence of this length.
  [[nodiscard]] index_t per_head(const budget_problem& problem, index_t tokens) const noexcept {
    const budget_problem unmasked = budget_of_span(plan_.layer.policy, plan_.layer.shape, rows(), tokens);
    return std::max(budget_size(plan_.budget.budget).of(problem),
                    unmasked.protected_tokens() + least_of(unmasked.candidates));
  }
  /// Units of sequence b of a layer that are kept whatever their score.
  template <class Run>
  [[nodiscard]] index_t held_of_layer(const Run& run, index_t b) const noexcept {
    index_t held = 0;
    for (index_t row = b * rows(); row < (b + 1) * rows(); ++row) {
      const index_t candidates = run.candidates_of(row);
      held += run.problem_of(row).units() - candidates + least_of(candidates);
    }
    return held;
  }
  /// Units that all layers of sequence b keep, by the one at hand.
  template <class Run>
  [[nodiscard]] index_t total_of(const Run& run, index_t b) const noexcept {
    index_t tokens = 0;
    for (index_t r = 0; r < rows(); ++r) tokens = std::max(tokens, run.problem_of(b * rows() + r).span.length);
    return plan_.layer.shape.layers * rows() * per_head(problem_of(run, b), tokens);
  }

  const ModelPlan& plan_;
  index_t* totals_;    // units that the model keeps
  index_t* reserved_;  // units that a layer to come will hold for good
  index_t* held_;      // units held for good so far
};

}  // namespace restkv::detail
