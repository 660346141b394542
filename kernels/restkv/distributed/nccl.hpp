// SPDX-License-Identifier: Apache-2.0
/// @file
/// `nccl_communicator`: ranks that are GPUs. Needs NCCL and the CUDA runtime; where no nccl.h is found the header
/// declares nothing. Compiles with g++ and clang++ alone.
#pragma once

#include <restkv/distributed/communicator.hpp>

#include <chrono>
#include <thread>

#if __has_include(<nccl.h>) && __has_include(<cuda_runtime_api.h>)

#include <restkv/backend/cuda/device_memory.cuh>

#include <cuda_runtime_api.h>
#include <nccl.h>

namespace restkv::distributed {

/// The ranks of an NCCL communicator, which this object uses and does not own. What is said lies in the host's memory,
/// as for every `communicator`: it is a few KB, goes to the device and back through a buffer that grows as needed, and
/// the host waits for it. Work that was put on the stream before runs first. For one thread at a time, on the
/// communicator's device.
///
/// A call waits `patience` at most; where a rank failed, or did not come, it ends with errc::communication_failure,
/// every later call fails at once, and the NCCL communicator was aborted (ncclCommAbort), which nobody may use any
/// more.
class nccl_communicator {
 public:
  /// Uses both; they must outlive this object. Ask `failure` whether the communicator answered.
  nccl_communicator(ncclComm_t ranks, cudaStream_t stream,
                    std::chrono::milliseconds patience = std::chrono::seconds(30)) noexcept
      : ranks_(ranks), stream_(stream), patience_(patience) {
    static_cast<void>(check(ncclCommUserRank(ranks_, &rank_), "ncclCommUserRank"));
    static_cast<void>(check(ncclCommCount(ranks_, &size_), "ncclCommCount"));
  }
  nccl_communicator(const nccl_communicator&) = delete;             ///< it owns a buffer
  nccl_communicator& operator=(const nccl_communicator&) = delete;  ///< likewise
  ~nccl_communicator() = default;                                   ///< frees the buffer

  /// The first failure.
  [[nodiscard]] const status& failure() const noexcept { return failure_; }

  ///@{
  /// See `communicator`. In which order sums of floating-point numbers are added is NCCL's.
  [[nodiscard]] index_t rank() const noexcept { return rank_; }
  [[nodiscard]] index_t size() const noexcept { return size_; }
  template <reducible T>
  [[nodiscard]] status all_reduce(std::span<T> data, reduction how) {
    ncclDataType_t type = ncclUint64;
    if constexpr (std::same_as<T, std::uint32_t>) type = ncclUint32;
    if constexpr (std::same_as<T, float>) type = ncclFloat32;
    if constexpr (std::same_as<T, double>) type = ncclFloat64;
    const auto bytes = std::as_writable_bytes(data);
    return call(bytes, bytes, 0, [&](std::byte* buffer) {
      return ncclAllReduce(buffer, buffer, data.size(), type, how == reduction::sum ? ncclSum : ncclMax, ranks_,
                           stream_);
    });
  }
  [[nodiscard]] status all_gather(std::span<const std::byte> own, std::span<std::byte> all) {
    const std::size_t at = own.size() * static_cast<std::size_t>(rank_);
    return call(own, all, at, [&](std::byte* buffer) {
      return ncclAllGather(buffer + at, buffer, own.size(), ncclUint8, ranks_, stream_);
    });
  }
  [[nodiscard]] status broadcast(std::span<std::byte> data, index_t root) {
    return call(data, data, 0, [&](std::byte* buffer) {
      return ncclBroadcast(buffer, buffer, data.size(), ncclUint8, static_cast<int>(root), ranks_, stream_);
    });
  }
  ///@}

 private:
  /// `in` to byte `at` of the buffer, start(buffer), and the beginning of the buffer to `out`.
  template <class Start>
  [[nodiscard]] status call(std::span<const std::byte> in, std::span<std::byte> out, std::size_t at,
                            const Start& start) {
    if (!failure_.ok()) return failure_;
    if (out.empty()) return {};
    if (buffer_.size() < static_cast<index_t>(out.size())) {
      if (const status made = buffer_.allocate(static_cast<index_t>(out.size())); !made.ok()) return fail(made);
    }
    RESTKV_RETURN_IF_FAILED(
        check(cudaMemcpyAsync(buffer_.data() + at, in.data(), in.size(), cudaMemcpyHostToDevice, stream_),
              "a copy to the device"));
    RESTKV_RETURN_IF_FAILED(check(start(buffer_.data()), "a call"));
    RESTKV_RETURN_IF_FAILED(wait());  // before the copy, which may make the host wait for as long as it takes
    RESTKV_RETURN_IF_FAILED(
        check(cudaMemcpyAsync(out.data(), buffer_.data(), out.size(), cudaMemcpyDeviceToHost, stream_),
              "a copy from the device"));
    return check(cudaStreamSynchronize(stream_), "a copy from the device");
  }

  [[nodiscard]] status wait() {
    const auto deadline = std::chrono::steady_clock::now() + patience_;
    for (;;) {
      const cudaError_t state = cudaStreamQuery(stream_);
      if (state == cudaSuccess) return {};
      if (state != cudaErrorNotReady) return check(state, "a call");
      ncclResult_t async = ncclSuccess;
      RESTKV_RETURN_IF_FAILED(check(ncclCommGetAsyncError(ranks_, &async), "ncclCommGetAsyncError"));
      RESTKV_RETURN_IF_FAILED(check(async, "a call"));
      if (std::chrono::steady_clock::now() > deadline) {
        return fail(status::error(errc::communication_failure, "rank %d of %d waited %lld ms for the others", rank_,
                                  size_, static_cast<long long>(patience_.count())));
      }
      std::this_thread::yield();
    }
  }

  [[nodiscard]] status check(ncclResult_t code, const char* what) {
    if (code == ncclSuccess || code == ncclInProgress) return {};
    return fail(status::error(errc::communication_failure, "%s failed: %s", what, ncclGetErrorString(code)));
  }
  [[nodiscard]] status check(cudaError_t code, const char* what) {
    if (code == cudaSuccess) return {};
    return fail(status::error(errc::communication_failure, "%s failed: %s", what, cudaGetErrorString(code)));
  }
  status fail(const status& outcome) {
    if (failure_.ok()) ncclCommAbort(ranks_);
    failure_ = outcome;
    return failure_;
  }

  ncclComm_t ranks_;
  cudaStream_t stream_;
  std::chrono::milliseconds patience_;
  int rank_ = 0;
  int size_ = 0;
  device_buffer<std::byte> buffer_;
  status failure_{};
};

static_assert(communicator<nccl_communicator>);

}  // namespace restkv::distributed

#endif
