// SPDX-License-Identifier: Apache-2.0
// One function body for the kernel (core_on_device.cu) and the host test (core_on_device_test.cpp).
#pragma once

#include <restkv/core/dtype.hpp>
#include <restkv/core/tensor_view.hpp>

namespace restkv_test {

/// out[t] = the sum of row t of `in`, rounded to Out. in: [tokens, head_dim], out: [tokens].
template <restkv::element In, restkv::element Out, restkv::memory_space Space>
RESTKV_HD void sum_row(restkv::tensor_view<const In, 2, Space> in, restkv::tensor_view<Out, 1, Space> out,
                       restkv::index_t token) {
  const auto row = in[token];  // [head_dim]
  float sum = 0.0f;
  for (restkv::index_t c = 0; c < row.extent(0); ++c) sum += restkv::widen<float>(row(c));
  out(token) = restkv::narrow<Out>(sum);
}

}  // namespace restkv_test
