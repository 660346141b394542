// SPDX-License-Identifier: Apache-2.0
// Host tensors on the device, strides and all, and scores back. With MY_KERNEL_ON_HOST, both are the host's own.
#pragma once

#include <restkv/core/tensor_view.hpp>

#include <cstring>
#include <vector>

#if !defined(MY_KERNEL_ON_HOST)

#include <cuda_runtime_api.h>

/// A copy in device memory of all bytes that a view can touch; `data()` is where the view's first element is.
template <class T>
class on_device {
 public:
  template <std::size_t Rank>
  explicit on_device(const restkv::tensor_view<T, Rank>& view) {
    const restkv::byte_range bytes = restkv::touched_bytes(view);
    const auto size = static_cast<std::size_t>(bytes.last - bytes.first);
    if (size == 0) return;
    failed_ = cudaMalloc(&memory_, size) != cudaSuccess ||
              cudaMemcpy(memory_, bytes.first, size, cudaMemcpyHostToDevice) != cudaSuccess;
    offset_ = reinterpret_cast<const unsigned char*>(view.data) - bytes.first;
  }
  on_device(const on_device&) = delete;
  on_device& operator=(const on_device&) = delete;
  ~on_device() { cudaFree(memory_); }

  [[nodiscard]] bool failed() const { return failed_; }
  [[nodiscard]] T* data() const { return reinterpret_cast<T*>(static_cast<unsigned char*>(memory_) + offset_); }
  /// Back into the memory of a view that is dense.
  template <std::size_t Rank>
  void copy_to(const restkv::tensor_view<T, Rank>& view) const {
    if (view.empty()) return;
    cudaMemcpy(view.data, memory_, static_cast<std::size_t>(view.size()) * sizeof(T), cudaMemcpyDeviceToHost);
  }

 private:
  void* memory_ = nullptr;
  std::ptrdiff_t offset_ = 0;
  bool failed_ = false;
};

inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

#else

template <class T>
class on_device {
 public:
  template <std::size_t Rank>
  explicit on_device(const restkv::tensor_view<T, Rank>& view) : data_(view.data) {}
  [[nodiscard]] bool failed() const { return false; }
  [[nodiscard]] T* data() const { return data_; }
  template <std::size_t Rank>
  void copy_to(const restkv::tensor_view<T, Rank>&) const {}

 private:
  T* data_;
};

inline bool has_device() { return true; }

#endif
