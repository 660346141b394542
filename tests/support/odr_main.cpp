// SPDX-License-Identifier: Apache-2.0
// Calls into both sources that include every header (odr.cpp.in).
#include <restkv/core/tensor_view.hpp>

restkv::index_t answer_a(const restkv::tensor_view<const float, 2>& view);
restkv::index_t answer_b(const restkv::tensor_view<const float, 2>& view);

int main() {
  const float data[6] = {};
  const restkv::tensor_view<const float, 2> view(data, {2, 3});
  return answer_a(view) == 6 && answer_b(view) == 6 ? 0 : 1;
}
