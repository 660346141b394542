// SPDX-License-Identifier: Apache-2.0
/// @file
/// `head_kv`: budgets by a table of how important each head of the model is.
#pragma once

#include <restkv/budget/model_table.hpp>

namespace restkv {

/// Budgets over all layers and heads by head importance (HeadKV, arXiv 2410.19258). With m = budget - protected tokens
/// and part = floor(m / beta), head h of layer l chooses
///
///     m - part + importance(l, h) / sum of importance * part * layers * heads
///
/// candidates, no more than it has; what some heads cannot take goes to the others by their importance. Rounded by
/// largest remainder over the model, ties to the smaller layer, then head, so that the total is layers * heads * m
/// exactly (the published code rounds each head on its own). Importance that is negative or no number counts as 0; the
/// published table is the mean of a head's retrieval scores. A row for several heads of the table has their sum.
///
/// Layers must have the same tokens. In a ragged cache each head takes its share as far as it has candidates. Cost: up
/// to layers^2 * heads^2 operations where heads reach their end, layers * heads^2 otherwise; no memory.
struct head_kv {
  budget_size budget{};             ///< mean over all layers and heads
  model_table<float> importance{};  ///< [layers, heads]; must outlive the policy
  float beta = 1.01f;               ///< how much is shared by importance: all of it at 1, less for larger ones

  ///@{
  /// See `budget_allocator`.
  [[nodiscard]] index_t tokens_per_head(const budget_problem& problem) const noexcept {
    const index_t wanted = budget.of(problem);
    if (wanted < problem.protected_tokens()) return wanted;
    return problem.protected_tokens() + chosen_in_layer(problem) / std::max<index_t>(problem.heads, 1);
  }
  /// The shorter the sequences, the more heads give what they cannot take to the others: a head's share is largest
  /// where it reaches the end itself. Found by bisection. Heads below the mean may be asked for the mean, where more is
  /// protected than planned.
  [[nodiscard]] index_t most_per_head(const budget_problem& problem) const noexcept {
    head_kv planned = *this;
    planned.budget = budget_size(budget.of(problem) * problem.unit);
    budget_problem shorter = problem;
    const auto reaches_end = [&](index_t candidates) {
      shorter.candidates = candidates;
      shorter.length = candidates + problem.protected_tokens();
      return shares(planned, shorter).largest(problem.layer) >= static_cast<double>(candidates);
    };
    index_t full = 0;
    index_t open = problem.candidates + 1;
    while (open - full > 1) {
      const index_t middle = full + (open - full) / 2;
      (reaches_end(middle) ? full : open) = middle;
    }
    return problem.protected_tokens() + std::min(problem.candidates, std::max(mean_chosen(problem), full + 2));
  }
  [[nodiscard]] index_t chosen_in_layer(const budget_problem& problem) const noexcept {
    const shares made(*this, problem);
    index_t sum = 0;
    for (index_t h = 0; h < problem.heads; ++h) sum += std::min(made.count(problem.layer, h), problem.candidates_of(h));
    return sum;
  }
  [[nodiscard]] constexpr index_t deciding_keys(const budget_problem&) const noexcept { return 0; }

  template <std::unsigned_integral Key>
  void allocate(const budget_problem& problem, tensor_view<const Key, 2>, std::span<index_t> counts,
                std::span<double>) const noexcept {
    const shares made(*this, problem);
    for (std::size_t h = 0; h < counts.size(); ++h) {
      const auto row = static_cast<index_t>(h);
      counts[h] = std::min(made.count(problem.layer, row), problem.candidates_of(row));
    }
  }
  [[nodiscard]] status check(const budget_problem& problem) const noexcept {
    return importance.check("head_kv.importance", problem);
  }
  ///@}

  /// Fails on a beta below 1 and on a bad budget.
  [[nodiscard]] status check() const noexcept {
    if (!(beta >= 1.0f) || !std::isfinite(beta)) {
      return status::error(errc::invalid_argument, "head_kv.beta is %g, must be at least 1", double{beta});
    }
    return budget.check("head_kv");
  }

 private:
  [[nodiscard]] index_t mean_chosen(const budget_problem& problem) const noexcept {
    return std::clamp<index_t>(budget.of(problem) - problem.protected_tokens(), 0, problem.candidates);
  }

  /// The shares of all layers and heads of a model of equal sequences, computed again whenever asked for one.
  class shares {
   public:
    shares(const head_kv& owner, const budget_problem& problem) noexcept
        : owner_(owner), problem_(problem), mean_(owner.mean_chosen(problem)), known_(owner.importance.fits(problem)) {
      const index_t part = static_cast<index_t>(static_cast<double>(mean_) / static_cast<double>(owner.beta));
      base_ = static_cast<double>(mean_ - part);
      ceiling_ = static_cast<double>(problem.candidates);
      if (known_) fill(static_cast<double>(mean_) * static_cast<double>(problem.layers * problem.heads));
    }

    /// Candidates of one head.
    [[nodiscard]] index_t count(index_t layer, index_t head) const noexcept {
      if (!known_ || mean_ == problem_.candidates) return mean_;
      const double own = share(layer, head);
      const double remainder = own - std::floor(own);
      // Units that rounding down leaves, and how many heads come before this one to get them.
      index_t given = 0;
      index_t before = 0;
      for (index_t l = 0; l < problem_.layers; ++l) {
        for (index_t h = 0; h < problem_.heads; ++h) {
          const double other = share(l, h);
          const double rest = other - std::floor(other);
          given += static_cast<index_t>(std::floor(other));
          before += rest > remainder || (rest == remainder && (l < layer || (l == layer && h < head))) ? 1 : 0;
        }
      }
      const index_t left = mean_ * problem_.layers * problem_.heads - given;
      return static_cast<index_t>(std::floor(own)) + (before < left ? 1 : 0);
    }

    /// Largest share of a layer's heads, before rounding.
    [[nodiscard]] double largest(index_t layer) const noexcept {
      double most = known_ ? 0.0 : static_cast<double>(mean_);
      for (index_t h = 0; known_ && h < problem_.heads; ++h) most = std::max(most, share(layer, h));
      return most;
    }

   private:
    [[nodiscard]] double weight(index_t layer, index_t head) const noexcept {
      const auto columns = owner_.importance.columns_of(head, problem_.heads);
      double sum = 0;
      for (index_t i = 0; i < columns.count; ++i) {
        const auto value = static_cast<double>(owner_.importance.values(layer, columns.first + i));
        sum += value > 0 && std::isfinite(value) ? value : 0.0;
      }
      return sum;
    }
    [[nodiscard]] double share(index_t layer, index_t head) const noexcept {
      return std::min(ceiling_, base_ + weight(layer, head) * scale_ + even_);
    }

    /// Sets scale_ and even_ so that the shares add up to `total`, heads at the ceiling taken out one round after the
    /// other.
    void fill(double total) noexcept {
      index_t full_before = -1;
      for (index_t full = 0; full != full_before;) {
        full_before = full;
        double left = total;
        double weights = 0;
        index_t of_no_weight = 0;
        for_each([&](double w) {
          if (full > 0 && base_ + w * scale_ >= ceiling_) {
            left -= ceiling_;
          } else {
            left -= base_;
            weights += w;
            of_no_weight += w == 0 ? 1 : 0;
          }
        });
        if (weights > 0) {
          scale_ = std::max(scale_, left / weights);  // rounding must not open a head again: that would never end
        } else {
          even_ = of_no_weight > 0 ? std::max(0.0, left) / static_cast<double>(of_no_weight) : 0.0;
          return;
        }
        full = 0;
        for_each([&](double w) { full += base_ + w * scale_ >= ceiling_ ? 1 : 0; });
      }
    }
    template <class Visit>
    void for_each(const Visit& visit) const noexcept {
      for (index_t l = 0; l < problem_.layers; ++l) {
        for (index_t h = 0; h < problem_.heads; ++h) visit(weight(l, h));
      }
    }

    const head_kv& owner_;
    const budget_problem& problem_;
    index_t mean_;
    bool known_;
    double base_ = 0;
    double ceiling_ = 0;
    double scale_ = 0;
    double even_ = 0;
  };
};

}  // namespace restkv
