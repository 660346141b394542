// SPDX-License-Identifier: Apache-2.0
/// @file
/// `cuda_backend`: scores and selection on a GPU by the library's own kernels.
#pragma once

#include <restkv/backend/cuda/device_memory.cuh>
#include <restkv/backend/kernel_backend.hpp>
#include <restkv/kernel/device_group.cuh>

namespace restkv {

/// Enqueues on a stream: `cuda_backend{stream}`. Layers, workspaces and results lie in device memory; see
/// `kernel_backend`. A copy enqueues on the same stream. One host thread at a time may use it.
using cuda_backend = kernel_backend<kernel::stream_executor>;

/// The tuning for the current device: its top-k for the architecture. Asks the driver, so ask once.
[[nodiscard]] inline status device_tuning(kernel_tuning& tuning) noexcept {
  int device = 0;
  int major = 0;
  int minor = 0;
  RESTKV_RETURN_IF_FAILED(cuda_status("the current device", cudaGetDevice(&device)));
  RESTKV_RETURN_IF_FAILED(cuda_status("the device's architecture",
                                      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
  RESTKV_RETURN_IF_FAILED(cuda_status("the device's architecture",
                                      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)));
  tuning.top_k = kernel::radix_tuning_for(10 * major + minor);
  return {};
}

}  // namespace restkv
