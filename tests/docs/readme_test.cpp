// SPDX-License-Identifier: Apache-2.0
// The code of the README, compiled and run: every block there must stand here word for word, indentation
// aside (support/check_snippets.py).
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/restkv.hpp>

#include <vector>

using restkv::half;
using restkv::index_t;

namespace {

/// What an engine would own: cache and output projection of one layer.
struct engine_memory {
  restkv_test::random_engine random{7};
  index_t tokens = 1500;
  index_t query_heads = 4;
  index_t kv_heads = 2;
  index_t head_dim = 8;
  index_t hidden = 40;
  std::vector<half> queries = numbers(query_heads * 32 * head_dim, 1.5);
  std::vector<half> keys = numbers(kv_heads * tokens * head_dim, 1.0);
  std::vector<half> values = numbers(kv_heads * tokens * head_dim, 1.0);
  std::vector<half> weights = numbers(hidden * query_heads * head_dim, 0.2);

  [[nodiscard]] std::vector<half> numbers(index_t count, double scale) {
    std::vector<half> made(static_cast<std::size_t>(count));
    for (half& number : made) number = restkv::narrow<half>(scale * restkv_test::normal(random));
    return made;
  }
};

}  // namespace

TEST_CASE("the README's lines keep, compact and verify", "[docs]") {
  const engine_memory engine;
  const index_t tokens = engine.tokens, query_heads = engine.query_heads;
  const index_t kv_heads = engine.kv_heads, head_dim = engine.head_dim;
  const half* const query_data = engine.queries.data();
  const half* const key_data = engine.keys.data();
  const half* const value_data = engine.values.data();
  const restkv::tensor_view<const half, 2> w_o(engine.weights.data(), {engine.hidden, query_heads * head_dim});
  const index_t capacity = tokens;
  std::vector<half> new_keys_memory(static_cast<std::size_t>(kv_heads * capacity * head_dim));
  std::vector<half> new_values_memory(new_keys_memory.size());
  const restkv::tensor_view<half, 4> new_keys(new_keys_memory.data(), {1, kv_heads, capacity, head_dim});
  const restkv::tensor_view<half, 4> new_values(new_values_memory.data(), {1, kv_heads, capacity, head_dim});
  const int threads = 2;

  using view = restkv::tensor_view<const restkv::half, 4>;            // pointer, extents, strides: nothing is copied
  restkv::output_metric metric;                                       // from W_O, once for each layer of the model
  restkv::throw_if_failed(metric.build(w_o, query_heads, head_dim));

  restkv::layer_view<restkv::half> layer;
  layer.query = view(query_data, {1, query_heads, 32, head_dim});     // the prompt's last 32 queries
  layer.key = view(key_data, {1, kv_heads, tokens, head_dim});
  layer.value = view(value_data, {1, kv_heads, tokens, head_dim});
  layer.projection = w_o;
  layer.metric = metric.view();

  restkv::eigen_backend backend(threads);
  const auto policy = restkv::presets::standard(1024);                // tokens per KV head
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer));
  std::vector<std::byte> memory(plan.workspace_bytes);
  const auto kept = restkv::select(backend, plan, layer, restkv::workspace(memory));
  restkv::compact(backend, kept, layer.key, layer.value,
                  restkv::dense_layout{new_keys}, restkv::dense_layout{new_values});
  const auto loss = restkv::output_error(backend, kept, layer);       // loss.mean_relative(): 0.01 is one per cent

  CHECK(plan.capacity <= capacity);
  CHECK(kept.total() == 2 * 1024);
  CHECK(loss.mean_relative() > 0);
  CHECK(loss.mean_relative() < 1);
  for (index_t h = 0; h < kv_heads; ++h) {
    for (index_t slot = 0; slot < kept.lengths(0, h); ++slot) {
      const index_t token = kept.positions(0, h, slot);
      CHECK(new_keys(0, h, slot, 3).bits() == layer.key.from_token(token)(0, h, 0, 3).bits());
      CHECK(new_values(0, h, slot, 5).bits() == layer.value.from_token(token)(0, h, 0, 5).bits());
    }
  }
}

TEST_CASE("the README's policy is one", "[docs]") {
  const auto policy = restkv::eviction_policy{
      .score = restkv::rest_kv{.order = restkv::query_order::before},  // or snap_kv, streaming_llm, a struct of yours
      .window = 32,                                                    // queries that are observed
      .temporal = restkv::ema{.alpha = 0.3f},                          // over these queries
      .spatial = restkv::adaptive_window{.min_width = 5, .scale = 2000},
      .group = restkv::group_reduce::l2,                               // the query heads of a KV head -> one score
      .budget = restkv::ada_kv{.budget = 1024, .floor = 0.2f},
      .protect = {.sink = 4, .recent = 32}};

  CHECK(policy.check().ok());
  CHECK(policy.recent() == 32);
}
