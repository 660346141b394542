// SPDX-License-Identifier: Apache-2.0
/// @file
/// CUDA's errors as `status`, and an owner of device memory for what is allocated once: metrics, workspaces of examples.
#pragma once

#include <restkv/core/config.hpp>
#include <restkv/core/status.hpp>

#include <cuda_runtime.h>

#include <span>
#include <type_traits>
#include <utility>

namespace restkv {

/// What CUDA said, as a status: `errc::out_of_memory` where memory ran out, `errc::device_failure` otherwise; the text
/// names what was tried, CUDA's error and its number.
[[nodiscard]] inline status cuda_status(const char* action, cudaError_t error) noexcept {
  if (error == cudaSuccess) return {};
  return status::error(error == cudaErrorMemoryAllocation ? errc::out_of_memory : errc::device_failure,
                       "%s: CUDA error %d, %s: %s", action, static_cast<int>(error), cudaGetErrorName(error),
                       cudaGetErrorString(error));
}

/// Owns `size()` elements of device memory. Movable. Allocating and freeing synchronise the device: for what lives as
/// long as the model.
template <class T>
class device_buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  device_buffer() = default;
  ///@{
  /// The other is empty afterwards, or holds what this held.
  device_buffer(device_buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  device_buffer& operator=(device_buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ///@}
  ~device_buffer() { cudaFree(data_); }

  /// Makes room for `count` elements, not initialised. On failure (`errc::out_of_memory`) the old memory is still held.
  [[nodiscard]] status allocate(index_t count) noexcept {
    if (count < 0) {
      return status::error(errc::invalid_argument, "%lld elements cannot be allocated", static_cast<long long>(count));
    }
    void* fresh = nullptr;
    if (count > 0) {
      const cudaError_t error = cudaMalloc(&fresh, static_cast<std::size_t>(count) * sizeof(T));
      if (error != cudaSuccess) {
        cudaGetLastError();  // so that the next launch does not report it
        return status::error(error == cudaErrorMemoryAllocation ? errc::out_of_memory : errc::device_failure,
                             "%zu bytes of device memory: CUDA error %d, %s",
                             static_cast<std::size_t>(count) * sizeof(T), static_cast<int>(error),
                             cudaGetErrorName(error));
      }
    }
    cudaFree(data_);
    data_ = static_cast<T*>(fresh);
    size_ = count;
    return {};
  }
  /// Allocates and copies; returns when the values are there.
  [[nodiscard]] status assign(std::span<const T> values) noexcept {
    device_buffer fresh;
    RESTKV_RETURN_IF_FAILED(fresh.allocate(static_cast<index_t>(values.size())));
    RESTKV_RETURN_IF_FAILED(cuda_status(
        "copy to the device", cudaMemcpy(fresh.data_, values.data(), values.size_bytes(), cudaMemcpyHostToDevice)));
    *this = std::move(fresh);
    return {};
  }
  /// Copies to the host; returns when the values are there. `values` has room for all elements.
  [[nodiscard]] status copy_to(std::span<T> values) const noexcept {
    if (static_cast<index_t>(values.size()) < size_) {
      return status::error(errc::shape_mismatch, "room for %zu elements, the device holds %lld", values.size(),
                           static_cast<long long>(size_));
    }
    return cuda_status("copy from the device", cudaMemcpy(values.data(), data_, static_cast<std::size_t>(size_) * sizeof(T),
                                                          cudaMemcpyDeviceToHost));
  }

  /// Device pointer; null when empty.
  [[nodiscard]] T* data() const noexcept { return data_; }
  /// Elements.
  [[nodiscard]] index_t size() const noexcept { return size_; }

 private:
  T* data_ = nullptr;
  index_t size_ = 0;
};

}  // namespace restkv
