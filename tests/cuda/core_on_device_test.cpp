// SPDX-License-Identifier: Apache-2.0
// The body of the kernel in core_on_device.cu, run on the host.
#include "cuda/core_on_device.hpp"

#include "support/catch.hpp"

#include <vector>

TEMPLATE_TEST_CASE("the kernel body sums rows of any element type", "", float, restkv::half, restkv::bfloat16) {
  constexpr restkv::index_t tokens = 5;
  constexpr restkv::index_t channels = 8;
  std::vector<TestType> stored(2 * tokens * channels);  // every second row is a gap
  std::vector<TestType> sums(tokens);
  for (restkv::index_t t = 0; t < tokens; ++t) {
    for (restkv::index_t c = 0; c < channels; ++c) {
      // Small integers: exact in every type.
      stored[static_cast<std::size_t>((2 * t) * channels + c)] = restkv::narrow<TestType>(static_cast<float>(t + c));
    }
  }
  const restkv::tensor_view<const TestType, 2> in(stored.data(), {tokens, channels}, {2 * channels, 1});
  const restkv::tensor_view<TestType, 1> out(sums.data(), {tokens});
  for (restkv::index_t t = 0; t < tokens; ++t) restkv_test::sum_row(in, out, t);
  for (restkv::index_t t = 0; t < tokens; ++t) {
    CHECK(restkv::widen<float>(out(t)) == static_cast<float>(channels * t + channels * (channels - 1) / 2));
  }
}
