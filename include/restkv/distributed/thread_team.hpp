// SPDX-License-Identifier: Apache-2.0
/// @file
/// `thread_team`: ranks that are threads of one process.
#pragma once

#include <restkv/distributed/communicator.hpp>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

namespace restkv::distributed {

class thread_communicator;

/// What the ranks of one process share. Make it before the threads, and one `thread_communicator` in each.
///
/// A call waits `patience` at most for the other ranks to make theirs, then it fails, and so does every call of every
/// rank from there on. The same at once where ranks make different calls, and where a rank's communicator is destroyed
/// while others wait for it. Memory: a pointer a rank.
class thread_team {
 public:
  /// A team of `ranks`, at least 1. Allocates.
  explicit thread_team(index_t ranks, std::chrono::milliseconds patience = std::chrono::seconds(30))
      : patience_(patience), data_(static_cast<std::size_t>(std::max<index_t>(ranks, 1))) {}
  thread_team(const thread_team&) = delete;             ///< ranks refer to it
  thread_team& operator=(const thread_team&) = delete;  ///< likewise
  ~thread_team() = default;                             ///< after its communicators

  /// How many ranks there are.
  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(data_.size()); }

 private:
  friend class thread_communicator;

  enum class call { reduce_sum, reduce_max, gather, broadcast };

  /// Everybody's data lies in data_ when this returns ok.
  [[nodiscard]] status meet(index_t rank, call kind, std::size_t bytes, const void* data) {
    std::unique_lock lock(mutex_);
    if (failure_.ok() && arrived_ > 0 && (kind != kind_ || bytes != bytes_)) {
      fail("rank %lld makes call %d with %zu bytes, another one call %d with %zu: all ranks must make the same calls",
           static_cast<long long>(rank), static_cast<int>(kind), bytes, static_cast<int>(kind_), bytes_);
    }
    if (!failure_.ok()) return failure_;
    kind_ = kind;
    bytes_ = bytes;
    data_[static_cast<std::size_t>(rank)] = data;
    if (++arrived_ == size()) {
      release();
      return {};
    }
    const std::uint64_t round = round_;
    const auto deadline = std::chrono::steady_clock::now() + patience_;
    if (!met_.wait_until(lock, deadline, [&] { return round_ != round || !failure_.ok(); })) {
      fail("rank %lld waited %lld ms, %lld of %lld ranks came", static_cast<long long>(rank),
           static_cast<long long>(patience_.count()), static_cast<long long>(arrived_), static_cast<long long>(size()));
    }
    return round_ != round ? status() : failure_;
  }

  /// Nobody looks at another's data any more when this returns. All are on their way here, so nobody gives up: who did
  /// would free memory that others still read.
  void part() {
    std::unique_lock lock(mutex_);
    if (++arrived_ == size()) {
      release();
      return;
    }
    const std::uint64_t round = round_;
    met_.wait(lock, [&] { return round_ != round; });
  }

  void leave(index_t rank) {
    const std::lock_guard lock(mutex_);
    fail("rank %lld of %lld left", static_cast<long long>(rank), static_cast<long long>(size()));
  }

  void release() {
    arrived_ = 0;
    ++round_;
    met_.notify_all();
  }

  template <class... Args>
  void fail(const char* format, Args... args) {
    if (!failure_.ok()) return;
    failure_ = status::error(errc::communication_failure, format, args...);
    met_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable met_;
  std::chrono::milliseconds patience_;
  std::vector<const void*> data_;  // of each rank in the current call
  call kind_ = call::gather;
  std::size_t bytes_ = 0;
  index_t arrived_ = 0;
  std::uint64_t round_ = 0;
  status failure_;
};

/// One rank of a `thread_team`, for one thread. Sums are added in order of rank. Its end is the rank's: those that wait
/// for it, or call later, fail.
class thread_communicator {
 public:
  /// Rank `rank` of the team, which must live longer. No two have the same rank.
  thread_communicator(thread_team& team, index_t rank) noexcept : team_(team), rank_(rank) {}
  thread_communicator(const thread_communicator&) = delete;             ///< it is the rank
  thread_communicator& operator=(const thread_communicator&) = delete;  ///< likewise
  ~thread_communicator() { team_.leave(rank_); }                        ///< leaves the team

  ///@{
  /// See `communicator`.
  [[nodiscard]] index_t rank() const noexcept { return rank_; }
  [[nodiscard]] index_t size() const noexcept { return team_.size(); }
  template <reducible T>
  [[nodiscard]] status all_reduce(std::span<T> data, reduction how) {
    const auto kind = how == reduction::sum ? thread_team::call::reduce_sum : thread_team::call::reduce_max;
    RESTKV_RETURN_IF_FAILED(team_.meet(rank_, kind, data.size_bytes(), data.data()));
    // Each rank reduces a part of the elements, in everybody's memory: nobody else touches that part.
    const std::size_t ranks = team_.data_.size();
    const auto own = static_cast<std::size_t>(rank_);
    for (std::size_t i = data.size() * own / ranks; i < data.size() * (own + 1) / ranks; ++i) {
      T reduced = element<T>(0, i);
      for (std::size_t r = 1; r < ranks; ++r) {
        const T next = element<T>(r, i);
        reduced = how == reduction::sum ? static_cast<T>(reduced + next) : std::max(reduced, next);
      }
      for (std::size_t r = 0; r < ranks; ++r) element<T>(r, i) = reduced;
    }
    team_.part();
    return {};
  }
  [[nodiscard]] status all_gather(std::span<const std::byte> own, std::span<std::byte> all) {
    RESTKV_RETURN_IF_FAILED(team_.meet(rank_, thread_team::call::gather, own.size(), own.data()));
    for (std::size_t r = 0; r < team_.data_.size() && !own.empty(); ++r) {
      std::memcpy(all.data() + r * own.size(), team_.data_[r], own.size());
    }
    team_.part();
    return {};
  }
  [[nodiscard]] status broadcast(std::span<std::byte> data, index_t root) {
    RESTKV_RETURN_IF_FAILED(team_.meet(rank_, thread_team::call::broadcast, data.size(), data.data()));
    if (root != rank_ && !data.empty()) {
      std::memcpy(data.data(), team_.data_[static_cast<std::size_t>(root)], data.size());
    }
    team_.part();
    return {};
  }
  ///@}

 private:
  template <class T>
  [[nodiscard]] T& element(std::size_t rank, std::size_t i) const noexcept {
    return static_cast<T*>(const_cast<void*>(team_.data_[rank]))[i];
  }

  thread_team& team_;
  index_t rank_;
};

static_assert(communicator<thread_communicator>);

}  // namespace restkv::distributed
