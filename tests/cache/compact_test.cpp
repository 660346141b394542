// SPDX-License-Identifier: Apache-2.0
#include "cache/cache_support.hpp"

#include <restkv/cache/compact.hpp>

using namespace restkv_test;
using restkv::compact;
using restkv::compact_in_place;
using restkv::dense_layout;
using restkv::errc;
using restkv::ragged_layout;
using restkv::ragged_offsets;
using restkv::status;

namespace {

/// What a cache should hold after compaction in place, by the definition.
template <class T>
void move_by_definition(const restkv::const_kept_tokens& kept, const guarded_tensor<T, 4>& before,
                        const guarded_tensor<T, 4>& after) {
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      for (index_t i = 0; i < kept.lengths(b, h); ++i) {
        for (index_t c = 0; c < before.view().extent(3); ++c) {
          after.view()(b, h, i, c) = before.view()(b, h, kept.positions(b, h, i), c);
        }
      }
    }
  }
}

/// A kept set [2, 3] of 4 out of 9 tokens, every second one.
struct small_kept {
  std::vector<position_t> positions = std::vector<position_t>(2 * 3 * 4);
  std::vector<position_t> lengths = std::vector<position_t>(2 * 3, 4);
  restkv::kept_tokens set{{positions.data(), {2, 3, 4}}, {lengths.data(), {2, 3}}};

  small_kept() {
    for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<position_t>(2 * (i % 4));
  }
};

}  // namespace

TEMPLATE_TEST_CASE("compact_in_place moves what compact copies", "", float, restkv::half, std::int8_t, packed_code) {
  using K = TestType;
  using V = std::conditional_t<std::is_same_v<K, std::int8_t>, std::uint8_t, K>;
  random_engine random(11 + sizeof(K));
  for (int trial = 0; trial < 500; ++trial) {
    const index_t batch = pick(random, 0, 3);
    const index_t heads = pick(random, 1, 4);
    const index_t tokens = chance(random, 10) ? pick(random, 0, 1) : pick(random, 2, 40);
    const index_t key_dim = pick(random, 0, 17);
    const index_t value_dim = chance(random, 50) ? key_dim : pick(random, 1, 9);
    const random_kept kept(random, batch, heads, tokens, tokens);
    const auto tensor = [&](auto type, index_t channels) {
      return guarded_tensor<decltype(type), 4>(
          random, {batch, heads, tokens, channels},
          {.contiguous_channels = chance(random, 60), .reversed_axes = chance(random, 30), .gaps = chance(random, 50)});
    };
    const auto key = tensor(K{}, key_dim);
    const auto value = tensor(V{}, value_dim);
    const guarded_tensor<K, 4> key_before(key);
    const guarded_tensor<V, 4> value_before(value);
    const guarded_tensor<K, 4> key_expected(key);
    const guarded_tensor<V, 4> value_expected(value);
    move_by_definition(kept.read(), key_before, key_expected);
    move_by_definition(kept.read(), value_before, value_expected);
    CAPTURE(trial, batch, heads, tokens, key_dim, value_dim);

    const backward_for loop;
    const status outcome = compact_in_place(kept.read(), key.view(), value.view(), loop);
    INFO(outcome.message());
    REQUIRE(outcome.ok());
    CHECK(loop.rows == batch * heads);
    CHECK(key.same_bytes(key_expected));
    CHECK(value.same_bytes(value_expected));

    // Out of place, into ragged keys and dense values.
    std::vector<std::int64_t> offsets(static_cast<std::size_t>(batch * heads + 1), -1);
    const tensor_view<std::int64_t, 1> ends(offsets.data(), {batch * heads + 1});
    REQUIRE(ragged_offsets(kept.read(), ends).ok());
    CHECK(offsets.back() == kept.read().total());
    const guarded_tensor<K, 2> out_key(random, {offsets.back(), key_dim}, {});
    const guarded_tensor<V, 4> out_value(random, {batch, heads, tokens, value_dim}, {});
    const ragged_layout<K> ragged{out_key.view(), ends, batch, heads};
    REQUIRE(compact(kept.read(), key_before.view(), value_before.view(), ragged, dense_layout(out_value.view()),
                    backward_for{})
                .ok());
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < kept.read().lengths(b, h); ++i) {
          bool same = true;
          for (index_t c = 0; c < key_dim; ++c) {
            same = same && same_bits(out_key.view()(ends(b * heads + h) + i, c), key.view()(b, h, i, c));
          }
          for (index_t c = 0; c < value_dim; ++c) {
            same = same && same_bits(out_value.view()(b, h, i, c), value.view()(b, h, i, c));
          }
          CHECK(same);
        }
      }
    }
  }
}

TEST_CASE("compact copies a KV head once for each query head of a per-query-head set") {
  random_engine random(12);
  for (int trial = 0; trial < 100; ++trial) {
    const index_t group = pick(random, 2, 4);
    const guarded_tensor<float, 4> key(random, {2, 2, 20, 6}, {});
    const guarded_tensor<restkv::bfloat16, 4> value(random, {2, 2, 20, 4}, {});
    const random_kept kept(random, 2, 2 * group, 20, 20);
    const guarded_tensor<float, 4> out_key(random, {2, 2 * group, 20, 6}, {});
    const guarded_tensor<restkv::bfloat16, 4> out_value(random, {2, 2 * group, 20, 4}, {});
    const guarded_tensor<float, 4> expected_key(out_key);
    const guarded_tensor<restkv::bfloat16, 4> expected_value(out_value);
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 2 * group; ++h) {
        for (index_t i = 0; i < kept.set().lengths(b, h); ++i) {
          const index_t token = kept.set().positions(b, h, i);
          for (index_t c = 0; c < 6; ++c) expected_key.view()(b, h, i, c) = key.view()(b, h / group, token, c);
          for (index_t c = 0; c < 4; ++c) expected_value.view()(b, h, i, c) = value.view()(b, h / group, token, c);
        }
      }
    }
    REQUIRE(compact(kept.set(), key.view(), value.view(), dense_layout(out_key.view()), dense_layout(out_value.view()))
                .ok());
    CHECK(out_key.same_bytes(expected_key));
    CHECK(out_value.same_bytes(expected_value));
  }
}

TEST_CASE("keys and values interleaved in one buffer are compacted in place, and into one buffer") {
  random_engine random(13);
  for (int trial = 0; trial < 200; ++trial) {
    const index_t tokens = pick(random, 1, 30);
    const guarded_tensor<float, 5> cache(random, {2, tokens, 2, 3, 8}, {.reversed_axes = true});
    const auto part = [](const guarded_tensor<float, 5>& whole, index_t which) {
      const auto& v = whole.view();
      return tensor_view<float, 4>(v.data + which * v.stride(2), {2, 3, v.extent(1), 8},
                                   {v.stride(0), v.stride(3), v.stride(1), v.stride(4)});
    };
    const guarded_tensor<float, 5> before(cache);
    const guarded_tensor<float, 5> expected(cache);
    const random_kept kept(random, 2, 3, tokens, tokens);
    for (const index_t which : {0, 1}) {
      for (index_t b = 0; b < 2; ++b) {
        for (index_t h = 0; h < 3; ++h) {
          for (index_t i = 0; i < kept.set().lengths(b, h); ++i) {
            for (index_t c = 0; c < 8; ++c) {
              part(expected, which)(b, h, i, c) = part(before, which)(b, h, kept.set().positions(b, h, i), c);
            }
          }
        }
      }
    }
    REQUIRE(compact_in_place(kept.read(), part(cache, 0), part(cache, 1)).ok());
    CHECK(cache.same_bytes(expected));

    const guarded_tensor<float, 5> out(random, {2, tokens, 2, 3, 8}, {});
    const status outcome =
        compact(kept.read(), part(before, 0), part(before, 1), dense_layout(part(out, 0)), dense_layout(part(out, 1)));
    INFO(outcome.message());
    REQUIRE(outcome.ok());
    for (const index_t which : {0, 1}) {
      bool same = true;
      for (index_t b = 0; b < 2; ++b) {
        for (index_t h = 0; h < 3; ++h) {
          for (index_t i = 0; i < kept.set().lengths(b, h); ++i) {
            for (index_t c = 0; c < 8; ++c) {
              same = same && same_bits(part(out, which)(b, h, i, c), part(cache, which)(b, h, i, c));
            }
          }
        }
      }
      CHECK(same);
    }

    // Pages of keys and values that alternate in one pool, in a layout the library knows nothing of.
    const index_t page = 4;
    index_t pool = 0;
    const auto table = deal_pages(random, kept.read(), page, pool);
    std::vector<float> memory(static_cast<std::size_t>(pool * 2 * page * 8));
    const auto pages = [&](index_t which) {
      return paged_rows<float>{.pages = {memory.data() + which * page * 8, {pool, page, 8}, {2 * page * 8, 8, 1}},
                               .table = table,
                               .sequences = 2,
                               .heads_per_sequence = 3};
    };
    REQUIRE(compact(kept.read(), part(before, 0), part(before, 1), pages(0), pages(1)).ok());
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 3; ++h) {
        for (index_t i = 0; i < kept.set().lengths(b, h); ++i) {
          CHECK(same_bits(pages(0).row(b, h, i)(7), part(cache, 0)(b, h, i, 7)));
          CHECK(same_bits(pages(1).row(b, h, i)(0), part(cache, 1)(b, h, i, 0)));
        }
      }
    }
    if (kept.set().total() > 0) {
      check_error(compact(kept.read(), part(before, 0), part(before, 1), pages(1), pages(1)), errc::aliasing,
                  {((pool - 1) * 2 + 1) * page * 8 * 4}, "out_value");
    }
  }
}

TEST_CASE("compact checks keys and values before it writes either") {
  random_engine random(14);
  small_kept kept;
  const guarded_tensor<float, 4> key(random, {2, 3, 9, 8}, {});
  const guarded_tensor<float, 4> value(random, {2, 3, 9, 6}, {});
  const guarded_tensor<float, 4> out_key(random, {2, 3, 4, 8}, {});
  const guarded_tensor<float, 4> out_value(random, {2, 3, 4, 6}, {});
  const guarded_tensor<float, 4> key_before(out_key);
  const guarded_tensor<float, 4> value_before(out_value);
  tensor_view<const float, 4> k = key.read();
  tensor_view<const float, 4> v = value.read();
  dense_layout to_key{out_key.view()};
  dense_layout to_value{out_value.view()};
  const auto fails = [&](errc code, const std::vector<index_t>& numbers, const std::string& word) {
    check_error(compact(kept.set, k, v, to_key, to_value), code, numbers, word);
    CHECK(out_key.same_bytes(key_before));
    CHECK(out_value.same_bytes(value_before));
  };
  SECTION("it fits as it stands") { CHECK(compact(kept.set, k, v, to_key, to_value).ok()); }
  SECTION("missing tensors") {
    check_error(compact(kept.set, {}, v, to_key, to_value), errc::missing_input, {0, 1}, "key");
    check_error(compact(kept.set, k, {}, to_key, to_value), errc::missing_input, {0, 1}, "value");
    CHECK(out_key.same_bytes(key_before));
  }
  SECTION("other sequences") {
    v.extents[0] = 1;
    fails(errc::shape_mismatch, {1, 2}, "sequences");
  }
  SECTION("other heads") {
    v.extents[1] = 2;
    fails(errc::shape_mismatch, {2, 3}, "heads");
  }
  SECTION("other tokens") {
    v.extents[2] = 8;
    fails(errc::shape_mismatch, {8, 9}, "tokens");
  }
  SECTION("null value") {
    v.data = nullptr;
    fails(errc::missing_input, {324}, "value");
  }
  SECTION("a bad position") {
    kept.positions[23] = 9;
    fails(errc::invalid_argument, {9, 3}, "position");
  }
  SECTION("too few slots for keys") {
    to_key.rows.extents[2] = 3;
    fails(errc::shape_mismatch, {4, 3}, "out_key");
  }
  SECTION("too few slots for values") {
    to_value.rows.extents[2] = 3;
    fails(errc::shape_mismatch, {4, 3}, "out_value");
  }
  SECTION("other channels") {
    to_value.rows.extents[3] = 5;
    fails(errc::shape_mismatch, {5, 6}, "out_value");
  }
  SECTION("values that share an element with keys, out") {
    to_value.rows = tensor_view<float, 4>(out_key.view().data, {2, 3, 4, 6}, out_key.view().strides);
    fails(errc::aliasing, {}, "out_value");
  }
  SECTION("out keys over values in") {
    v = tensor_view<const float, 4>(out_key.view().data, {2, 3, 9, 6}, {0, 0, 0, 1});
    fails(errc::aliasing, {24}, "out_key spans");
  }
  SECTION("out values over keys in") {
    k = tensor_view<const float, 4>(out_value.view().data, {2, 3, 9, 8}, {0, 0, 0, 1});
    fails(errc::aliasing, {32}, "out_value spans");
  }
  SECTION("out keys over keys in") {
    k = tensor_view<const float, 4>(out_key.view().data, {2, 3, 9, 8}, {0, 0, 0, 1});
    fails(errc::aliasing, {32}, "out_key spans");
  }
}

TEST_CASE("compact_in_place checks keys and values before it moves either") {
  random_engine random(15);
  small_kept kept;
  const guarded_tensor<float, 4> key(random, {2, 3, 9, 8}, {});
  const guarded_tensor<float, 4> value(random, {2, 3, 9, 6}, {});
  const guarded_tensor<float, 4> key_before(key);
  const guarded_tensor<float, 4> value_before(value);
  tensor_view<float, 4> k = key.view();
  tensor_view<float, 4> v = value.view();
  const auto fails = [&](errc code, const std::vector<index_t>& numbers, const std::string& word) {
    check_error(compact_in_place(kept.set, k, v), code, numbers, word);
    CHECK(key.same_bytes(key_before));
    CHECK(value.same_bytes(value_before));
  };
  SECTION("it fits as it stands") { CHECK(compact_in_place(kept.set, k, v).ok()); }
  SECTION("a set per query head") {
    k.extents[1] = v.extents[1] = 1;
    fails(errc::unsupported, {3, 1}, "per KV head");
  }
  SECTION("other shapes") {
    v.extents[0] = 1;
    fails(errc::shape_mismatch, {1, 2}, "sequences");
    v.extents[0] = 2;
    v.extents[1] = 2;
    fails(errc::shape_mismatch, {2, 3}, "heads");
    v.extents[1] = 3;
    v.extents[2] = 8;
    fails(errc::shape_mismatch, {8, 9}, "tokens");
    v.extents[2] = -9;
    fails(errc::shape_mismatch, {-9, 2, 4}, "value");
  }
  SECTION("null pointers") {
    v.data = nullptr;
    fails(errc::missing_input, {324}, "value");
    v = value.view();
    k.data = nullptr;
    fails(errc::missing_input, {432}, "key");
    k = key.view();
    kept.set.lengths.data = nullptr;
    fails(errc::missing_input, {6}, "kept.lengths");
  }
  SECTION("a bad position") {
    kept.positions[22] = 2;
    fails(errc::invalid_argument, {2, 9}, "position");
  }
  SECTION("strides of 0") {
    for (const std::size_t axis : {0u, 1u, 2u, 3u}) {
      v = value.view();
      v.strides[axis] = 0;
      fails(errc::aliasing, {324, 4}, "value overlaps itself");
      v = value.view();
      k.strides[axis] = 0;
      fails(errc::aliasing, {432, 4}, "key overlaps itself");
      k = key.view();
    }
  }
  SECTION("keys that are the values") {
    v = k;
    fails(errc::aliasing, {}, "key spans");
    v = k.slice(3, 0, 6);
    fails(errc::aliasing, {}, "key spans");
  }
  SECTION("a kept set within the cache") {
    std::vector<position_t> memory(2 * 3 * 9 * 8);
    std::copy(kept.positions.begin(), kept.positions.end(), memory.begin());
    const auto before = memory;
    kept.set.positions.data = memory.data();
    const tensor_view<float, 4> cache(reinterpret_cast<float*>(memory.data()), {2, 3, 9, 8});
    check_error(compact_in_place(kept.set, cache, v), errc::aliasing, {1728, 96}, "kept.positions");
    check_error(compact_in_place(kept.set, k, cache), errc::aliasing, {1728, 96}, "kept.positions");
    CHECK(memory == before);
    CHECK(key.same_bytes(key_before));
    CHECK(value.same_bytes(value_before));
  }
}

TEST_CASE("compact_in_place moves keys and values apart within one token axis") {
  // The channels of one buffer: keys first, values behind them.
  random_engine random(16);
  const guarded_tensor<float, 4> both(random, {2, 3, 9, 14}, {});
  const guarded_tensor<float, 4> before(both);
  const guarded_tensor<float, 4> expected(both);
  small_kept kept;
  move_by_definition(kept.set, before, expected);
  REQUIRE(compact_in_place(kept.set, both.view().slice(3, 0, 8), both.view().slice(3, 8, 6)).ok());
  CHECK(both.same_bytes(expected));
}

TEST_CASE("ragged_offsets names what does not fit, and writes nothing") {
  small_kept kept;
  std::vector<std::int64_t> memory(20, -5);
  const auto untouched = memory;
  const auto fails = [&](tensor_view<std::int64_t, 1> offsets, errc code, const std::vector<index_t>& numbers,
                         const std::string& word) {
    check_error(ragged_offsets(kept.set, offsets), code, numbers, word);
    CHECK(memory == untouched);
  };
  fails({memory.data(), {6}}, errc::shape_mismatch, {6, 2, 3, 7}, "offsets");
  fails({memory.data(), {8}}, errc::shape_mismatch, {8, 2, 3, 7}, "offsets");
  fails({memory.data(), {7}, {0}}, errc::aliasing, {7, 8}, "offsets");
  fails({nullptr, {7}}, errc::missing_input, {7}, "offsets");
  kept.lengths[4] = 5;
  fails({memory.data(), {7}}, errc::invalid_argument, {1, 5, 4}, "capacity");
  kept.lengths[4] = -1;
  fails({memory.data(), {7}}, errc::invalid_argument, {1, -1, 4}, "capacity");
  kept.lengths = {4, 0, 1, 2, 0, 3};
  std::vector<std::int64_t> shared(7);
  std::memcpy(shared.data(), kept.lengths.data(), 6 * sizeof(position_t));
  const restkv::const_kept_tokens over(kept.set.positions,
                                       {reinterpret_cast<const position_t*>(shared.data()), {2, 3}});
  check_error(ragged_offsets(over, {shared.data(), {7}}), errc::aliasing, {56, 24}, "kept.lengths");

  kept.set.lengths.data = kept.lengths.data();
  REQUIRE(ragged_offsets(kept.set, {memory.data() + 1, {7}, {2}}).ok());
  const std::int64_t expected[] = {0, 4, 4, 5, 7, 7, 10};
  for (std::size_t i = 0; i < memory.size(); ++i) {
    CHECK(memory[i] == (i % 2 == 1 && i < 14 ? expected[i / 2] : -5));
  }
}
