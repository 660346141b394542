// SPDX-License-Identifier: Apache-2.0
/// @file
/// `ada_kv`: the heads of a layer compete for the layer's budget.
#pragma once

#include <restkv/budget/budget.hpp>
#include <restkv/selection/top_k.hpp>

#include <limits>
#include <type_traits>

namespace restkv {

/// Adaptive budgets over the heads of one layer (Ada-KV, arXiv 2407.11550). With base = tokens_per_head - protected:
/// the heads * base best scores of the layer, all heads together, give count[h]; head h gets
///
///     count[h] (1 - floor) + base floor
///
/// candidates, rounded by largest remainder so that the total is heads * base exactly (the published code rounds each
/// head on its own and can miss it). Ties at the cut go to the smaller head, then to the smaller position. Where heads
/// differ in length, what a head cannot use goes to the others, but no head passes `most_per_head`.
/// `normalise` first scales head h's scores by (sum of its top `base` scores) / (sum of all its scores).
struct ada_kv {
  budget_size budget{};    ///< mean over the heads of a layer
  float floor = 0.2f;      ///< part of the uniform share that every head gets, in [0, 1]; 1 is uniform
  bool normalise = false;  ///< compare heads by how concentrated they are rather than by their raw scores

  /// See `budget_allocator`.
  [[nodiscard]] RESTKV_HD index_t tokens_per_head(const budget_problem& problem) const noexcept {
    return budget.of(problem);
  }
  /// See `budget_allocator`.
  [[nodiscard]] RESTKV_HD index_t most_per_head(const budget_problem& problem) const noexcept {
    const index_t base = base_of(problem);
    const auto part = static_cast<double>(floor);
    const double most = std::fma(static_cast<double>(std::min(problem.heads * base, problem.candidates)), 1.0 - part,
                                 static_cast<double>(base) * part);
    return problem.protected_tokens() + std::min(problem.candidates, static_cast<index_t>(most) + 1);
  }
  /// `normalise` compares sums over all scores.
  [[nodiscard]] index_t deciding_keys(const budget_problem& problem) const noexcept {
    return normalise ? std::numeric_limits<index_t>::max() : problem.heads * base_of(problem);
  }

  /// See `budget_allocator`.
  template <std::unsigned_integral Key>
  void allocate(const budget_problem& problem, tensor_view<const Key, 2> keys, std::span<index_t> counts,
                std::span<double> scratch) const noexcept {
    count_pooled(problem, keys, scratch,
                 [&](auto key, index_t rows, index_t length, const auto& key_at, index_t total) {
                   count_best<decltype(key)>(rows, length, key_at, total, counts);
                 });
    share_pool(problem, counts, scratch);
  }

  /// Calls count(Compared{}, rows, length, key_at, total) once, which is to count how many of the `total` best of the keys
  /// key_at(row, n), of type Compared, lie in each row. `keys` may be those of a part of the layer's heads.
  template <std::unsigned_integral Key, class Count>
  void count_pooled(const budget_problem& problem, tensor_view<const Key, 2> keys, std::span<double> scratch,
                    const Count& count) const noexcept {
    using real = std::conditional_t<sizeof(Key) == 4, float, double>;
    const index_t total = pooled_keys(problem);
    if (!normalise) {
      count(Key{}, keys.extent(0), keys.extent(1), [&](index_t h, index_t n) { return keys(h, n); }, total);
      return;
    }
    for (index_t h = 0; h < keys.extent(0); ++h) {
      scratch[static_cast<std::size_t>(h)] = concentration(keys[h], base_of(problem));
    }
    count(
        std::uint64_t{}, keys.extent(0), keys.extent(1),
        [&](index_t h, index_t n) {
          const Key key = keys(h, n);
          if (key <= 1) return std::uint64_t{key};
          return order_key(static_cast<double>(score_of_key<real>(key)) * scratch[static_cast<std::size_t>(h)]);
        },
        total);
  }

  ///@{
  /// See `pooled_budget_allocator`.
  [[nodiscard]] constexpr bool pools() const noexcept { return !normalise; }
  [[nodiscard]] RESTKV_HD index_t pooled_keys(const budget_problem& problem) const noexcept {
    const index_t most = most_of(problem);
    index_t room = 0;
    for (index_t h = 0; h < problem.heads; ++h) room += std::min(most, problem.candidates_of(h));
    return std::min(problem.heads * base_of(problem), room);
  }
  RESTKV_HD void share_pool(const budget_problem& problem, std::span<index_t> counts,
                            std::span<double> scratch) const noexcept {
    // Mixing keeps the sum: sum over h of count[h] (1 - floor) + base floor = heads base.
    const auto part = static_cast<double>(floor);
    const auto even = static_cast<double>(base_of(problem)) * part;
    for (std::size_t h = 0; h < counts.size(); ++h) {
      scratch[h] = std::fma(static_cast<double>(counts[h]), 1.0 - part, even);
    }
    const index_t most = most_of(problem);
    round_to_total(
        scratch.first(counts.size()), pooled_keys(problem),
        [&](std::size_t h) { return std::min(most, problem.candidates_of(static_cast<index_t>(h))); }, counts);
  }
  ///@}

  /// Fails on a floor outside [0, 1] and on a bad budget.
  [[nodiscard]] status check() const noexcept {
    if (!(floor >= 0.0f && floor <= 1.0f)) {
      return status::error(errc::invalid_argument, "ada_kv.floor is %g, must be within [0, 1]", double{floor});
    }
    return budget.check("ada_kv");
  }

 private:
  /// Candidates a head keeps on average.
  [[nodiscard]] RESTKV_HD index_t base_of(const budget_problem& problem) const noexcept {
    return detail::chosen_of(tokens_per_head(problem), problem);
  }
  /// Candidates a head keeps at most: a head of a ragged cache may leave more to the others than they were planned for.
  [[nodiscard]] RESTKV_HD index_t most_of(const budget_problem& problem) const noexcept {
    return most_per_head(problem) - problem.protected_tokens();
  }

  /// counts[h] = how many of the `total` best keys lie in row h.
  template <std::unsigned_integral Key, class KeyAt>
  static void count_best(index_t rows, index_t length, const KeyAt& key_at, index_t total,
                         std::span<index_t> counts) noexcept {
    const auto pivot = find_pivot<Key>(rows, length, key_at, total);
    index_t equal_left = pivot.equal;
    for (index_t h = 0; h < rows; ++h) {
      index_t count = 0;
      for (index_t n = 0; n < length; ++n) {
        const Key key = key_at(h, n);
        if (key == excluded_key) continue;
        if (key > pivot.key || (key == pivot.key && equal_left-- > 0)) ++count;
      }
      counts[static_cast<std::size_t>(h)] = count;
    }
  }

  /// The part of a head's total score that its `base` best tokens hold; 0 when that is not a number.
  template <std::unsigned_integral Key>
  [[nodiscard]] static double concentration(tensor_view<const Key, 1> keys, index_t base) noexcept {
    using real = std::conditional_t<sizeof(Key) == 4, float, double>;
    const auto pivot = find_pivot<Key>(
        1, keys.extent(0), [&](index_t, index_t n) { return keys(n); }, base);
    double best = 0;
    double all = 0;
    index_t equal_left = pivot.equal;
    for (index_t n = 0; n < keys.extent(0); ++n) {
      const Key key = keys(n);
      if (key <= 1) continue;
      const auto score = static_cast<double>(score_of_key<real>(key));
      all += score;
      if (key > pivot.key || (key == pivot.key && equal_left-- > 0)) best += score;
    }
    return all > 0 && std::isfinite(best / all) ? best / all : 0.0;
  }
};

}  // namespace restkv
