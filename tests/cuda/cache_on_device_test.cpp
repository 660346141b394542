// SPDX-License-Identifier: Apache-2.0
// Compaction on the GPU is the CPU's, bit by bit, and so are the running scores of a decode loop.
#include "cuda/cache_on_device.hpp"
#include "cache/cache_support.hpp"
#include "support/catch.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/cache/compact.hpp>
#include <restkv/cache/rope.hpp>

using namespace restkv_test;
using namespace restkv;

namespace {

using bits = std::vector<std::uint16_t>;

/// A kept set that lies densely, as it is copied to the device.
struct dense_kept {
  std::vector<position_t> positions;
  std::vector<position_t> lengths;
  const_kept_tokens kept;

  dense_kept(random_engine& random, index_t batch, index_t heads, index_t tokens, index_t capacity) {
    const random_kept made(random, batch, heads, tokens, capacity);
    for_each(made.read().positions, [&](position_t n) { positions.push_back(n); });
    for_each(made.read().lengths, [&](position_t n) { lengths.push_back(n); });
    kept = {{positions.data(), {batch, heads, capacity}}, {lengths.data(), {batch, heads}}};
  }
};

bits random_bits(random_engine& random, index_t count) {
  bits made(static_cast<std::size_t>(count));
  for (auto& element : made) element = static_cast<std::uint16_t>(random());
  return made;
}

/// Tables [batch, heads] of a pool, each page of it in one of them.
struct tables_of_heads {
  std::vector<page_t> ids;
  std::vector<position_t> lengths;
  const_page_tables tables;
  compaction_options options;

  tables_of_heads(random_engine& random, index_t batch, index_t heads, index_t tokens, index_t page_size)
      : ids(static_cast<std::size_t>(batch * heads * pages_of(tokens, page_size))),
        lengths(static_cast<std::size_t>(batch * heads), static_cast<position_t>(tokens)) {
    std::iota(ids.begin(), ids.end(), page_t{0});
    std::shuffle(ids.begin(), ids.end(), random);
    tables = {{ids.data(), {batch, heads, pages_of(tokens, page_size)}}, {lengths.data(), {batch, heads}}};
    options = {.tables = tables, .pages = static_cast<index_t>(ids.size()), .page_size = page_size};
  }
  template <class T>
  [[nodiscard]] paged_layout<T> layout(T* pool, index_t channels) const {
    return {tensor_view<T, 4>(pool, {options.pages, 1, options.page_size, channels}), tables};
  }
};

/// Bit patterns of bfloat16 that are a rounding apart count as equal: sines on the device are those of its library.
index_t different_numbers(const bits& found, const bits& wanted) {
  index_t differences = found.size() == wanted.size() ? 0 : 1;
  for (std::size_t i = 0; i < std::min(found.size(), wanted.size()); ++i) {
    differences += std::abs(int{found[i]} - int{wanted[i]}) <= 1 ? 0 : 1;
  }
  return differences;
}

}  // namespace

TEST_CASE("the device compacts as the CPU does") {
  if (!has_device()) SKIP("no GPU was found");
  random_engine random(41);
  for (int turn = 0; turn < 40; ++turn) {
    const index_t batch = pick(random, 1, 3);
    const index_t heads = pick(random, 1, 8);
    const index_t tokens = pick(random, 1, 3000);
    const index_t capacity = pick(random, 1, tokens);
    const index_t channels = turn % 2 == 0 ? 128 : pick(random, 1, 70);
    CAPTURE(turn, batch, heads, tokens, capacity, channels);
    const bits key = random_bits(random, batch * heads * tokens * channels);
    const bits value = random_bits(random, batch * heads * tokens * channels);
    const dense_kept chosen(random, batch, heads, tokens, capacity);
    const const_kept_tokens& kept = chosen.kept;
    const std::array<index_t, 4> extents{batch, heads, tokens, channels};
    const tensor_view<const std::uint16_t, 4> key_view(key.data(), extents);
    const tensor_view<const std::uint16_t, 4> value_view(value.data(), extents);
    bits wanted_key(static_cast<std::size_t>(batch * heads * capacity * channels), 0xabcd);
    bits wanted_value(wanted_key);
    const std::array<index_t, 4> dense{batch, heads, capacity, channels};
    REQUIRE(compact(kept, key_view, value_view, dense_layout{tensor_view<std::uint16_t, 4>(wanted_key.data(), dense)},
                    dense_layout{tensor_view<std::uint16_t, 4>(wanted_value.data(), dense)})
                .ok());

    const compacted by_rows = compact_on_device(compaction::dense, kept, key_view, value_view);
    INFO(by_rows.result.message());
    REQUIRE(by_rows.result.ok());
    CHECK(by_rows.key == wanted_key);
    CHECK(by_rows.value == wanted_value);

    const compacted ragged = compact_on_device(compaction::ragged, kept, key_view, value_view);
    REQUIRE(ragged.result.ok());
    const compacted moved = compact_on_device(compaction::in_place, kept, key_view, value_view);
    REQUIRE(moved.result.ok());
    index_t differences = 0;
    index_t begin = 0;
    for (index_t row = 0; row < batch * heads; ++row) {
      const index_t length = chosen.lengths[static_cast<std::size_t>(row)];
      CHECK(ragged.offsets[static_cast<std::size_t>(row)] == begin);
      for (index_t i = 0; i < length * channels; ++i) {
        const auto at = [](const bits& values, index_t n) { return values[static_cast<std::size_t>(n)]; };
        const index_t in_dense = row * capacity * channels + i;
        differences += at(ragged.key, begin * channels + i) == at(wanted_key, in_dense) ? 0 : 1;
        differences += at(ragged.value, begin * channels + i) == at(wanted_value, in_dense) ? 0 : 1;
        differences += at(moved.key, row * tokens * channels + i) == at(wanted_key, in_dense) ? 0 : 1;
        differences += at(moved.value, row * tokens * channels + i) == at(wanted_value, in_dense) ? 0 : 1;
      }
      begin += length;
    }
    CHECK(ragged.offsets.back() == begin);
    CHECK(differences == 0);
  }
}

TEST_CASE("the device compacts to pages and within pages as the CPU does") {
  if (!has_device()) SKIP("no GPU was found");
  random_engine random(42);
  for (int turn = 0; turn < 20; ++turn) {
    const index_t batch = pick(random, 1, 3);
    const index_t heads = pick(random, 1, 6);
    const index_t tokens = pick(random, 1, 1500);
    const index_t capacity = pick(random, 1, tokens);
    const index_t channels = turn % 2 == 0 ? 128 : pick(random, 1, 70);
    const index_t page_size = pick(random, 1, 40);
    CAPTURE(turn, batch, heads, tokens, capacity, channels, page_size);
    const dense_kept chosen(random, batch, heads, tokens, capacity);
    const const_kept_tokens& kept = chosen.kept;
    const bits key = random_bits(random, batch * heads * tokens * channels);
    const bits value = random_bits(random, batch * heads * tokens * channels);
    const std::array<index_t, 4> extents{batch, heads, tokens, channels};
    const tensor_view<const std::uint16_t, 4> key_view(key.data(), extents);
    const tensor_view<const std::uint16_t, 4> value_view(value.data(), extents);
    const tables_of_heads to(random, batch, heads, capacity, page_size);
    bits wanted_key(static_cast<std::size_t>(to.options.pages * page_size * channels), 0xabcd);
    bits wanted_value(wanted_key);
    REQUIRE(compact(kept, key_view, value_view, to.layout(wanted_key.data(), channels),
                    to.layout(wanted_value.data(), channels))
                .ok());
    const compacted paged = compact_on_device(compaction::paged, kept, key_view, value_view, to.options);
    INFO(paged.result.message());
    REQUIRE(paged.result.ok());
    CHECK(paged.key == wanted_key);
    CHECK(paged.value == wanted_value);
    CHECK(paged.lengths == chosen.lengths);

    const tables_of_heads of_cache(random, batch, heads, tokens, page_size);
    const bits key_pool = random_bits(random, of_cache.options.pages * page_size * channels);
    const bits value_pool = random_bits(random, of_cache.options.pages * page_size * channels);
    bits moved_key(key_pool);
    bits moved_value(value_pool);
    for (bits* pool : {&moved_key, &moved_value}) {
      const auto layout = of_cache.layout(pool->data(), channels);
      for (index_t b = 0; b < batch; ++b) {
        for (index_t h = 0; h < heads; ++h) {
          for (index_t i = 0; i < kept.lengths(b, h); ++i) {
            std::copy_n(layout.row(b, h, kept.positions(b, h, i)).data, channels, layout.row(b, h, i).data);
          }
        }
      }
    }
    const std::array<index_t, 4> pool{of_cache.options.pages, 1, page_size, channels};
    const compacted moved = compact_on_device(compaction::in_pages, kept, {key_pool.data(), pool},
                                              {value_pool.data(), pool}, of_cache.options);
    INFO(moved.result.message());
    REQUIRE(moved.result.ok());
    CHECK(moved.key == moved_key);
    CHECK(moved.value == moved_value);
    CHECK(moved.lengths == paged.lengths);
  }
}

TEST_CASE("the device turns keys while it compacts them") {
  if (!has_device()) SKIP("no GPU was found");
  random_engine random(43);
  const index_t batch = 2;
  const index_t heads = 4;
  const index_t tokens = 3000;
  const index_t capacity = 700;
  const index_t channels = 128;
  std::vector<double> frequencies(channels / 2);
  REQUIRE(
      rope_frequencies(rope_parameters<>{.rotary_dim = channels, .theta = 5e5}, std::span<double>(frequencies)).ok());
  const dense_kept chosen(random, batch, heads, tokens, capacity);
  const const_kept_tokens& kept = chosen.kept;
  std::vector<bfloat16> key(static_cast<std::size_t>(batch * heads * tokens * channels));
  for (bfloat16& x : key) x = narrow<bfloat16>(normal(random));
  const std::array<index_t, 4> extents{batch, heads, tokens, channels};
  const tensor_view<const std::uint16_t, 4> key_view(reinterpret_cast<const std::uint16_t*>(key.data()), extents);
  const index_t slots = batch * heads * capacity;
  const bits unset(static_cast<std::size_t>(slots * channels), 0xabcd);
  const auto wanted_of = [&](const auto& layout_of, index_t places) {
    bits wanted(static_cast<std::size_t>(places * channels), 0xabcd);
    const auto layout = layout_of(reinterpret_cast<bfloat16*>(wanted.data()));
    REQUIRE(gather_tokens(kept, tensor_view<const bfloat16, 4>(key.data(), extents), layout).ok());
    REQUIRE(rotate_keys(kept, layout, frequencies).ok());
    return wanted;
  };
  const auto found = [&](compaction how, compaction_options options) {
    options.frequencies = frequencies;
    const compacted made = compact_on_device(how, kept, key_view, key_view, options);
    INFO(made.result.message());
    REQUIRE(made.result.ok());
    return made.key;
  };
  const bits dense =
      wanted_of([&](bfloat16* to) { return dense_layout<bfloat16>{{to, {batch, heads, capacity, channels}}}; }, slots);
  CHECK(different_numbers(found(compaction::dense, {}), dense) == 0);
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(batch * heads + 1));
  const tensor_view<std::int64_t, 1> starts(offsets.data(), {batch * heads + 1});
  REQUIRE(ragged_offsets(kept, starts).ok());
  const bits ragged = wanted_of(
      [&](bfloat16* to) { return ragged_layout<bfloat16>{{to, {slots, channels}}, starts, batch, heads}; }, slots);
  CHECK(different_numbers(found(compaction::ragged, {}), ragged) == 0);
  const tables_of_heads pages(random, batch, heads, capacity, 16);
  const bits paged = wanted_of([&](bfloat16* to) { return pages.layout(to, channels); }, pages.options.pages * 16);
  CHECK(different_numbers(found(compaction::paged, pages.options), paged) == 0);

  const bits moved = found(compaction::in_place, {});
  index_t differences = 0;
  for (index_t row = 0; row < batch * heads; ++row) {
    const index_t length = kept.lengths(row / heads, row % heads);
    const auto part = [&](const bits& from, index_t first) {
      return bits(from.begin() + first, from.begin() + first + length * channels);
    };
    differences += different_numbers(part(moved, row * tokens * channels), part(dense, row * capacity * channels));
  }
  CHECK(differences == 0);
}

namespace {

/// The memory of a `decode_loop` on the host.
struct host_decode_memory {
  static constexpr memory_space space = memory_space::host;
  template <class T>
  using buffer = std::vector<T>;

  static host_kernel_backend backend() { return host_kernel_backend(std::uint64_t{1}); }
  template <class T>
  static status put(std::vector<T>& memory, std::span<const T> values) {
    memory.assign(values.begin(), values.end());
    return {};
  }
  template <class T>
  static status get(const std::vector<T>& memory, std::vector<T>& values) {
    values = memory;
    return {};
  }
};

}  // namespace

TEST_CASE("a decode loop on the device leaves what it leaves on the host") {
  if (!has_device()) SKIP("no GPU was found");
  random_engine random(44);
  decode_policy policy;
  policy.policy.budget.budget = 300;
  policy.policy.group = group_reduce::mean;
  policy.policy.protect = {.sink = 4, .recent = 32};
  policy.policy.window = 1;
  policy.high_water = 400;
  policy.attention_rows = true;
  const problem_shape shape{.batch = 2, .query_heads = 8, .kv_heads = 2, .head_dim = 64};
  decode_input input;
  input.steps = 900;
  const auto fill = [&](std::vector<float>& values, index_t size) {
    values.resize(static_cast<std::size_t>(input.steps * size));
    for (float& x : values) x = static_cast<float>(pick(random, 0, 64)) / 64.0f;  // sums are exact, and tie
  };
  fill(input.keys, shape.batch * shape.kv_heads * shape.head_dim);
  fill(input.values, shape.batch * shape.kv_heads * shape.head_dim);
  fill(input.attention, shape.batch * shape.query_heads * policy.high_water);
  const decoded wanted = decode_loop<host_decode_memory>(policy, shape, input);
  INFO(wanted.result.message());
  REQUIRE(wanted.result.ok());
  CHECK(wanted.evictions > 4);
  CHECK(wanted.guards_hold);
  const decoded found = decode_on_device(policy, shape, input);
  INFO(found.result.message());
  REQUIRE(found.result.ok());
  CHECK(found.evictions == wanted.evictions);
  CHECK(found.guards_hold);
  CHECK(found.lengths == wanted.lengths);
  const index_t capacity = policy.high_water;
  index_t differences = 0;
  const auto compare = [&](const auto& a, const auto& b, index_t heads, index_t channels) {
    for (index_t row = 0; row < shape.batch * heads; ++row) {
      const index_t kv_row = row / (heads / shape.kv_heads);
      const index_t first = row * capacity * channels;
      const index_t count = wanted.lengths[static_cast<std::size_t>(kv_row)] * channels;
      differences += std::equal(a.begin() + first, a.begin() + first + count, b.begin() + first) ? 0 : 1;
    }
  };
  REQUIRE(found.key.size() == wanted.key.size());
  compare(found.key, wanted.key, shape.kv_heads, shape.head_dim);
  compare(found.value, wanted.value, shape.kv_heads, shape.head_dim);
  compare(found.positions, wanted.positions, shape.kv_heads, 1);
  compare(found.running, wanted.running, shape.query_heads, 1);
  CHECK(differences == 0);
}
