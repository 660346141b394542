// SPDX-License-Identifier: Apache-2.0
/// @file
/// The bodies of the GPU's kernels on the CPU, for tests of what the module does with a device.
#pragma once

#include "device_selection.hpp"

#include <restkv/backend/host/backend.hpp>

namespace restkv::python {

/// The CPU as a device: arrays of the host go through the kernels.
struct host_kernel_device {
  using backend = host_kernel_backend;
  static constexpr int device_type = 1;  // DLPack's kDLCPU
  static constexpr const char* name = "the CPU, by the kernels of a GPU";

  template <class Visit>
  [[nodiscard]] static status use(const device_call&, const Visit& visit) {
    backend on(std::uint64_t{11});
    return visit(on);
  }
  /// Of the types that a GPU has, those of 16 bits differ in what they are widened by, and nothing else.
  template <class Visit>
  [[nodiscard]] static status with_element(number type, const Visit& visit) {
    switch (type) {
      case number::float32: return visit(float{});
      case number::float16: return visit(half{});
      default: break;
    }
    return status::error(errc::unsupported, "key has elements of type %s, must be float32 or float16", name_of(type));
  }
};

}  // namespace restkv::python

RESTKV_PYTHON_ALL_SCORES(extern, restkv::host_kernel_backend, float)
RESTKV_PYTHON_ALL_SCORES(extern, restkv::host_kernel_backend, restkv::half)
