// SPDX-License-Identifier: Apache-2.0
// Kernels on the host whose memory counts as a device's: what mixes the two up does not compile.
#pragma once

#include <restkv/backend/kernel_backend.hpp>

namespace restkv_test {

struct device_like_executor : restkv::kernel::host_executor {
  static constexpr restkv::memory_space space = restkv::memory_space::device;
  using restkv::kernel::host_executor::host_executor;
};
using device_like_backend = restkv::kernel_backend<device_like_executor>;

template <class T, std::size_t Rank>
restkv::tensor_view<T, Rank, restkv::memory_space::device> on_device(const restkv::tensor_view<T, Rank>& view) {
  return {view.data, view.extents, view.strides};
}

}  // namespace restkv_test
