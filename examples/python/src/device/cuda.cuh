// SPDX-License-Identifier: Apache-2.0
/// @file
/// The kernels on NVIDIA GPUs.
#pragma once

#include "device_selection.hpp"

#include <restkv/backend/cuda/backend.cuh>

namespace restkv::python {

/// The current device of this thread, put back at the end.
class current_device {
 public:
  explicit current_device(int device) noexcept : outcome_(cudaGetDevice(&before_)) {
    if (outcome_ == cudaSuccess && before_ != device) outcome_ = cudaSetDevice(device);
    changed_ = outcome_ == cudaSuccess && before_ != device;
  }
  current_device(const current_device&) = delete;
  current_device& operator=(const current_device&) = delete;
  ~current_device() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }

  [[nodiscard]] status outcome() const noexcept { return cuda_status("the device of the tensors", outcome_); }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t outcome_;
};

/// See `device_library_of`.
struct cuda_device {
  using backend = cuda_backend;
  static constexpr int device_type = 2;  // DLPack's kDLCUDA
  static constexpr const char* name = "NVIDIA GPUs";

  template <class Visit>
  [[nodiscard]] static status use(const device_call& call, const Visit& visit) {
    const current_device device(call.device);
    RESTKV_RETURN_IF_FAILED(device.outcome());
    kernel_tuning tuning;
    RESTKV_RETURN_IF_FAILED(device_tuning(tuning));
    backend on(kernel::stream_executor(reinterpret_cast<cudaStream_t>(call.stream)), tuning);
    return visit(on);
  }
  template <class Visit>
  [[nodiscard]] static status with_element(number type, const Visit& visit) {
    switch (type) {
      case number::float32: return visit(float{});
      case number::float16: return visit(half{});
      case number::bfloat16: return visit(bfloat16{});
      default: break;
    }
    return status::error(errc::unsupported,
                         "key has elements of type %s, must be float32, float16 or bfloat16 on a GPU", name_of(type));
  }
};

}  // namespace restkv::python

RESTKV_PYTHON_ALL_SCORES(extern, restkv::cuda_backend, float)
RESTKV_PYTHON_ALL_SCORES(extern, restkv::cuda_backend, restkv::half)
RESTKV_PYTHON_ALL_SCORES(extern, restkv::cuda_backend, restkv::bfloat16)
