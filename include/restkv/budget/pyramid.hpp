// SPDX-License-Identifier: Apache-2.0
/// @file
/// `pyramid`: more tokens for the lower layers, fewer for the upper ones.
#pragma once

#include <restkv/budget/budget.hpp>

namespace restkv {

/// How the linear ramp over the layers becomes whole tokens.
enum class pyramid_rounding {
  exact,     ///< the shares of all layers add up to layers * budget exactly (largest remainder)
  released,  ///< integer divisions as in the published code; the total may miss by a few tokens per layer
  /// As kvpress 0.5.5: the ramp is over the protected tokens too. With n = length * ratio (the count, where there is no
  /// ratio) and w protected tokens: least = n / beta, most = 2 n - least; where most would pass the C candidates, most
  /// = C and least = 2 n - C. Layer l keeps most - l (most - least) / (N - 1) in all, or n where least is below w or
  /// most beyond the length; half a token goes to the even number.
  kvpress,
};

/// A linear ramp over depth (PyramidKV, arXiv 2406.02069). With m = budget - protected tokens and C candidates:
/// least = m / beta, most = 2 m - least; where most would pass C, most = C and least = 2 m - C. Layer l of N gets
/// most - l (most - least) / (N - 1) chosen tokens per head, and the protected ones. One layer alone gets m.
struct pyramid {
  budget_size budget{};                                 ///< mean over the layers
  float beta = 20.0f;                                   ///< how steep, >= 1; 1 is uniform
  pyramid_rounding rounding = pyramid_rounding::exact;  ///< see pyramid_rounding

  ///@{
  /// See `budget_allocator`.
  [[nodiscard]] index_t tokens_per_head(const budget_problem& problem) const noexcept {
    const index_t fixed = problem.protected_tokens();
    if (rounding == pyramid_rounding::kvpress) return kept_by_kvpress(problem);
    const index_t wanted = budget.of(problem);
    return wanted < fixed ? wanted : fixed + chosen(problem);
  }
  /// A shorter sequence has a flatter ramp. An upper layer then gets more than here, but no more than the mean, apart
  /// from rounding: by a token up and down, or by what the released integer slope leaves to the upper layers.
  [[nodiscard]] index_t most_per_head(const budget_problem& problem) const noexcept {
    if (rounding == pyramid_rounding::kvpress) {
      // Where the longest sequence has no ramp, a shorter one may have.
      const index_t mean = budget.of(problem) + 2;
      return std::min(problem.length, 2 * problem.layer >= problem.layers - 1 ? mean : 2 * mean);
    }
    const index_t rounding_up = rounding == pyramid_rounding::exact ? 2 : problem.layer;
    const index_t most = std::max(chosen(problem), mean_chosen(problem)) + rounding_up;
    return problem.protected_tokens() + std::min(most, problem.candidates);
  }
  [[nodiscard]] constexpr index_t deciding_keys(const budget_problem&) const noexcept { return 0; }

  template <std::unsigned_integral Key>
  void allocate(const budget_problem& problem, tensor_view<const Key, 2>, std::span<index_t> counts,
                std::span<double>) const noexcept {
    fill_counts(problem, chosen_per_head(*this, problem), counts);
  }
  ///@}

  /// Fails on a beta below 1 and on a bad budget.
  [[nodiscard]] status check() const noexcept {
    if (!(beta >= 1.0f) || !std::isfinite(beta)) {
      return status::error(errc::invalid_argument, "pyramid.beta is %g, must be at least 1", double{beta});
    }
    return budget.check("pyramid");
  }

 private:
  /// Mean over the layers.
  [[nodiscard]] index_t mean_chosen(const budget_problem& problem) const noexcept {
    return std::clamp<index_t>(budget.of(problem) - problem.protected_tokens(), 0, problem.candidates);
  }

  /// Half to the even number, as Python rounds.
  [[nodiscard]] static index_t round_to_even(double x) noexcept {
    const double below = std::floor(x);
    const auto whole = static_cast<index_t>(below);
    if (x - below != 0.5) return static_cast<index_t>(std::floor(x + 0.5));
    return whole + whole % 2;
  }

  [[nodiscard]] index_t kept_by_kvpress(const budget_problem& problem) const noexcept {
    const auto length = static_cast<double>(problem.length);
    const auto window = static_cast<double>(problem.protected_tokens());
    const auto count = static_cast<double>(problem.unit == 1 ? budget.tokens : budget.tokens / problem.unit);
    const double wanted = budget.ratio != 0.0 ? length * budget.ratio : std::min(count, length);
    double least = wanted / static_cast<double>(beta);
    double most = 2.0 * wanted - least;
    if (most >= length - window) {
      most = length - window;
      least = 2.0 * wanted - most;
    }
    if (!(length >= most && most >= least && least >= window) || problem.layers <= 1) return round_to_even(wanted);
    const double slope = (most - least) / static_cast<double>(problem.layers - 1);
    return round_to_even(most - static_cast<double>(problem.layer) * slope);
  }

  [[nodiscard]] index_t chosen(const budget_problem& problem) const noexcept {
    const index_t mean = mean_chosen(problem);
    if (problem.layers <= 1 || mean == problem.candidates) return mean;
    if (rounding == pyramid_rounding::released) {
      index_t least = static_cast<index_t>(static_cast<double>(mean) / static_cast<double>(beta));
      index_t most = 2 * mean - least;
      if (most >= problem.candidates) {
        most = problem.candidates;
        least = 2 * mean - most;
      }
      return most - problem.layer * ((most - least) / (problem.layers - 1));
    }
    // The ramp is symmetric about the mean, so its total is layers * mean. The cumulated ramp, rounded, differenced:
    // each layer's share is within one token of the ramp and the shares add up exactly, without a table of layers.
    double least = static_cast<double>(mean) / static_cast<double>(beta);
    double most = 2.0 * static_cast<double>(mean) - least;
    if (most > static_cast<double>(problem.candidates)) {
      most = static_cast<double>(problem.candidates);
      least = 2.0 * static_cast<double>(mean) - most;
    }
    const double slope = (most - least) / static_cast<double>(problem.layers - 1);
    const auto cumulated = [&](index_t layers) {
      const auto n = static_cast<double>(layers);
      return static_cast<index_t>(std::llround(n * most - slope * n * (n - 1.0) / 2.0));
    };
    return std::clamp<index_t>(cumulated(problem.layer + 1) - cumulated(problem.layer), 0, problem.candidates);
  }
};

}  // namespace restkv
