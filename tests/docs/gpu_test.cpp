// SPDX-License-Identifier: Apache-2.0
// The code of docs/gpu.md, compiled and run on the kernels' bodies.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/backend/kernel_compact.hpp>
#include <restkv/score/snap_kv.hpp>
#include <restkv/select.hpp>

#include <vector>

TEST_CASE("documentation of the GPU's backends") {
  using namespace restkv_test;
  const arranged_layer<float> numbers({.batch = 1, .tokens = 200});
  const restkv::layer_view<float> layer = numbers.view();
  std::vector<float> new_key(2 * 64 * 16);
  std::vector<float> new_value(new_key.size());
  const restkv::tensor_view<float, 4> out_key(new_key.data(), {1, 2, 64, 16});
  const restkv::tensor_view<float, 4> out_value(new_value.data(), {1, 2, 64, 16});
  std::vector<std::byte> memory;

  //! [select]
  restkv::host_kernel_backend backend(1);  // a GPU: cuda_backend backend(stream)
  const restkv::eviction_policy<restkv::snap_kv, restkv::mean, restkv::average_pool, restkv::uniform> policy{
      .budget = {64}};
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer));
  memory.resize(plan.workspace_bytes);  // a GPU: device memory
  const auto kept = restkv::select(backend, plan, layer, restkv::workspace(memory.data(), memory.size()));
  throw_if_failed(restkv::compact(backend, kept, layer.key.chunk(0), layer.value.chunk(0), out_key, out_value));
  //! [select]

  REQUIRE(kept.lengths(0, 0) == 64);
  for (restkv::index_t i = 0; i < 64; ++i) {
    CHECK(out_key(0, 1, i, 3) == numbers.key(0, 1, kept.positions(0, 1, i), 3));
    CHECK(out_value(0, 1, i, 5) == numbers.value(0, 1, kept.positions(0, 1, i), 5));
  }
}
