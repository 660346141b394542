// SPDX-License-Identifier: Apache-2.0
// The verifier on the GPU against the verifier of the CPU, within a bound of double's rounding. Skipped without a GPU.
#include "cuda/errors_on_device.hpp"
#include "cuda/device_selection.hpp"
#include "kernel/verified_error_support.hpp"
#include "support/catch.hpp"
#include "support/random_layer.hpp"
#include "verify/verify_support.hpp"

#include <restkv/reference/backend.hpp>

using namespace restkv_test;
using namespace restkv;

TEST_CASE("a GPU verifies as the CPU does") {
  if (!has_device()) SKIP("no GPU was found");
  reference_backend reference;
  double largest = 0;
  for (index_t turn = 0; turn < 12; ++turn) {
    random_engine random(static_cast<unsigned>(turn + 1));
    layer_recipe recipe;
    recipe.head_dim = turn % 3 == 0 ? 128 : turn % 3 == 1 ? 64 : 33;
    recipe.tokens = turn < 2 ? 3000 : pick(random, 1, 700);
    recipe.query_rows = turn % 4 == 3 ? 64 : 20;
    recipe.group = turn % 2 == 0 ? 4 : 1;
    recipe.batch = turn % 5 == 4 ? 3 : 1;
    recipe.hidden = turn % 4 == 2 ? 0 : 70;
    recipe.padded = turn % 5 == 4;
    recipe.sharpness = 0.5 + static_cast<double>(turn % 4) * 2;
    random_layer<bfloat16> layer(random, recipe);
    if (turn % 4 == 1) layer.view().projection = {};  // the metric alone
    const index_t queries = turn % 4 == 3 ? 64 : 20;
    const index_t heads = turn % 3 == 2 ? recipe.kv_heads * recipe.group : recipe.kv_heads;
    const owned_kept_tokens kept = keep_some(random, layer.view(), heads, turn == 6 ? 100 : turn == 7 ? 0 : 20);
    CAPTURE(turn, queries, heads, recipe.head_dim, recipe.tokens, recipe.group, recipe.batch, recipe.hidden);
    const output_errors expected = output_error(reference, kept.kept(), layer.view(), queries);
    for (const bool in_graph : {false, true}) {
      output_errors found;
      const status done = errors_on_device(layer.view(), kept.kept(), queries, in_graph, found);
      INFO(done.message());
      REQUIRE(done.ok());
      largest = std::max(largest, compare_errors(expected, found, layer.view()));
    }
  }
  CHECK(largest < 1);
}
