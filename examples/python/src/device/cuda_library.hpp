// SPDX-License-Identifier: Apache-2.0
/// @file
/// The kernels on NVIDIA GPUs, for sources that nvcc does not compile.
#pragma once

#include "device_library.hpp"

namespace restkv::python {

[[nodiscard]] device_library& cuda_library() noexcept;

}  // namespace restkv::python
