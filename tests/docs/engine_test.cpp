// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/engines.md, compiled and run.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"

#include <restkv/cache/rope.hpp>
#include <restkv/compact.hpp>
#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/select.hpp>

#include <array>
#include <string>
#include <vector>

using restkv::half;
using restkv::index_t;
using restkv::position_t;

namespace {

/// A cache as an engine may own it, with room for tokens to come.
template <class T>
std::vector<T> cache_of(index_t elements, unsigned seed) {
  restkv_test::random_engine random(seed);
  std::vector<T> memory(static_cast<std::size_t>(elements));
  for (T& element : memory) element = restkv::narrow<T>(restkv_test::normal(random));
  return memory;
}

/// A selection to compact: SnapKV on a random layer, with the memory it points into.
struct made_selection {
  restkv_test::arranged_layer<float> layer{{.batch = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 90}};
  restkv::reference_backend backend;
  std::vector<std::byte> memory;
  restkv::kept_tokens kept;

  made_selection() {
    auto policy = restkv::presets::snap_kv(40);
    const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer.view()));
    memory.resize(plan.workspace_bytes);
    kept = restkv::select(backend, plan, layer.view(), restkv::workspace(memory));
  }
};

}  // namespace

TEST_CASE("views of an engine's memory", "[docs]") {
  const index_t batch = 2, query_heads = 4, kv_heads = 2, head_dim = 8, tokens = 60, max_tokens = 100;
  const auto cache = cache_of<half>(batch * max_tokens * kv_heads * 2 * head_dim, 1);
  const auto queries = cache_of<half>(batch * tokens * query_heads * head_dim, 2);
  const half* const cache_data = cache.data();
  const half* const query_data = queries.data();

  //! [strides]
  // The engine stores its cache as [batch, max_tokens, kv_heads, 2, head_dim], a key and a value side by side.
  const index_t head_step = 2 * head_dim;
  const index_t token_step = kv_heads * head_step;
  const index_t batch_step = max_tokens * token_step;
  const std::array<index_t, 4> extents{batch, kv_heads, tokens, head_dim};
  const std::array<index_t, 4> strides{batch_step, head_step, token_step, 1};
  restkv::layer_view<half> layer;
  layer.key = restkv::tensor_view<const half, 4>(cache_data, extents, strides);
  layer.value = restkv::tensor_view<const half, 4>(cache_data + head_dim, extents, strides);

  // Its queries are [batch, tokens, query_heads, head_dim]; the policy looks at the last 32.
  const restkv::tensor_view<const half, 4> all_queries(
      query_data, {batch, query_heads, tokens, head_dim},
      {tokens * query_heads * head_dim, head_dim, query_heads * head_dim, 1});
  layer.query = all_queries.slice(2, tokens - 32, 32);
  //! [strides]

  CHECK(&layer.key.from_token(7)(1, 1, 0, 3) == &cache[static_cast<std::size_t>(((1 * 100 + 7) * 2 + 1) * 16 + 3)]);
  CHECK(&layer.value.from_token(7)(1, 1, 0, 3) == &cache[static_cast<std::size_t>(((1 * 100 + 7) * 2 + 1) * 16 + 11)]);
  CHECK(&layer.query(1, 2, 0, 3) == &queries[static_cast<std::size_t>(((1 * 60 + 28) * 4 + 2) * 8 + 3)]);

  //! [padding]
  // Sequence 0 has all 60 tokens; sequence 1 has 45, and padding in front of them.
  const std::array<std::int32_t, 2> lengths{60, 45};
  layer.lengths = {lengths.data(), {2}};
  layer.pad = restkv::padding::left;
  //! [padding]
  CHECK(restkv::sequence(layer, 1, 0).begin == 15);

  //! [keep_mask]
  // The first 10 tokens of the token axis are a system prompt: never evict them.
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(batch * tokens), 0);
  for (index_t b = 0; b < batch; ++b) {
    for (index_t n = 0; n < 10; ++n) mask[static_cast<std::size_t>(b * tokens + n)] = 1;
  }
  layer.keep_mask = {mask.data(), {batch, tokens}};
  //! [keep_mask]

  restkv::reference_backend backend;
  const auto policy = restkv::presets::snap_kv(45);
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer));
  std::vector<std::byte> memory(plan.workspace_bytes);
  const auto kept = restkv::select(backend, plan, layer, restkv::workspace(memory));
  for (index_t h = 0; h < kv_heads; ++h) {
    CHECK(kept.lengths(0, h) == 45);
    for (position_t n = 0; n < 10; ++n) CHECK(kept.positions(0, h, n) == n);
    CHECK(kept.lengths(1, h) == 45);  // all of a sequence that fits
    CHECK(kept.positions(1, h, 0) == 15);
  }
}

TEST_CASE("a prompt that came in chunks", "[docs]") {
  const restkv_test::arranged_layer<float> made({.tokens = 120});
  const auto whole = made.view();
  const restkv::tensor_view<const float, 4> key(made.key), value(made.value);
  const auto first_keys = key.slice(2, 0, 50), last_keys = key.slice(2, 50, 70);
  const auto first_values = value.slice(2, 0, 50), last_values = value.slice(2, 50, 70);
  restkv::layer_view<float> layer;
  layer.query = whole.query;

  //! [chunks]
  // Two buffers with the first and the last tokens; the arrays must live as long as the layer is used.
  const std::array key_chunks{first_keys, last_keys};
  const std::array value_chunks{first_values, last_values};
  layer.key = {key_chunks.data(), 2};
  layer.value = {value_chunks.data(), 2};
  //! [chunks]

  restkv::reference_backend backend;
  const auto policy = restkv::presets::snap_kv(50);
  const auto of_chunks = restkv::select(backend, policy, layer);
  const auto of_whole = restkv::select(backend, policy, whole);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 50; ++i) {
      CHECK(of_chunks.kept().positions(0, h, i) == of_whole.kept().positions(0, h, i));
    }
  }
}

namespace {

//! [plan]
/// What an engine keeps for the life of a model.
template <class Backend, class Policy>
struct eviction {
  restkv::plan<Policy> plan;
  std::vector<std::byte> memory;

  restkv::status prepare(Backend& backend, const Policy& policy, const restkv::problem_shape& longest) {
    RESTKV_RETURN_IF_FAILED(restkv::make_plan(backend, policy, longest, plan));
    memory.resize(plan.workspace_bytes);
    return {};
  }

  /// Allocates nothing. `kept` is valid until the next call.
  restkv::status run(Backend& backend, const restkv::layer_view<float>& layer, restkv::kept_tokens& kept) {
    return restkv::select(backend, plan, layer, restkv::workspace(memory), kept);
  }
};
//! [plan]

}  // namespace

TEST_CASE("a plan serves every layer and every shorter prompt", "[docs]") {
  const restkv_test::arranged_layer<float> made({.tokens = 120});
  restkv::reference_backend backend;
  eviction<restkv::reference_backend, decltype(restkv::presets::snap_kv(50))> eviction;
  restkv::problem_shape longest = restkv::shape_of(made.view());
  longest.tokens = 500;
  REQUIRE(eviction.prepare(backend, restkv::presets::snap_kv(50), longest).ok());
  restkv::kept_tokens kept;
  REQUIRE(eviction.run(backend, made.view(), kept).ok());
  CHECK(kept.total() == 2 * 50);

  //! [shape]
  // A plan can be made before there is a layer. `layer` and `layers` matter to budgets that depend on depth.
  const restkv::problem_shape shape{.batch = 1,
                                    .query_heads = 32,
                                    .kv_heads = 8,
                                    .head_dim = 128,
                                    .tokens = 131072,
                                    .layer = 3,
                                    .layers = 32};
  //! [shape]
  CHECK(eviction.prepare(backend, restkv::presets::snap_kv(1024), shape).ok());
  CHECK(eviction.plan.capacity == 1024);
}

TEST_CASE("errors are values, or exceptions", "[docs]") {
  restkv::reference_backend backend;
  auto policy = restkv::presets::snap_kv(16);
  const restkv::problem_shape shape{.query_heads = 8, .kv_heads = 2, .head_dim = 64, .tokens = 4096};
  std::string log;

  //! [status]
  restkv::plan<decltype(policy)> plan;
  const restkv::status made = restkv::make_plan(backend, policy, shape, plan);
  if (!made.ok()) log = made.message();  // the budget is 16 tokens per head, 32 are protected (0 sinks, 32 recent)
  //! [status]
  CHECK(made.code() == restkv::errc::invalid_argument);
  CHECK(log == "the budget is 16 tokens per head, 32 are protected (0 sinks, 32 recent)");

  log.clear();
  //! [exceptions]
  try {
    plan = restkv::make_plan(backend, policy, shape);
  } catch (const restkv::error& problem) {
    log = problem.what();
  }
  //! [exceptions]
  CHECK(log == made.message());
}

TEST_CASE("compaction to dense tensors", "[docs]") {
  made_selection made;
  auto& [layer, backend, memory, kept] = made;
  const auto key = layer.view().key;
  const auto value = layer.view().value;
  std::vector<float> key_memory(2 * 2 * 40 * 8), value_memory(key_memory.size());
  float* const new_keys = key_memory.data();
  float* const new_values = value_memory.data();

  //! [dense]
  // Every head gets `capacity` slots; what lies behind a head's length is left alone.
  const index_t capacity = kept.capacity();
  const std::array<index_t, 4> extents{kept.batch(), kept.heads(), capacity, 8};
  restkv::compact(backend, kept, key, value,
                  restkv::dense_layout<float>{{new_keys, extents}},
                  restkv::dense_layout<float>{{new_values, extents}});
  //! [dense]
  CHECK(capacity == 40);
  const restkv::tensor_view<float, 4> dense(new_keys, extents);
  CHECK(dense(1, 0, 3, 5) == layer.key(1, 0, kept.positions(1, 0, 3), 5));
}

TEST_CASE("compaction to ragged buffers", "[docs]") {
  made_selection made;
  auto& [layer, backend, memory, kept] = made;
  const auto key = layer.view().key;
  const auto value = layer.view().value;
  const index_t head_dim = 8;

  //! [ragged]
  // All heads' tokens behind each other, as variable-length attention kernels take them.
  const index_t rows = kept.batch() * kept.heads();
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(rows + 1));  // cu_seqlens
  const restkv::tensor_view<std::int64_t, 1> ends(offsets.data(), {rows + 1});
  restkv::throw_if_failed(restkv::ragged_offsets(kept, ends));
  std::vector<float> keys(static_cast<std::size_t>(kept.total() * head_dim)), values(keys.size());
  const auto ragged = [&](std::vector<float>& buffer) {
    return restkv::ragged_layout<float>{{buffer.data(), {kept.total(), head_dim}}, ends, kept.batch(), kept.heads()};
  };
  restkv::compact(backend, kept, key, value, ragged(keys), ragged(values));
  //! [ragged]
  CHECK(offsets.back() == kept.total());
  CHECK(keys[static_cast<std::size_t>((offsets[3] + 2) * head_dim + 1)] == layer.key(1, 1, kept.positions(1, 1, 2), 1));
}

TEST_CASE("compaction in place, scales beside the cache, new positions", "[docs]") {
  made_selection made;
  auto& [layer, backend, memory, kept] = made;
  const restkv::tensor_view<float, 4> key = layer.key, value = layer.value;
  const float before = key(1, 1, kept.positions(1, 1, 4), 2);
  const float first = key(1, 1, kept.positions(1, 1, 4), 0), fifth = key(1, 1, kept.positions(1, 1, 4), 4);
  std::vector<float> scales_memory(2 * 2 * 90);
  for (std::size_t i = 0; i < scales_memory.size(); ++i) scales_memory[i] = static_cast<float>(i);
  const restkv::tensor_view<const float, 3> scales(scales_memory.data(), {2, 2, 90});
  std::vector<float> kept_scales_memory(2 * 2 * 40);
  const restkv::tensor_view<float, 3> kept_scales(kept_scales_memory.data(), {2, 2, 40});

  //! [side_arrays]
  // One scale per token and head of a quantised cache: it goes where its token goes.
  restkv::throw_if_failed(restkv::gather_tokens(kept, scales, kept_scales));
  //! [side_arrays]
  CHECK(kept_scales(1, 1, 4) == scales(1, 1, kept.positions(1, 1, 4)));

  //! [in_place]
  // The kept tokens move to the front of their heads; what lies behind them is left over.
  restkv::compact_in_place(backend, kept, key, value);
  //! [in_place]
  CHECK(key(1, 1, 4, 2) == before);

  //! [rope]
  // Once per model:
  std::vector<double> frequencies(4);  // rotary_dim / 2
  const restkv::rope_parameters<restkv::llama3_rope> rope{.rotary_dim = 8, .theta = 500000.0, .scaling = {.factor = 8}};
  restkv::throw_if_failed(restkv::rope_frequencies(rope, frequencies));
  // After compaction, for engines that number a cache's tokens by their slots:
  restkv::throw_if_failed(restkv::rotate_keys(kept, key, frequencies));
  //! [rope]
  const double angle = (4.0 - kept.positions(1, 1, 4)) * frequencies[0];
  CHECK(key(1, 1, 4, 0) == Approx(first * std::cos(angle) - fifth * std::sin(angle)).margin(1e-5));
}
