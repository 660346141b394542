// SPDX-License-Identifier: Apache-2.0
/// @file
/// `counting_communicator`: what a selection says to other ranks, counted.
#pragma once

#include <restkv/distributed/communicator.hpp>

namespace restkv::distributed {

/// Calls of one kind, and the bytes of data that this rank handed over in them: all of an all_reduce or a broadcast,
/// its own part of an all_gather. With R ranks and a ring, a rank sends 2 (R - 1) / R of an all_reduce's bytes, R - 1
/// times an all_gather's, and a broadcast's at most once.
struct call_count {
  std::uint64_t calls = 0;  ///< that were made, failed ones included
  std::uint64_t bytes = 0;  ///< of data

  /// Both numbers are the same.
  [[nodiscard]] friend constexpr bool operator==(const call_count&, const call_count&) noexcept = default;
};

/// Everything that was said.
struct traffic {
  call_count all_reduce{};  ///< of all element types
  call_count all_gather{};  ///< own parts
  call_count broadcast{};   ///< whether this rank was the root or not

  /// Calls of every kind.
  [[nodiscard]] constexpr std::uint64_t calls() const noexcept {
    return all_reduce.calls + all_gather.calls + broadcast.calls;
  }
  /// Bytes of every kind.
  [[nodiscard]] constexpr std::uint64_t bytes() const noexcept {
    return all_reduce.bytes + all_gather.bytes + broadcast.bytes;
  }
  /// All numbers are the same.
  [[nodiscard]] friend constexpr bool operator==(const traffic&, const traffic&) noexcept = default;
};

/// A communicator that counts what goes through another one. Refers to it.
template <communicator C>
class counting_communicator {
 public:
  /// Begins at 0.
  explicit counting_communicator(C& ranks) noexcept : ranks_(ranks) {}

  /// Since the beginning, or the last `reset`.
  [[nodiscard]] const traffic& counted() const noexcept { return counted_; }
  /// Begins again.
  void reset() noexcept { counted_ = {}; }

  ///@{
  /// See `communicator`.
  [[nodiscard]] index_t rank() const noexcept { return ranks_.rank(); }
  [[nodiscard]] index_t size() const noexcept { return ranks_.size(); }
  template <reducible T>
  [[nodiscard]] status all_reduce(std::span<T> data, reduction how) {
    count(counted_.all_reduce, data.size_bytes());
    return ranks_.all_reduce(data, how);
  }
  [[nodiscard]] status all_gather(std::span<const std::byte> own, std::span<std::byte> all) {
    count(counted_.all_gather, own.size());
    return ranks_.all_gather(own, all);
  }
  [[nodiscard]] status broadcast(std::span<std::byte> data, index_t root) {
    count(counted_.broadcast, data.size());
    return ranks_.broadcast(data, root);
  }
  ///@}

 private:
  static void count(call_count& kind, std::size_t bytes) noexcept {
    ++kind.calls;
    kind.bytes += bytes;
  }

  C& ranks_;
  traffic counted_{};
};

static_assert(communicator<counting_communicator<single_process>>);

}  // namespace restkv::distributed
