// SPDX-License-Identifier: Apache-2.0
// expect: tensor_view<.*(memory_space::device|memory_space\)1)
// A view of host memory must not pass for one of device memory, or a kernel would read a host pointer.
#include <restkv/core/tensor_view.hpp>

using restkv::memory_space;
using restkv::tensor_view;

void launch(tensor_view<const float, 2, memory_space::device>) {}

void caller(float* pointer) {
#ifdef RESTKV_CONTROL
  tensor_view<const float, 2, memory_space::device> view(pointer, {2, 3});
#else
  tensor_view<const float, 2, memory_space::host> view(pointer, {2, 3});
#endif
  launch(view);
}
