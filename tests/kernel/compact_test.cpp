// SPDX-License-Identifier: Apache-2.0
// Compaction by kernels, on the host group, against compaction on the CPU: dense, ragged and in place, bit by bit; what
// it refuses; nothing written outside.
#include "support/catch.hpp"
#include "support/guarded_tensor.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/backend/kernel_compact.hpp>
#include <restkv/cache/compact.hpp>

#include <cstring>
#include <vector>

using namespace restkv_test;
using namespace restkv;

namespace {

/// A random kept set: ascending positions, heads of different lengths, 0 and all among them.
struct random_kept {
  std::vector<position_t> positions;
  std::vector<position_t> lengths;
  kept_tokens kept;

  random_kept(random_engine& random, index_t batch, index_t heads, index_t tokens, index_t capacity) {
    positions.assign(static_cast<std::size_t>(batch * heads * capacity + 1), -7);
    for (index_t row = 0; row < batch * heads; ++row) {
      const index_t wanted = chance(random, 20) ? 0 : chance(random, 20) ? capacity : pick(random, 0, capacity);
      index_t length = 0;
      for (index_t n = 0; n < tokens && length < wanted; ++n) {
        if (tokens - n > wanted - length && chance(random, 50)) continue;
        positions[static_cast<std::size_t>(row * capacity + length++)] = static_cast<position_t>(n);
      }
      lengths.push_back(static_cast<position_t>(length));
    }
    lengths.push_back(0);  // never a null pointer
    kept = {{positions.data(), {batch, heads, capacity}}, {lengths.data(), {batch, heads}}};
  }
};

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
    tensor value(random, {batch, kv_heads, tokens, d}, how);
    const random_kept chosen(random, batch, heads, tokens, capacity);
    copied += chosen.kept.total();
    host_kernel_backend backend(static_cast<std::uint64_t>(turn + 1));
    CAPTURE(turn, batch, kv_heads, group, tokens, capacity, d, strided);

    const index_t slots = capacity + pick(random, 0, 3);
    tensor found_key(random, {batch, heads, slots, d}, how);
    tensor found_value(random, {batch, heads, slots, d}, how);
    tensor wanted_key(found_key);
    tensor wanted_value(found_value);
    REQUIRE(compact(chosen.kept, key.read(), value.read(), dense_layout{wanted_key.view()},
                    dense_layout{wanted_value.view()})
                .ok());
    REQUIRE(compact(backend, chosen.kept, key.read(), value.read(), found_key.view(), found_value.view()).ok());
    CHECK(found_key.same_bytes(wanted_key));
    CHECK(found_value.same_bytes(wanted_value));

    std::vector<std::int64_t> offsets(static_cast<std::size_t>(batch * heads + 1), -1);
    REQUIRE(
        ragged_offsets(backend, chosen.kept, tensor_view<std::int64_t, 1>(offsets.data(), {batch * heads + 1})).ok());
    CHECK(offsets.back() == chosen.kept.total());
    const index_t rows = batch * heads * capacity;
    guarded_tensor<TestType, 2> ragged_key(random, {rows, d}, {});
    guarded_tensor<TestType, 2> ragged_value(random, {rows, d}, {});
    const guarded_tensor<TestType, 2> untouched(ragged_key);
    const tensor_view<const std::int64_t, 1> read_offsets(offsets.data(), {batch * heads + 1});
    REQUIRE(compact(backend, chosen.kept, key.read(), value.read(), {ragged_key.view(), read_offsets},
                    {ragged_value.view(), read_offsets})
                .ok());
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        const index_t length = chosen.kept.lengths(b, h);
        const index_t first = offsets[static_cast<std::size_t>(b * heads + h)];
        CHECK(same_elements(ragged_key.read().slice(0, first, length), wanted_key.read()[b][h].slice(0, 0, length)));
        CHECK(
            same_elements(ragged_value.read().slice(0, first, length), wanted_value.read()[b][h].slice(0, 0, length)));
      }
    }

    // Behind the tokens of the ragged caches, nothing was written.
    const index_t total = chosen.kept.total();
    CHECK(
        same_elements(ragged_key.read().slice(0, total, rows - total), untouched.read().slice(0, total, rows - total)));

    if (group > 1) continue;
    REQUIRE(compact_in_place(backend, chosen.kept, key.view(), value.view()).ok());
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        const index_t length = chosen.kept.lengths(b, h);
        CHECK(same_elements(key.read()[b][h].slice(0, 0, length), wanted_key.read()[b][h].slice(0, 0, length)));
        CHECK(same_elements(value.read()[b][h].slice(0, 0, length), wanted_value.read()[b][h].slice(0, 0, length)));
      }
    }
  }
  CHECK(copied > 1000);
}

TEST_CASE("compaction by kernels refuses what does not fit, before a launch") {
  random_engine random(32);
  guarded_tensor<float, 4> key(random, {1, 2, 20, 8}, {});
  guarded_tensor<float, 4> out(random, {1, 2, 10, 8}, {});
  guarded_tensor<float, 4> out_value(random, {1, 2, 10, 8}, {});
  const random_kept chosen(random, 1, 2, 20, 10);
  const random_kept wide(random, 1, 3, 20, 10);
  host_kernel_backend backend(1);
  const guarded_tensor<float, 4> before(out);
  const auto refuse = [&](const status& outcome, errc code, const char* text) {
    INFO(outcome.message());
    CHECK(outcome.code() == code);
    CHECK(std::string(outcome.message()).find(text) != std::string::npos);
    CHECK(out.same_bytes(before));
  };
  const auto run = [&](const auto& kept, const auto& to_key, const auto& to_value) {
    return compact(backend, kept, key.read(), key.read(), to_key, to_value);
  };
  refuse(run(wide.kept, out.view(), out_value.view()), errc::shape_mismatch, "3 heads");
  refuse(run(chosen.kept, out.view().slice(2, 0, 9), out_value.view()), errc::shape_mismatch, "room for 9 tokens");
  refuse(run(chosen.kept, out.view().slice(3, 0, 7), out_value.view()), errc::shape_mismatch, "7 channels");
  refuse(run(chosen.kept, out.view(), out.view()), errc::aliasing, "overlap");
  refuse(run(chosen.kept, key.view().slice(2, 0, 10), out_value.view()), errc::aliasing, "overlap");
  refuse(run(chosen.kept, tensor_view<float, 4>(nullptr, {1, 2, 10, 8}), out_value.view()), errc::missing_input,
         "null");
  refuse(compact_in_place(backend, chosen.kept, out.view(), out.view()), errc::aliasing, "overlap");
  std::vector<std::int64_t> offsets(2);
  refuse(ragged_offsets(backend, chosen.kept, tensor_view<std::int64_t, 1>(offsets.data(), {2})), errc::shape_mismatch,
         "2 entries");
}
