// SPDX-License-Identifier: Apache-2.0
// Compaction by kernels, on the host group, against compaction on the CPU: dense, ragged, paged and in place, bit by
// bit, with nothing written outside.
#include "cache/cache_support.hpp"
#include "support/catch.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/backend/kernel_compact.hpp>
#include <restkv/cache/compact.hpp>

#include <cstring>
#include <vector>

using namespace restkv_test;
using namespace restkv;

namespace {

template <class T, std::size_t Rank>
bool same_elements(const tensor_view<const T, Rank>& a, const tensor_view<const T, Rank>& b) {
  std::vector<T> left;
  std::vector<T> right;
  for_each(a, [&](const T& x) { left.push_back(x); });
  for_each(b, [&](const T& x) { right.push_back(x); });
  return left.size() == right.size() &&
         (left.empty() || std::memcmp(left.data(), right.data(), left.size() * sizeof(T)) == 0);
}

}  // namespace

TEMPLATE_TEST_CASE("kernels compact as the CPU does", "", float, half, std::uint8_t) {
  random_engine random(31);
  index_t copied = 0;
  for (int turn = 0; turn < 120; ++turn) {
    const index_t batch = pick(random, 1, 2);
    const index_t kv_heads = pick(random, 1, 3);
    const index_t group = chance(random, 30) ? 2 : 1;
    const index_t heads = kv_heads * group;
    const index_t tokens = pick(random, 1, 150);
    const index_t capacity = pick(random, 1, tokens);
    const index_t d = chance(random, 50) ? 16 * pick(random, 1, 3) : pick(random, 1, 20);
    const bool strided = chance(random, 50);
    using tensor = guarded_tensor<TestType, 4>;
    const typename tensor::options how{.row_major = !strided, .reversed_axes = strided, .gaps = strided};
    tensor key(random, {batch, kv_heads, tokens, d}, how);
    const index_t value_d = chance(random, 50) ? d : d + 1;
    tensor value(random, {batch, kv_heads, tokens, value_d}, how);
    const random_kept chosen(random, batch, heads, tokens, capacity);
    const const_kept_tokens kept = chosen.read();
    copied += kept.total();
    host_kernel_backend backend(static_cast<std::uint64_t>(turn + 1));
    CAPTURE(turn, batch, kv_heads, group, tokens, capacity, d, strided);

    const index_t slots = capacity + pick(random, 0, 3);
    tensor found_key(random, {batch, heads, slots, d}, how);
    tensor found_value(random, {batch, heads, slots, value_d}, how);
    tensor wanted_key(found_key);
    tensor wanted_value(found_value);
    REQUIRE(compact(kept, key.read(), value.read(), dense_layout{wanted_key.view()}, dense_layout{wanted_value.view()})
                .ok());
    REQUIRE(compact(backend, kept, key.read(), value.read(), found_key.view(), found_value.view()).ok());
    CHECK(found_key.same_bytes(wanted_key));
    CHECK(found_value.same_bytes(wanted_value));

    std::vector<std::int64_t> offsets(static_cast<std::size_t>(batch * heads + 1), -1);
    REQUIRE(ragged_offsets(backend, kept, tensor_view<std::int64_t, 1>(offsets.data(), {batch * heads + 1})).ok());
    CHECK(offsets.back() == kept.total());
    const index_t rows = batch * heads * capacity;
    guarded_tensor<TestType, 2> ragged_key(random, {rows, d}, {});
    guarded_tensor<TestType, 2> ragged_value(random, {rows, value_d}, {});
    const guarded_tensor<TestType, 2> untouched(ragged_key);
    const tensor_view<const std::int64_t, 1> read_offsets(offsets.data(), {batch * heads + 1});
    using ragged = ragged_rows<TestType, memory_space::host>;
    REQUIRE(compact(backend, kept, key.read(), value.read(), ragged{ragged_key.view(), read_offsets},
                    ragged{ragged_value.view(), read_offsets})
                .ok());
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        const index_t length = kept.lengths(b, h);
        const index_t first = offsets[static_cast<std::size_t>(b * heads + h)];
        CHECK(same_elements(ragged_key.read().slice(0, first, length), wanted_key.read()[b][h].slice(0, 0, length)));
        CHECK(
            same_elements(ragged_value.read().slice(0, first, length), wanted_value.read()[b][h].slice(0, 0, length)));
      }
    }

    // Behind the tokens of the ragged caches, nothing was written.
    const index_t total = kept.total();
    CHECK(
        same_elements(ragged_key.read().slice(0, total, rows - total), untouched.read().slice(0, total, rows - total)));

    // Into one pool, where the tables of keys and values have pages of their own.
    const index_t page_size = pick(random, 1, 20);
    const index_t heads_per_page = chance(random, 50) ? heads : 1;
    const index_t tables = heads / heads_per_page;
    const index_t most = pages_of(capacity, page_size);
    std::vector<page_t> ids(static_cast<std::size_t>(2 * batch * tables * most));
    std::iota(ids.begin(), ids.end(), page_t{0});
    std::shuffle(ids.begin(), ids.end(), random);
    const std::vector<position_t> room(static_cast<std::size_t>(batch * tables), static_cast<position_t>(capacity));
    tensor pool(random, {static_cast<index_t>(ids.size()), heads_per_page, page_size, d}, how);
    tensor wanted_pool(pool);
    const auto pages = [&](const tensor& memory, index_t first) {
      return paged_layout<TestType>{memory.view(),
                                    {{ids.data() + first, {batch, tables, most}}, {room.data(), {batch, tables}}}};
    };
    const index_t half_of_ids = batch * tables * most;
    REQUIRE(gather_tokens(kept, key.read(), pages(wanted_pool, 0)).ok());
    REQUIRE(gather_tokens(kept, value.read().slice(3, 0, d), pages(wanted_pool, half_of_ids)).ok());
    REQUIRE(
        compact(backend, kept, key.view(), value.read().slice(3, 0, d), pages(pool, 0), pages(pool, half_of_ids)).ok());
    CHECK(pool.same_bytes(wanted_pool));

    if (group > 1) continue;
    REQUIRE(compact_in_place(backend, kept, key.view(), value.view()).ok());
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        const index_t length = kept.lengths(b, h);
        CHECK(same_elements(key.read()[b][h].slice(0, 0, length), wanted_key.read()[b][h].slice(0, 0, length)));
        CHECK(same_elements(value.read()[b][h].slice(0, 0, length), wanted_value.read()[b][h].slice(0, 0, length)));
      }
    }
  }
  CHECK(copied > 1000);
}
