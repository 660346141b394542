// SPDX-License-Identifier: Apache-2.0
/// @file
/// What ranks that hold parts of a sequence tell each other of its attention.
#pragma once

#include <restkv/distributed/communicator.hpp>
#include <restkv/reference/window_attention.hpp>

#include <vector>

namespace restkv::distributed {

/// How sums over the tokens of a sequence are added up.
enum class token_sums {
  /// Token after token, each rank behind the one before it: every sum has the bits of one process, and ranks wait for
  /// each other while it is added up.
  in_order,
  /// Each rank its own tokens at the same time, then the ranks' sums in their order. A sum of L terms x over R ranks
  /// differs from the one in order by 2 (L - 1) 2^-53 sum |x| at most, to first order.
  by_rank,
};

/// What is known of a whole sequence from the parts of the ranks: see `reference::whole_sequence`. After a failure it
/// says nothing any more, and what comes out is of no use.
template <communicator Ranks>
class token_parts {
 public:
  token_parts(Ranks& ranks, token_sums how) noexcept : ranks_(ranks), how_(how) {}  ///< refers to the communicator

  /// The first failure.
  [[nodiscard]] const status& failure() const noexcept { return failure_; }
  /// Fails from here on, and returns the first failure.
  const status& note(const status& outcome) noexcept {
    if (failure_.ok()) failure_ = outcome;
    return failure_;
  }

  ///@{
  /// See `reference::whole_sequence`. `fold` broadcasts `running` once a rank, or gathers it once; `combine` gathers 24
  /// bytes a peak; `unite` is an all_reduce.
  template <class Add>
  void fold(std::span<double> running, const Add& add) {
    if (!failure_.ok()) return;
    if (how_ == token_sums::in_order) {
      note(fold_in_order(ranks_, running, [&](bool) { add(); }));
      return;
    }
    add();
    std::vector<double> all = gather<double>(running);
    std::fill(running.begin(), running.end(), 0.0);
    for (std::size_t i = 0; i < all.size(); ++i) running[i % running.size()] += all[i];
  }
  void combine(std::span<reference::peak> peaks) {
    const std::vector<reference::peak> all = gather<reference::peak>(peaks);
    std::fill(peaks.begin(), peaks.end(), reference::peak());
    for (std::size_t i = 0; i < all.size(); ++i) peaks[i % peaks.size()].add(all[i]);
  }
  void unite(std::span<double> numbers) {
    if (failure_.ok()) note(ranks_.all_reduce(numbers, reduction::sum));
  }
  ///@}

  /// The ranks' `own`, in order of rank.
  template <class T>
  [[nodiscard]] std::vector<T> gather(std::span<const T> own) {
    std::vector<T> all(own.size() * static_cast<std::size_t>(ranks_.size()));
    if (failure_.ok()) note(gather_all(ranks_, own, std::span<T>(all)));
    return all;
  }
  /// An all_reduce by sum.
  [[nodiscard]] status add_up(std::span<std::uint64_t> counts) {
    if (failure_.ok()) note(ranks_.all_reduce(counts, reduction::sum));
    return failure_;
  }

  /// How many of the numbers that the ranks count go to this one where `wanted` are given to the ranks in order: entry
  /// by entry, each rank as many as it has. Gathers 8 bytes an entry.
  [[nodiscard]] std::vector<index_t> share_in_order(std::span<const std::uint64_t> own,
                                                    std::span<const index_t> wanted) {
    const std::vector<std::uint64_t> all = gather<std::uint64_t>(own);
    std::vector<index_t> left(wanted.begin(), wanted.end());
    for (std::size_t i = 0; i < own.size(); ++i) {
      for (index_t r = 0; r < ranks_.rank(); ++r) {
        left[i] -= static_cast<index_t>(all[static_cast<std::size_t>(r) * own.size() + i]);
      }
      left[i] = std::clamp<index_t>(left[i], 0, static_cast<index_t>(own[i]));
    }
    return left;
  }

 private:
  Ranks& ranks_;
  token_sums how_;
  status failure_{};
};

}  // namespace restkv::distributed
