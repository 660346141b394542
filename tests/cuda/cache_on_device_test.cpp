// SPDX-License-Identifier: Apache-2.0
// Compaction on the GPU is the CPU's, bit by bit.
#include "cuda/cache_on_device.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/cache/compact.hpp>

using namespace restkv_test;
using namespace restkv;

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
    std::vector<std::uint16_t> key(static_cast<std::size_t>(batch * heads * tokens * channels));
    std::vector<std::uint16_t> value(key.size());
    for (auto* cache : {&key, &value}) {
      for (auto& element : *cache) element = static_cast<std::uint16_t>(random());
    }
    std::vector<position_t> positions(static_cast<std::size_t>(batch * heads * capacity), -1);
    std::vector<position_t> lengths;
    for (index_t row = 0; row < batch * heads; ++row) {
      const index_t wanted = pick(random, 0, capacity);
      index_t length = 0;
      for (index_t n = 0; n < tokens && length < wanted; ++n) {
        if (tokens - n > wanted - length && chance(random, 50)) continue;
        positions[static_cast<std::size_t>(row * capacity + length++)] = static_cast<position_t>(n);
      }
      lengths.push_back(static_cast<position_t>(length));
    }
    const const_kept_tokens kept({positions.data(), {batch, heads, capacity}}, {lengths.data(), {batch, heads}});
    const std::array<index_t, 4> extents{batch, heads, tokens, channels};
    const tensor_view<const std::uint16_t, 4> key_view(key.data(), extents);
    const tensor_view<const std::uint16_t, 4> value_view(value.data(), extents);
    std::vector<std::uint16_t> wanted_key(static_cast<std::size_t>(batch * heads * capacity * channels), 0xabcd);
    std::vector<std::uint16_t> wanted_value(wanted_key);
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
      const index_t length = lengths[static_cast<std::size_t>(row)];
      CHECK(ragged.offsets[static_cast<std::size_t>(row)] == begin);
      for (index_t i = 0; i < length * channels; ++i) {
        const auto at = [](const std::vector<std::uint16_t>& values, index_t n) {
          return values[static_cast<std::size_t>(n)];
        };
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
