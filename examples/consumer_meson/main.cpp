// SPDX-License-Identifier: Apache-2.0
// The smallest user: a view over a buffer somebody else owns.
#include <restkv/core/tensor_view.hpp>

#include <cstdio>
#include <vector>

int main() {
  // One sequence, 2 heads, 3 tokens, 4 channels, stored as [batch, tokens, heads, head_dim].
  const std::vector<float> keys(1 * 3 * 2 * 4, 1.0f);
  const restkv::tensor_view<const float, 4> view(keys.data(), {1, 2, 3, 4}, {24, 4, 8, 1});
  std::printf("%lld elements, the last token of head 1 begins at element %lld\n", static_cast<long long>(view.size()),
              static_cast<long long>(view.offset(0, 1, 2, 0)));
  return view.offset(0, 1, 2, 0) == 20 ? 0 : 1;
}
