// SPDX-License-Identifier: Apache-2.0
/// @file
/// `mpi_communicator`: ranks that are processes of MPI. Needs an MPI; where no mpi.h is found the header declares
/// nothing.
#pragma once

#include <restkv/distributed/communicator.hpp>

#if __has_include(<mpi.h>)

// Only the C interface: MPI's own C++ one is gone from the standard, and would have to be linked.
#if !defined(OMPI_SKIP_MPICXX)
#define OMPI_SKIP_MPICXX 1
#define RESTKV_SKIPS_OMPI_CXX
#endif
#if !defined(MPICH_SKIP_MPICXX)
#define MPICH_SKIP_MPICXX 1
#define RESTKV_SKIPS_MPICH_CXX
#endif
#include <mpi.h>
#if defined(RESTKV_SKIPS_OMPI_CXX)
#undef OMPI_SKIP_MPICXX
#undef RESTKV_SKIPS_OMPI_CXX
#endif
#if defined(RESTKV_SKIPS_MPICH_CXX)
#undef MPICH_SKIP_MPICXX
#undef RESTKV_SKIPS_MPICH_CXX
#endif

#include <chrono>
#include <limits>
#include <thread>
#include <vector>

namespace restkv::distributed {

/// The ranks of an MPI communicator, duplicated: what is said here does not mix with what the program says. For one
/// thread at a time (MPI_THREAD_SERIALIZED, or FUNNELED on the main thread). Not copyable; destroyed before
/// MPI_Finalize.
///
/// Calls are nonblocking underneath and wait `patience` at most. A rank that died, or that makes another call,
/// therefore is an error (errc::communication_failure) on the others no later than that, unless the launcher ends them
/// first, as mpirun does by default; every later call fails at once. The duplicate is not freed then, since that would
/// wait for the dead. Data of a call lies in memory of this object until the call is complete, so that a late answer
/// writes to nobody else's. Messages have 2^31 - 1 bytes at most.
class mpi_communicator {
 public:
  /// No ranks; `open` makes it one.
  mpi_communicator() = default;
  mpi_communicator(const mpi_communicator&) = delete;             ///< it owns a communicator
  mpi_communicator& operator=(const mpi_communicator&) = delete;  ///< likewise
  ~mpi_communicator() { close(); }                                ///< frees the duplicate; every rank must come

  /// Duplicates a communicator; every rank of it must.
  [[nodiscard]] status open(MPI_Comm ranks, std::chrono::milliseconds patience = std::chrono::seconds(30)) {
    close();
    failure_ = {};
    patience_ = patience;
    RESTKV_RETURN_IF_FAILED(check(MPI_Comm_dup(ranks, &ranks_), "MPI_Comm_dup"));
    MPI_Comm_set_errhandler(ranks_, MPI_ERRORS_RETURN);
    int number = 0;
    MPI_Comm_rank(ranks_, &number);
    rank_ = number;
    MPI_Comm_size(ranks_, &number);
    size_ = number;
    return {};
  }

  ///@{
  /// See `communicator`. In which order sums of floating-point numbers are added is MPI's.
  [[nodiscard]] index_t rank() const noexcept { return rank_; }
  [[nodiscard]] index_t size() const noexcept { return size_; }
  template <reducible T>
  [[nodiscard]] status all_reduce(std::span<T> data, reduction how) {
    MPI_Datatype type = MPI_UINT64_T;
    if constexpr (std::same_as<T, std::uint32_t>) type = MPI_UINT32_T;
    if constexpr (std::same_as<T, float>) type = MPI_FLOAT;
    if constexpr (std::same_as<T, double>) type = MPI_DOUBLE;
    const auto bytes = std::as_writable_bytes(data);
    return call(bytes, bytes, [&](std::byte* buffer, MPI_Request* request) {
      return MPI_Iallreduce(MPI_IN_PLACE, buffer, static_cast<int>(data.size()), type,
                            how == reduction::sum ? MPI_SUM : MPI_MAX, ranks_, request);
    });
  }
  [[nodiscard]] status all_gather(std::span<const std::byte> own, std::span<std::byte> all) {
    const auto bytes = static_cast<int>(own.size());
    const auto at = own.size() * static_cast<std::size_t>(rank_);
    if (!own.empty()) std::memcpy(all.data() + at, own.data(), own.size());
    return call(all, all, [&](std::byte* buffer, MPI_Request* request) {
      return MPI_Iallgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, buffer, bytes, MPI_BYTE, ranks_, request);
    });
  }
  [[nodiscard]] status broadcast(std::span<std::byte> data, index_t root) {
    return call(data, data, [&](std::byte* buffer, MPI_Request* request) {
      return MPI_Ibcast(buffer, static_cast<int>(data.size()), MPI_BYTE, static_cast<int>(root), ranks_, request);
    });
  }
  ///@}

 private:
  template <class Start>
  [[nodiscard]] status call(std::span<const std::byte> in, std::span<std::byte> out, const Start& start) {
    if (!failure_.ok()) return failure_;
    if (size_ == 0) return fail(status::error(errc::communication_failure, "an mpi_communicator that was not opened"));
    if (in.size() > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
      return fail(status::error(errc::communication_failure, "a message of %zu bytes, MPI takes %d at a time",
                                in.size(), std::numeric_limits<int>::max()));
    }
    buffer_.assign(in.begin(), in.end());
    MPI_Request request = MPI_REQUEST_NULL;
    RESTKV_RETURN_IF_FAILED(check(start(buffer_.data(), &request), "a call"));
    const auto deadline = std::chrono::steady_clock::now() + patience_;
    for (int done = 0; done == 0;) {
      RESTKV_RETURN_IF_FAILED(check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Test"));
      if (done != 0) break;
      if (std::chrono::steady_clock::now() > deadline) {
        return fail(status::error(errc::communication_failure, "rank %lld of %lld waited %lld ms for the others",
                                  static_cast<long long>(rank_), static_cast<long long>(size_),
                                  static_cast<long long>(patience_.count())));
      }
      std::this_thread::yield();
    }
    std::copy(buffer_.begin(), buffer_.end(), out.begin());
    return {};
  }

  [[nodiscard]] status check(int code, const char* what) {
    if (code == MPI_SUCCESS) return {};
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    return fail(status::error(errc::communication_failure, "%s failed: %s", what, text));
  }
  status fail(const status& outcome) {
    failure_ = outcome;
    return failure_;
  }

  void close() {
    if (failure_.ok()) {
      if (ranks_ != MPI_COMM_NULL) MPI_Comm_free(&ranks_);
    } else {
      static_cast<void>(new std::vector<std::byte>(std::move(buffer_)));  // a late answer may still be written
    }
    ranks_ = MPI_COMM_NULL;
    rank_ = 0;
    size_ = 0;
  }

  MPI_Comm ranks_ = MPI_COMM_NULL;
  std::chrono::milliseconds patience_{0};
  std::vector<std::byte> buffer_;  // of the current call
  index_t rank_ = 0;
  index_t size_ = 0;
  status failure_{};
};

static_assert(communicator<mpi_communicator>);

}  // namespace restkv::distributed

#endif
