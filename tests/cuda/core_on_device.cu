// SPDX-License-Identifier: Apache-2.0
// The core headers in a kernel: views of device memory by value, strides, and every storage type.
#include "cuda/core_on_device.hpp"

namespace {

using restkv::memory_space;
using restkv::tensor_view;

template <restkv::element In, restkv::element Out>
__global__ void sum_rows(tensor_view<const In, 2, memory_space::device> in,
                         tensor_view<Out, 1, memory_space::device> out) {
  const restkv::index_t token = static_cast<restkv::index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token < in.extent(0)) restkv_test::sum_row(in, out, token);
}

template <restkv::element In, restkv::element Out>
void launch(const void* in, void* out, restkv::index_t tokens) {
  const tensor_view<In, 2, memory_space::device> rows(static_cast<In*>(const_cast<void*>(in)), {tokens, 128});
  const tensor_view<Out, 1, memory_space::device> sums(static_cast<Out*>(out), {tokens});
  sum_rows<In, Out><<<static_cast<unsigned>((tokens + 127) / 128), 128>>>(rows, sums);
}

}  // namespace

void launch_all(const void* in, void* out, restkv::index_t tokens) {
  launch<float, float>(in, out, tokens);
  launch<restkv::half, float>(in, out, tokens);
  launch<restkv::half, restkv::half>(in, out, tokens);
  launch<restkv::bfloat16, float>(in, out, tokens);
  launch<restkv::bfloat16, restkv::bfloat16>(in, out, tokens);
}
