// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/engines.md, compiled and run.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"

#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_gather.hpp>
#include <restkv/cache/paged_sequence.hpp>
#include <restkv/cache/quantise.hpp>
#include <restkv/cache/quantised_gather.hpp>
#include <restkv/cache/rope.hpp>
#include <restkv/cache/split_kept.hpp>
#include <restkv/compact.hpp>
#include <restkv/interop/page_tables.hpp>
#include <restkv/interop/page_tensors.hpp>
#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/select.hpp>

#include <algorithm>
#include <array>
#include <cmath>
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

namespace {

/// A pool of pages with one sequence whose tokens lie in pages in reverse, and the same layer in one piece.
struct paged_layer {
  static constexpr index_t page_size = 16, pages = 12, most_pages = 8, tokens = 90;
  restkv_test::arranged_layer<float> whole;
  std::vector<float> key_memory, value_memory;
  restkv::tensor_view<float, 4> key_pages, value_pages;
  std::vector<std::byte> pool_memory = std::vector<std::byte>(restkv::page_pool::required_bytes(pages));
  restkv::page_pool pool;
  std::vector<restkv::page_t> ids = std::vector<restkv::page_t>(most_pages, restkv::no_page);
  std::vector<position_t> lengths{0};
  restkv::page_tables tables{{ids.data(), {1, 1, most_pages}}, {lengths.data(), {1, 1}}};

  paged_layer()
      : whole({.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = tokens}),
        key_memory(pages * 2 * page_size * 8),
        value_memory(key_memory.size()),
        key_pages(key_memory.data(), {pages, 2, page_size, 8}),
        value_pages(value_memory.data(), {pages, 2, page_size, 8}) {
    REQUIRE(pool.reset(pages, restkv::workspace(pool_memory)).ok());
    REQUIRE(restkv::extend_sequence(pool, tables, 0, tokens, key_pages, value_pages).ok());
    std::reverse(ids.begin(), ids.begin() + 6);
    const restkv::paged_layout<float> key{key_pages, tables}, value{value_pages, tables};
    for (index_t h = 0; h < 2; ++h) {
      for (index_t n = 0; n < tokens; ++n) {
        for (index_t c = 0; c < 8; ++c) {
          key.row(0, h, n)(c) = whole.key(0, h, n, c);
          value.row(0, h, n)(c) = whole.value(0, h, n, c);
        }
      }
    }
  }
};

template <class Kept, class Other>
void check_same_kept(const Kept& kept, const Other& other) {
  REQUIRE(kept.heads() == other.heads());
  for (index_t h = 0; h < kept.heads(); ++h) {
    REQUIRE(kept.lengths(0, h) == other.lengths(0, h));
    for (index_t i = 0; i < kept.lengths(0, h); ++i) CHECK(kept.positions(0, h, i) == other.positions(0, h, i));
  }
}

}  // namespace

TEST_CASE("a cache in pages", "[docs]") {
  paged_layer engine;
  auto& [whole, key_memory, value_memory, key_pages, value_pages, pool_memory, pool, ids, lengths, tables] = engine;
  const index_t most_pages = engine.most_pages;
  const auto queries = whole.view().query;
  restkv::reference_backend backend;
  const auto policy = restkv::presets::snap_kv(40);
  const auto of_whole = restkv::select(backend, policy, whole.view());

  //! [page_chunks]
  // `tables` has the ids and the length of one sequence, [1, 1, most_pages] and [1, 1].
  const restkv::paged_layout<const float> key{key_pages, tables}, value{value_pages, tables};
  std::vector<restkv::tensor_view<const float, 4>> key_chunks(most_pages), value_chunks(most_pages);  // once
  restkv::layer_view<float> layer;
  layer.query = queries;
  restkv::throw_if_failed(restkv::page_chunks(key, 0, 0, key_chunks, layer.key));
  restkv::throw_if_failed(restkv::page_chunks(value, 0, 0, value_chunks, layer.value));
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer));
  std::vector<std::byte> memory(plan.workspace_bytes);
  const auto kept = restkv::select(backend, plan, layer, restkv::workspace(memory));
  //! [page_chunks]
  check_same_kept(kept, of_whole.kept());

  //! [compact_pages]
  // Keys, values and whatever else lies in pages of the same tables. The pool has taken `moves.freed` back.
  std::vector<std::byte> page_memory(restkv::page_moves_bytes(tables));  // once
  restkv::page_moves moves;
  restkv::throw_if_failed(restkv::compact_pages(pool, kept, tables, restkv::workspace(page_memory), moves,
                                                key_pages, value_pages));
  //! [compact_pages]
  CHECK(lengths[0] == 40);
  CHECK(moves.freed.size() == 3);
  CHECK(pool.available() == 12 - 3);
  for (index_t i = 0; i < 40; ++i) CHECK(value.row(0, 1, i)(3) == whole.value(0, 1, kept.positions(0, 1, i), 3));
}

TEST_CASE("a policy that keeps whole pages moves no token", "[docs]") {
  paged_layer engine;
  const restkv::paged_layout<const float> key{engine.key_pages, engine.tables}, value{engine.value_pages, engine.tables};
  std::vector<restkv::tensor_view<const float, 4>> key_chunks(8), value_chunks(8);
  restkv::layer_view<float> layer;
  layer.query = engine.whole.view().query;
  REQUIRE(restkv::page_chunks(key, 0, 0, key_chunks, layer.key).ok());
  REQUIRE(restkv::page_chunks(value, 0, 0, value_chunks, layer.value).ok());
  auto policy = restkv::presets::snap_kv(60);
  policy.granularity = {.tokens = 16, .shared = true};
  restkv::reference_backend backend;
  const auto selected = restkv::select(backend, policy, layer);
  const auto keys = engine.key_memory;
  std::vector<std::byte> memory(restkv::page_moves_bytes(engine.tables));
  restkv::page_moves moves;
  REQUIRE(restkv::compact_pages(engine.pool, selected.kept(), engine.tables, restkv::workspace(memory), moves,
                                engine.key_pages, engine.value_pages)
              .ok());
  CHECK(engine.lengths[0] < 60);
  CHECK(moves.freed.size() == static_cast<std::size_t>(6 - restkv::pages_of(engine.lengths[0], 16)));
  CHECK(moves.freed.size() >= 2);
  CHECK(engine.key_memory == keys);
}

TEST_CASE("tables for each head, copied out of their pages", "[docs]") {
  // Two heads with 60 and 90 tokens in pages of one head.
  const restkv_test::arranged_layer<float> made({.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 90});
  std::vector<restkv::page_t> ids(2 * 6, restkv::no_page);
  const std::vector<position_t> lengths{60, 90};
  for (std::size_t i = 0; i < 4; ++i) ids[i] = static_cast<restkv::page_t>(9 - 2 * i);
  for (std::size_t i = 0; i < 6; ++i) ids[6 + i] = static_cast<restkv::page_t>(i < 5 ? 2 * i : 1);
  const restkv::const_page_tables tables({ids.data(), {1, 2, 6}}, {lengths.data(), {1, 2}});
  std::vector<float> key_memory(10 * 16 * 8), value_memory(key_memory.size());
  const restkv::tensor_view<float, 4> key_pages(key_memory.data(), {10, 1, 16, 8});
  const restkv::tensor_view<float, 4> value_pages(value_memory.data(), {10, 1, 16, 8});
  const restkv::paged_layout<float> key{key_pages, tables}, value{value_pages, tables};
  REQUIRE(key.check().ok());
  for (index_t h = 0; h < 2; ++h) {
    for (index_t n = 0; n < key.length(0, h); ++n) {
      for (index_t c = 0; c < 8; ++c) {
        key.row(0, h, n)(c) = made.key(0, h, n, c);
        value.row(0, h, n)(c) = made.value(0, h, n, c);
      }
    }
  }
  const index_t kv_heads = 2, longest = 90, head_dim = 8;
  std::vector<float> scratch(2 * kv_heads * longest * head_dim);
  const auto queries = made.view().query;

  //! [copy_pages]
  // A table for each KV head; heads have different numbers of tokens. `scratch` serves all layers.
  const std::array<index_t, 4> extents{1, kv_heads, longest, head_dim};
  const restkv::tensor_view<float, 4> keys(scratch.data(), extents);
  const restkv::tensor_view<float, 4> values(scratch.data() + keys.size(), extents);
  restkv::throw_if_failed(restkv::copy_pages(key, keys));
  restkv::throw_if_failed(restkv::copy_pages(value, values));
  restkv::layer_view<float> layer;
  layer.query = queries;
  layer.key = keys;
  layer.value = values;
  layer.head_lengths = tables.lengths;
  layer.pad = restkv::padding::right;
  //! [copy_pages]

  restkv::reference_backend backend;
  const auto selected = restkv::select(backend, restkv::presets::snap_kv(40), layer);
  CHECK(selected.kept().lengths(0, 0) == 40);
  CHECK(selected.kept().lengths(0, 1) == 40);
  CHECK(selected.kept().positions(0, 0, 39) == 59);
  CHECK(selected.kept().positions(0, 1, 39) == 89);
}

namespace {

/// An engine's own block manager, for the documentation.
struct block_manager {
  std::vector<int> reference_counts = std::vector<int>(8, 0);
  std::vector<int> free_blocks{7, 6, 5, 4, 3, 2, 1, 0};
};

//! [page_allocator]
/// A `page_allocator` over a block manager.
struct engine_pages {
  block_manager& blocks;

  index_t pages() const { return static_cast<index_t>(blocks.reference_counts.size()); }
  index_t available() const { return static_cast<index_t>(blocks.free_blocks.size()); }
  index_t references(restkv::page_t page) const { return blocks.reference_counts[static_cast<std::size_t>(page)]; }
  restkv::status allocate(restkv::page_t& page) {
    if (blocks.free_blocks.empty()) {
      return restkv::status::error(restkv::errc::workspace_too_small, "all %d blocks are in use",
                                   static_cast<int>(pages()));
    }
    page = blocks.free_blocks.back();
    blocks.free_blocks.pop_back();
    return share(page);
  }
  restkv::status share(restkv::page_t page) {
    ++blocks.reference_counts[static_cast<std::size_t>(page)];
    return {};
  }
  restkv::status release(restkv::page_t page, bool& freed) {
    freed = --blocks.reference_counts[static_cast<std::size_t>(page)] == 0;
    if (freed) blocks.free_blocks.push_back(page);
    return {};
  }
};
//! [page_allocator]
static_assert(restkv::page_allocator<engine_pages>);

}  // namespace

TEST_CASE("pages of an engine's own block manager", "[docs]") {
  block_manager blocks;
  engine_pages pages{blocks};
  std::vector<restkv::page_t> ids(2 * 3, restkv::no_page);
  std::vector<position_t> lengths{0, 0};
  const restkv::page_tables tables({ids.data(), {2, 1, 3}}, {lengths.data(), {2, 1}});
  std::vector<float> memory(8 * 4);
  const restkv::tensor_view<float, 4> pool(memory.data(), {8, 1, 4, 1});
  REQUIRE(restkv::extend_sequence(pages, tables, 0, 10, pool).ok());
  for (index_t n = 0; n < 10; ++n) pool(ids[static_cast<std::size_t>(n / 4)], 0, n % 4, 0) = static_cast<float>(n);
  REQUIRE(restkv::fork_sequence(pages, tables, 4, 0, 1).ok());
  const std::vector<position_t> positions{0, 1, 2, 3, 5, 9}, kept_lengths{6};
  const restkv::const_kept_tokens kept({positions.data(), {1, 1, 6}}, {kept_lengths.data(), {1, 1}});
  std::vector<std::byte> plan_memory(restkv::page_moves_bytes(tables));
  restkv::page_moves moves;
  REQUIRE(restkv::compact_pages(pages, kept, tables.sequence(1), restkv::workspace(plan_memory), moves, pool).ok());
  CHECK(ids[3] == ids[0]);  // the first page is still shared
  CHECK(ids[4] != ids[1]);
  CHECK(blocks.reference_counts == std::vector<int>{2, 1, 1, 1, 0, 0, 0, 0});
  CHECK(pool(ids[4], 0, 1, 0) == 9.0f);
  CHECK(pool(ids[1], 0, 1, 0) == 5.0f);
  REQUIRE(restkv::release_sequence(pages, tables, 4, 0).ok());
  REQUIRE(restkv::release_sequence(pages, tables, 4, 1).ok());
  CHECK(pages.available() == 8);
}

TEST_CASE("a quantised cache, scored and compacted", "[docs]") {
  const index_t tokens = 160, quantised = 128, kv_heads = 2, head_dim = 8;
  const restkv_test::arranged_layer<float> made(
      {.query_heads = 4, .kv_heads = kv_heads, .head_dim = head_dim, .tokens = tokens});
  const auto all = made.view();
  const auto old_keys = restkv::tensor_view<const float, 4>(made.key).slice(2, 0, quantised);
  const auto new_keys = restkv::tensor_view<const float, 4>(made.key).slice(2, quantised, tokens - quantised);
  std::vector<std::uint8_t> code_memory(static_cast<std::size_t>(kv_heads * quantised * head_dim / 2));
  std::vector<half> scale_memory(static_cast<std::size_t>(kv_heads * 4 * head_dim)), offset_memory(scale_memory.size());
  std::uint8_t* const codes = code_memory.data();
  half* const scales = scale_memory.data();
  half* const offsets = offset_memory.data();

  //! [quantise]
  // Keys of 4 bits; each channel has a scale and an offset for every 32 tokens.
  const restkv::quantised_view<half> keys{.codes = {codes, {1, kv_heads, quantised, head_dim / 2}},
                                          .scale = {scales, {1, kv_heads, quantised / 32, head_dim}},
                                          .offset = {offsets, {1, kv_heads, quantised / 32, head_dim}},
                                          .tokens = quantised,
                                          .channels = head_dim,
                                          .tokens_per_group = 32,
                                          .channels_per_group = 1,
                                          .format = {.bits = 4, .is_signed = false}};
  restkv::throw_if_failed(restkv::quantise(old_keys, keys));  // or the codes that you have
  //! [quantise]

  restkv::layer_view<float> layer;
  layer.query = all.query;
  layer.value = all.value;
  //! [dequantise]
  restkv::workspace counted;
  restkv::tensor_view<float, 4> numbers;
  restkv::throw_if_failed(restkv::dequantise(keys, counted, numbers));  // counts only
  std::vector<std::byte> memory(counted.required_bytes());              // once, for all layers
  restkv::workspace scratch(memory);
  restkv::throw_if_failed(restkv::dequantise(keys, scratch, numbers));
  const std::array<restkv::tensor_view<const float, 4>, 2> key_chunks{numbers, new_keys};
  layer.key = {key_chunks.data(), 2};
  //! [dequantise]
  for (index_t n = 0; n < quantised; ++n) {
    CHECK(std::abs(numbers(0, 1, n, 3) - made.key(0, 1, n, 3)) <
          0.51f * static_cast<float>(keys.scale(0, 1, n / 32, 3)) + 0.01f);
  }

  restkv::reference_backend backend;
  const auto selected = restkv::select(backend, restkv::presets::snap_kv(70), layer);
  const restkv::const_kept_tokens kept = selected.kept();
  const index_t capacity = kept.capacity();
  std::vector<position_t> front_memory(static_cast<std::size_t>(kv_heads * capacity)), back_memory(front_memory.size());
  std::vector<position_t> front_lengths(kv_heads), back_lengths(kv_heads);
  const restkv::kept_tokens front({front_memory.data(), {1, kv_heads, capacity}},
                                  {front_lengths.data(), {1, kv_heads}});
  const restkv::kept_tokens back({back_memory.data(), {1, kv_heads, capacity}}, {back_lengths.data(), {1, kv_heads}});
  std::vector<float> new_memory(static_cast<std::size_t>(kv_heads * 32 * head_dim));
  const restkv::dense_layout<float> kept_new_keys{{new_memory.data(), {1, kv_heads, 32, head_dim}}};
  const float before = numbers(0, 1, kept.positions(0, 1, 0), 3);

  //! [gather_quantised]
  // Kept tokens of the quantised part, and of the newest tokens behind it.
  restkv::throw_if_failed(restkv::split_kept(kept, quantised, front, back));
  restkv::throw_if_failed(restkv::compact_in_place(front, keys));  // or gather_tokens(front, keys, other_keys)
  restkv::throw_if_failed(restkv::gather_tokens(back, new_keys, kept_new_keys));
  //! [gather_quantised]
  CHECK(front_lengths[1] + back_lengths[1] == 70);
  CHECK(back_lengths[1] == 32);
  CHECK(std::abs(keys.value(0, 1, 0, 3) - before) <= 0.51f * static_cast<float>(keys.scale(0, 1, 0, 3)) + 0.01f);
  CHECK(kept_new_keys.rows(0, 1, 31, 5) == made.key(0, 1, tokens - 1, 5));
}

TEST_CASE("page tables of other engines", "[docs]") {
  // Two sequences of 6 and 3 tokens in pages of 4.
  const index_t page_size = 4, pages = 5, kv_heads = 2, head_dim = 8;
  std::vector<restkv::page_t> kv_indptr{0, 2, 3}, kv_indices{4, 1, 2}, kv_last_page_len{2, 3};
  std::vector<half> cache = cache_of<half>(pages * 2 * page_size * kv_heads * head_dim, 3);
  half* const cache_data = cache.data();
  const half expected = cache[static_cast<std::size_t>(((1 * 2 + 1) * page_size + 1) * kv_heads * head_dim)];
  const auto view = [](std::vector<restkv::page_t>& array) {
    return restkv::tensor_view<restkv::page_t, 1>(array.data(), {static_cast<index_t>(array.size())});
  };
  std::vector<std::byte> pool_memory(restkv::page_pool::required_bytes(pages));
  restkv::page_pool pool;
  REQUIRE(pool.reset(pages, restkv::workspace(pool_memory)).ok());
  for (int taken = 0; taken < pages; ++taken) {
    restkv::page_t page = restkv::no_page;
    REQUIRE(pool.allocate(page).ok());
  }
  const std::vector<position_t> positions{0, 4, 5, 0, 4, 5, 0, 1, 2, 0, 1, 2}, kept_lengths{3, 3, 3, 3};
  const restkv::const_kept_tokens kept({positions.data(), {2, 2, 3}}, {kept_lengths.data(), {2, 2}});

  //! [engine_tables]
  // FlashInfer's arrays, as tables; what is wrong with them is said before anything is moved.
  const index_t batch = 2, most_pages = 2;
  const restkv::page_lists lists(view(kv_indptr), view(kv_indices), view(kv_last_page_len));
  std::vector<restkv::page_t> ids(batch * most_pages);
  std::vector<position_t> lengths(batch);
  const restkv::page_tables tables({ids.data(), {batch, 1, most_pages}}, {lengths.data(), {batch, 1}});
  restkv::throw_if_failed(restkv::read_page_lists(lists, pages, page_size, tables));

  // Its cache, NHD: [pages, 2, page_size, kv_heads, head_dim].
  restkv::page_pair<half> cached;
  restkv::throw_if_failed(restkv::key_value_pages(
      restkv::tensor_view<half, 5>(cache_data, {pages, 2, page_size, kv_heads, head_dim}), 1,
      restkv::page_order::nhd, cached));

  // Afterwards the same arrays say where the kept tokens are.
  std::vector<std::byte> memory(restkv::page_moves_bytes(tables));
  restkv::page_moves moves;
  restkv::throw_if_failed(restkv::compact_pages(pool, kept, tables, restkv::workspace(memory), moves, cached.key,
                                                cached.value));
  restkv::throw_if_failed(restkv::write_page_lists(tables, pages, page_size, lists));
  //! [engine_tables]
  CHECK(kv_indptr == std::vector<restkv::page_t>{0, 1, 2});
  CHECK(kv_indices[0] == 4);
  CHECK(kv_last_page_len == std::vector<restkv::page_t>{3, 3});
  CHECK(cached.value(4, 0, 2, 0).bits() == expected.bits());
  REQUIRE(moves.freed.size() == 1);
  CHECK(moves.freed[0] == 1);
}
