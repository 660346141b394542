// SPDX-License-Identifier: Apache-2.0
/// @file
/// The budget of a layer whose keys lie on several ranks.
#pragma once

#include <restkv/budget/budget.hpp>
#include <restkv/distributed/agreement.hpp>
#include <restkv/distributed/pivot.hpp>

namespace restkv::distributed {

/// How the allocators of several ranks speak to each other while one selection runs, and the memory they need.
struct budget_channel {
  void* ranks = nullptr;                                        ///< the communicator
  status (*add_up)(void*, std::span<std::uint64_t>) = nullptr;  ///< its all_reduce; null where nothing has to be said
  std::span<index_t> counts{};                                  ///< of the layer's rows
  std::span<double> scratch{};                                  ///< of the layer's rows
  std::span<std::uint64_t> histogram{};                         ///< 256, and at least 2 a row of the layer
  status failure{};                                             ///< the first
};

/// An allocator that looks at no key at all.
template <class A>
[[nodiscard]] bool ignores_keys(const A& allocator, const budget_problem& problem) noexcept {
  if constexpr (ranking_budget_allocator<A>) return allocator.deciding_keys(problem) == 0;
  return false;
}

/// An allocator that counts a pool by a function: see `ada_kv::count_pooled`.
template <class A>
concept counting_budget_allocator = requires(const A& allocator, const budget_problem& problem,
                                             tensor_view<const std::uint32_t, 2> keys, std::span<double> scratch) {
  allocator.count_pooled(problem, keys, scratch, [](auto, index_t, index_t, const auto&, index_t) {});
};

/// The budget of a whole layer, for a rank that has some of its rows, or a part of the tokens of all: the counts are
/// those that `Budget` gives these rows in one process. An allocator whose heads do not compete says nothing to the
/// other ranks. One that has a pool finds its pivot by 4 (float keys) or 8 (double) all_reduces of 2 KB, and its heads'
/// parts by one of 16 bytes a row of the layer.
template <budget_allocator Budget>
struct layer_budget {
  Budget budget{};                    ///< of the whole layer
  axis_part rows{};                   ///< this rank's rows of the kept set
  bool apart = false;                 ///< whether keys lie on other ranks
  budget_channel* channel = nullptr;  ///< set while a selection runs

  ///@{
  /// See `budget_allocator`; as the budget.
  [[nodiscard]] index_t tokens_per_head(const budget_problem& problem) const noexcept {
    return budget.tokens_per_head(whole(problem));
  }
  [[nodiscard]] index_t most_per_head(const budget_problem& problem) const noexcept {
    return budget.most_per_head(whole(problem));
  }
  /// Of a budget whose heads compete pruning would have to be agreed upon: every score is computed.
  [[nodiscard]] index_t deciding_keys(const budget_problem& problem) const noexcept {
    if constexpr (ranking_budget_allocator<Budget>) {
      if (!competes(problem)) return budget.deciding_keys(whole(problem));
    }
    return std::numeric_limits<index_t>::max();
  }
  template <std::unsigned_integral Key>
  void allocate(const budget_problem& problem, tensor_view<const Key, 2> keys, std::span<index_t> counts,
                std::span<double>) const noexcept {
    const budget_problem layer = whole(problem);
    const std::span<index_t> all = channel->counts.first(static_cast<std::size_t>(layer.heads));
    const std::span<double> scratch = channel->scratch.first(static_cast<std::size_t>(layer.heads));
    if (!competes(problem)) {
      budget.allocate(layer, keys, all, scratch);
    } else if constexpr (counting_budget_allocator<Budget>) {
      const auto count = [&](auto key, index_t own_rows, index_t length, const auto& key_at, index_t total) {
        count_best<decltype(key)>(own_rows, length, key_at, total, all);
      };
      budget.count_pooled(layer, keys, scratch, count);
      if (channel->failure.ok()) budget.share_pool(layer, all, scratch);
    }
    // Without an answer nothing more than the protected tokens is chosen, and the selection fails.
    if (!channel->failure.ok()) std::fill(all.begin(), all.end(), index_t{0});
    std::copy_n(all.begin() + rows.first, counts.size(), counts.begin());
  }
  [[nodiscard]] status check(const budget_problem& problem) const noexcept {
    RESTKV_RETURN_IF_FAILED(check_problem(budget, whole(problem)));
    if (!competes(problem) || counting_budget_allocator<Budget>) return {};
    return status::error(errc::unsupported,
                         "the budget allocator looks at the keys of all heads, which lie on several ranks: see "
                         "counting_budget_allocator");
  }
  ///@}
  /// The budget's own check.
  [[nodiscard]] status check() const noexcept {
    if constexpr (requires { { budget.check() } -> std::same_as<status>; }) return budget.check();
    return {};
  }

  /// True where the rows of several ranks share what they keep by their scores.
  [[nodiscard]] bool competes(const budget_problem& problem) const noexcept {
    return apart && !ignores_keys(budget, whole(problem));
  }

 private:
  [[nodiscard]] budget_problem whole(budget_problem problem) const noexcept {
    problem.heads = std::max(problem.heads, rows.whole);
    return problem;
  }

  /// all[h] = how many of the `total` best keys of all ranks lie in row h of the layer; ties to the smaller row.
  template <std::unsigned_integral Key, class KeyAt>
  void count_best(index_t own_rows, index_t length, const KeyAt& key_at, index_t total,
                  std::span<index_t> all) const noexcept {
    const auto add_up = [&](std::span<std::uint64_t> data) -> status {
      if (channel->failure.ok()) channel->failure = channel->add_up(channel->ranks, data);
      return channel->failure;
    };
    pivot_search<Key> search{.k = total};
    const auto each_key = [&](index_t, const auto& visit) {
      for (index_t h = 0; h < own_rows; ++h) {
        for (index_t n = 0; n < length; ++n) visit(key_at(h, n));
      }
    };
    if (!find_pivots(std::span(&search, 1), channel->histogram, add_up, each_key).ok()) return;
    const std::span<std::uint64_t> split = channel->histogram.first(2 * all.size());  // [rows][greater, equal]
    std::fill(split.begin(), split.end(), 0u);
    for (index_t h = 0; h < own_rows; ++h) {
      std::uint64_t* const row = split.data() + 2 * (rows.first + h);
      for (index_t n = 0; n < length; ++n) {
        const Key key = key_at(h, n);
        if (key == excluded_key) continue;
        row[0] += key > search.found.key ? 1 : 0;
        row[1] += key == search.found.key ? 1 : 0;
      }
    }
    if (!add_up(split).ok()) return;
    index_t equal_left = search.found.equal;
    for (std::size_t h = 0; h < all.size(); ++h) {
      const index_t equal = std::min(equal_left, static_cast<index_t>(split[2 * h + 1]));
      equal_left -= equal;
      all[h] = static_cast<index_t>(split[2 * h]) + equal;
    }
  }
};

}  // namespace restkv::distributed
