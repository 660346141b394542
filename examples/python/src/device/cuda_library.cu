// SPDX-License-Identifier: Apache-2.0
#include "cuda_library.hpp"

#include "cuda.cuh"
#include "device_library_of.hpp"

namespace restkv::python {

device_library& cuda_library() noexcept {
  static device_library_of<cuda_device> library;
  return library;
}

}  // namespace restkv::python
