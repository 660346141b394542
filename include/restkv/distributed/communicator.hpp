// SPDX-License-Identifier: Apache-2.0
/// @file
/// The `communicator` concept: what ranks that share a layer say to each other.
#pragma once

#include <restkv/core/config.hpp>
#include <restkv/core/status.hpp>

#include <concepts>
#include <cstring>
#include <span>

/// Selections whose heads or tokens lie on several ranks: threads, processes or machines.
namespace restkv::distributed {

/// How `all_reduce` combines the ranks' numbers.
enum class reduction { sum, max };

/// The numbers that `all_reduce` knows.
template <class T>
concept reducible = std::same_as<T, std::uint32_t> || std::same_as<T, std::uint64_t> || std::same_as<T, float> ||
    std::same_as<T, double>;

namespace detail {

template <class C, class T>
concept reduces = requires(C& ranks, std::span<T> data) {
  { ranks.all_reduce(data, reduction::sum) } -> std::same_as<status>;
};

}  // namespace detail

/// A communicator:
///
/// * `rank()`, `size()`: this rank, 0 the first, and how many there are.
/// * `all_reduce(span<T> data, reduction)`, T any `reducible`: replaces data[i] by the sum, or the largest, of the
/// ranks'
///   data[i]; the same bits on every rank. In which order floating-point numbers are added is the communicator's.
/// * `all_gather(span<const std::byte> own, span<std::byte> all)`: all = the ranks' `own`, in order of rank; all.size()
/// is
///   own.size() * size().
/// * `broadcast(span<std::byte> data, index_t root)`: replaces `data` by that of rank `root`.
///
/// All ranks make the same calls in the same order with the same sizes; none returns before it has its result. Data
/// lies in the host's memory. A rank whose call fails must not expect anything of a further one: the others, whatever
/// they are waiting for, get an error (errc::communication_failure) within a time that the communicator states, and so
/// does every later call. Nobody hangs. What a failed call leaves in its data is unspecified.
template <class C>
concept communicator = detail::reduces<C, std::uint32_t> && detail::reduces<C, std::uint64_t> &&
    detail::reduces<C, float> && detail::reduces<C, double> &&
    requires(C& ranks, const C& known, std::span<const std::byte> own, std::span<std::byte> all) {
  { known.rank() } -> std::same_as<index_t>;
  { known.size() } -> std::same_as<index_t>;
  { ranks.all_gather(own, all) } -> std::same_as<status>;
  { ranks.broadcast(all, index_t{}) } -> std::same_as<status>;
};

/// One rank that has everything: what is written for many runs as in one process.
class single_process {
 public:
  ///@{
  /// See `communicator`.
  [[nodiscard]] constexpr index_t rank() const noexcept { return 0; }
  [[nodiscard]] constexpr index_t size() const noexcept { return 1; }
  template <reducible T>
  [[nodiscard]] status all_reduce(std::span<T>, reduction) const noexcept {
    return {};
  }
  [[nodiscard]] status all_gather(std::span<const std::byte> own, std::span<std::byte> all) const noexcept {
    if (!own.empty()) std::memcpy(all.data(), own.data(), own.size());
    return {};
  }
  [[nodiscard]] status broadcast(std::span<std::byte>, index_t) const noexcept { return {}; }
  ///@}
};

static_assert(communicator<single_process>);

/// `all_gather` of numbers: all[r * own.size() + i] = own[i] of rank r.
template <communicator C, class T>
requires std::is_trivially_copyable_v<T>
[[nodiscard]] status gather_all(C& ranks, std::span<const T> own, std::span<T> all) {
  return ranks.all_gather(std::as_bytes(own), std::as_writable_bytes(all));
}

/// A fold that runs through the ranks in order: each continues where the one before it ended, and all get the end.
/// fold(first) changes `running`; `first` is true on rank 0, where nothing was folded yet. The result has the bits of
/// one process that folds everything in this order, which `all_reduce` of floating-point numbers cannot promise. size()
/// broadcasts of `running`, one behind the other.
template <communicator C, class T, class Fold>
[[nodiscard]] status fold_in_order(C& ranks, std::span<T> running, const Fold& fold) {
  for (index_t r = 0; r < ranks.size(); ++r) {
    if (r == ranks.rank()) fold(r == 0);
    RESTKV_RETURN_IF_FAILED(ranks.broadcast(std::as_writable_bytes(running), r));
  }
  return {};
}

}  // namespace restkv::distributed
