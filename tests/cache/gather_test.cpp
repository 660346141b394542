// SPDX-License-Identifier: Apache-2.0
#include "cache/cache_support.hpp"

#include <restkv/cache/gather.hpp>

#include <thread>

using namespace restkv_test;
using restkv::chunked_tensor_view;
using restkv::dense_layout;
using restkv::errc;
using restkv::gather_tokens;
using restkv::ragged_layout;
using restkv::status;

namespace {

/// A source tensor in chunks, some of them empty, each with strides of its own.
template <class T>
struct chunked_source {
  std::vector<guarded_tensor<T, 4>> parts;
  std::vector<tensor_view<const T, 4>> views;

  chunked_source(random_engine& random, index_t batch, index_t heads, index_t tokens, index_t head_dim) {
    const index_t chunks = pick(random, 1, 4);
    for (index_t i = 0; i < chunks; ++i) {
      const index_t here = i + 1 == chunks ? tokens : pick(random, 0, tokens);
      tokens -= here;
      parts.emplace_back(random, std::array<index_t, 4>{batch, heads, here, head_dim},
                         typename guarded_tensor<T, 4>::options{.contiguous_channels = chance(random, 60),
                                                                .reversed_axes = chance(random, 30),
                                                                .gaps = chance(random, 50)});
    }
    for (const auto& part : parts) views.push_back(part.read());
  }

  [[nodiscard]] chunked_tensor_view<const T> view() const { return {views.data(), static_cast<index_t>(views.size())}; }
  [[nodiscard]] T at(index_t b, index_t h, index_t token, index_t channel) const {
    for (const auto& part : views) {
      if (token < part.extent(2)) return part(b, h, token, channel);
      token -= part.extent(2);
    }
    FAIL("no token " << token);
    return {};
  }
};

struct shape {
  index_t batch, kv_heads, group, tokens, head_dim, capacity;
};

shape random_shape(random_engine& random) {
  const index_t tokens = chance(random, 10) ? pick(random, 0, 1) : pick(random, 2, 40);
  return {pick(random, 0, 3),
          pick(random, 1, 4),
          chance(random, 30) ? pick(random, 2, 3) : 1,
          tokens,
          chance(random, 10) ? pick(random, 0, 1) : pick(random, 2, 19),
          chance(random, 50) ? tokens : pick(random, 0, tokens + 3)};
}

}  // namespace

TEMPLATE_TEST_CASE("gather_tokens copies every kept token and nothing else", "", float, double, restkv::half,
                   restkv::bfloat16, std::int8_t, std::uint8_t, packed_code) {
  using T = TestType;
  random_engine random(3 + sizeof(T));
  for (int trial = 0; trial < 400; ++trial) {
    const shape s = random_shape(random);
    const index_t heads = s.kv_heads * s.group;
    const chunked_source<T> source(random, s.batch, s.kv_heads, s.tokens, s.head_dim);
    const random_kept kept(random, s.batch, heads, s.tokens, s.capacity);
    const auto lengths = kept.read().lengths;
    index_t longest = 0;
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < heads; ++h) longest = std::max<index_t>(longest, lengths(b, h));
    }
    const auto source_of = [&](index_t b, index_t h, index_t slot, index_t c) {
      return source.at(b, h / s.group, kept.read().positions(b, h, slot), c);
    };
    CAPTURE(trial, s.batch, s.kv_heads, s.group, s.tokens, s.head_dim, longest);

    // Dense, with exactly the slots needed or a few more.
    const guarded_tensor<T, 4> out(random, {s.batch, heads, longest + (chance(random, 50) ? 0 : 2), s.head_dim},
                                   {.contiguous_channels = chance(random, 60), .reversed_axes = chance(random, 30)});
    const guarded_tensor<T, 4> expected(out);
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < lengths(b, h); ++i) {
          for (index_t c = 0; c < s.head_dim; ++c) expected.view()(b, h, i, c) = source_of(b, h, i, c);
        }
      }
    }
    const backward_for loop;
    const status outcome = gather_tokens(kept.read(), source.view(), dense_layout(out.view()), loop);
    INFO(outcome.message());
    REQUIRE(outcome.ok());
    CHECK(out.same_bytes(expected));
    CHECK(loop.rows == s.batch * heads);

    // Ragged, without a row to spare.
    std::vector<std::int64_t> offsets{0};
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < heads; ++h) offsets.push_back(offsets.back() + lengths(b, h));
    }
    const guarded_tensor<T, 2> rows(random, {offsets.back(), s.head_dim}, {.contiguous_channels = chance(random, 60)});
    const guarded_tensor<T, 2> expected_rows(rows);
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < lengths(b, h); ++i) {
          const index_t row = offsets[static_cast<std::size_t>(b * heads + h)] + i;
          for (index_t c = 0; c < s.head_dim; ++c) expected_rows.view()(row, c) = source_of(b, h, i, c);
        }
      }
    }
    const ragged_layout<T> ragged{
        rows.view(), {offsets.data(), {static_cast<index_t>(offsets.size())}}, s.batch, heads};
    REQUIRE(gather_tokens(kept.set(), source.view(), ragged).ok());
    CHECK(rows.same_bytes(expected_rows));

    // A layout of the user's own.
    const index_t page = pick(random, 1, 5);
    index_t pool = 0;
    paged_rows<T> paged{
        .table = deal_pages(random, kept.read(), page, pool), .sequences = s.batch, .heads_per_sequence = heads};
    const guarded_tensor<T, 3> pages(random, {pool, page, s.head_dim}, {.contiguous_channels = true});
    const guarded_tensor<T, 3> expected_pages(pages);
    paged.pages = expected_pages.view();
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < lengths(b, h); ++i) {
          for (index_t c = 0; c < s.head_dim; ++c) paged.row(b, h, i)(c) = source_of(b, h, i, c);
        }
      }
    }
    paged.pages = pages.view();
    REQUIRE(gather_tokens(kept.read(), source.view(), paged).ok());
    CHECK(pages.same_bytes(expected_pages));
  }
}

TEMPLATE_TEST_CASE("gather_tokens of one element per token", "", float, position_t, std::int64_t, std::uint8_t) {
  using T = TestType;
  random_engine random(5);
  for (int trial = 0; trial < 300; ++trial) {
    const shape s = random_shape(random);
    const index_t heads = s.kv_heads * s.group;
    const random_kept kept(random, s.batch, heads, s.tokens, s.capacity);
    const guarded_tensor<T, 3> source(random, {s.batch, s.kv_heads, s.tokens}, {.reversed_axes = true});
    const guarded_tensor<T, 3> out(random, {s.batch, heads, s.capacity}, {.reversed_axes = true});
    const guarded_tensor<T, 3> expected(out);
    tensor_view<const T, 3> read = source.view();
    if (chance(random, 30)) read.strides[1] = 0;  // one row for all heads
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < kept.set().lengths(b, h); ++i) {
          expected.view()(b, h, i) = read(b, h / s.group, kept.set().positions(b, h, i));
        }
      }
    }
    REQUIRE(gather_tokens(kept.read(), read, out.view(), backward_for{}).ok());
    CHECK(out.same_bytes(expected));
    if (read.stride(1) != 0) REQUIRE(gather_tokens(kept.set(), source.view(), out.view()).ok());  // mutable source
    CHECK(out.same_bytes(expected));
  }
}

TEST_CASE("gather_tokens over threads writes the same bytes") {
  random_engine random(6);
  const auto threads = [](index_t n, const auto& body) {
    std::vector<std::thread> workers;
    for (index_t first = 0; first < 4; ++first) {
      workers.emplace_back([=, &body] {
        for (index_t i = first; i < n; i += 4) body(i);
      });
    }
    for (auto& worker : workers) worker.join();
  };
  const chunked_source<float> source(random, 2, 4, 200, 16);
  const random_kept kept(random, 2, 8, 200, 150);
  const guarded_tensor<float, 4> out(random, {2, 8, 150, 16}, {});
  const guarded_tensor<float, 4> serial(out);
  REQUIRE(gather_tokens(kept.read(), source.view(), dense_layout(out.view()), threads).ok());
  REQUIRE(gather_tokens(kept.read(), source.view(), dense_layout(serial.view())).ok());
  CHECK(out.same_bytes(serial));
}

TEST_CASE("gather_tokens keeps the bits of NaN payloads, -0 and subnormals") {
  const std::uint32_t bits[4] = {0x7f800001u, 0xffc12345u, 0x80000000u, 0x00000001u};
  float source[4];
  std::memcpy(source, bits, sizeof bits);
  float out[4] = {};
  position_t positions[1] = {0};
  position_t lengths[1] = {1};
  const restkv::kept_tokens kept({positions, {1, 1, 1}}, {lengths, {1, 1}});
  REQUIRE(gather_tokens(kept, tensor_view<float, 4>(source, {1, 1, 1, 4}),
                        dense_layout(tensor_view<float, 4>(out, {1, 1, 1, 4})))
              .ok());
  CHECK(std::memcmp(source, out, sizeof out) == 0);
}

TEST_CASE("gather_tokens names what does not fit, and writes nothing") {
  random_engine random(7);
  const guarded_tensor<float, 4> source(random, {2, 3, 11, 8}, {});
  const guarded_tensor<float, 4> out(random, {2, 6, 5, 8}, {});
  const guarded_tensor<float, 4> untouched(out);
  std::vector<position_t> positions(2 * 6 * 5);
  for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<position_t>(2 * (i % 5));
  std::vector<position_t> lengths(2 * 6, 5);
  restkv::kept_tokens kept({positions.data(), {2, 6, 5}}, {lengths.data(), {2, 6}});
  dense_layout<float> layout{out.view()};
  chunked_tensor_view<const float> input(source.read());
  const auto fails = [&](errc code, const std::vector<index_t>& numbers, const std::string& word = "") {
    check_error(gather_tokens(kept, input, layout), code, numbers, word);
    CHECK(out.same_bytes(untouched));
  };

  SECTION("it fits as it stands") { CHECK(gather_tokens(kept, input, layout).ok()); }
  SECTION("source without chunks") {
    input = {};
    fails(errc::missing_input, {0, 1}, "source");
  }
  SECTION("null source") {
    input = tensor_view<const float, 4>(nullptr, {2, 3, 11, 8});
    fails(errc::missing_input, {528}, "source has a null pointer");
  }
  SECTION("negative extent") {
    input = tensor_view<const float, 4>(source.view().data, {2, 3, -11, 8});
    fails(errc::shape_mismatch, {-11, 2, 4}, "source");
  }
  SECTION("chunks of different shapes") {
    for (const auto& [axis, other] : {std::pair{0, 1}, std::pair{1, 2}, std::pair{3, 7}}) {
      std::vector<tensor_view<const float, 4>> parts{source.read(), source.read()};
      parts[1].extents[static_cast<std::size_t>(axis)] = other;
      input = {parts.data(), 2};
      fails(errc::shape_mismatch, {other, source.view().extent(static_cast<std::size_t>(axis))}, "source");
    }
  }
  SECTION("null kept positions") {
    kept.positions.data = nullptr;
    fails(errc::missing_input, {60}, "kept.positions");
  }
  SECTION("null kept lengths") {
    kept.lengths.data = nullptr;
    fails(errc::missing_input, {12}, "kept.lengths");
  }
  SECTION("positions and lengths of different shapes") {
    kept.lengths.extents[1] = 3;
    fails(errc::shape_mismatch, {6, 3});
  }
  SECTION("another batch") {
    kept.lengths.extents[0] = kept.positions.extents[0] = 1;
    fails(errc::shape_mismatch, {1, 2}, "sequences");
  }
  SECTION("heads that are no multiple") {
    kept.lengths.extents[1] = kept.positions.extents[1] = 4;
    fails(errc::shape_mismatch, {4, 3}, "heads");
  }
  SECTION("a length above the capacity of the set") {
    lengths[7] = 6;
    fails(errc::invalid_argument, {1, 1, 6, 5});
  }
  SECTION("a negative length") {
    lengths[7] = -1;
    fails(errc::invalid_argument, {-1, 5});
  }
  SECTION("a position out of range") {
    positions.back() = 11;
    fails(errc::invalid_argument, {11, 4, 5, 1});
  }
  SECTION("positions that do not ascend") {
    positions[2] = 2;
    fails(errc::invalid_argument, {2, 0, 11});
  }
  SECTION("null output") {
    layout.rows.data = nullptr;
    fails(errc::missing_input, {480}, "out");
  }
  SECTION("another batch in the output") {
    layout.rows.extents[0] = 1;
    fails(errc::shape_mismatch, {1, 2}, "sequences");
  }
  SECTION("KV heads in the output, query heads in the set") {
    layout.rows.extents[1] = 3;
    fails(errc::shape_mismatch, {3, 6}, "heads");
  }
  SECTION("other channels") {
    layout.rows.extents[3] = 7;
    fails(errc::shape_mismatch, {7, 8}, "channels");
  }
  SECTION("one slot short") {
    layout.rows.extents[2] = 4;
    fails(errc::shape_mismatch, {5, 4}, "room");
  }
  SECTION("an output that repeats its rows") {
    layout.rows.strides[1] = 0;
    fails(errc::aliasing, {480, 4}, "out overlaps itself");
  }
  SECTION("an output within the source") {
    input = tensor_view<const float, 4>(out.view().data, {2, 3, 11, 8}, {0, 0, 0, 1});
    fails(errc::aliasing, {32}, "overlap");
  }
  SECTION("an output over the second chunk only") {
    const std::vector<tensor_view<const float, 4>> parts{
        source.read(), tensor_view<const float, 4>(out.view().data, {2, 3, 1, 8}, {0, 0, 0, 1})};
    input = {parts.data(), 2};
    fails(errc::aliasing, {32}, "overlap");
  }
  SECTION("a source that ends where the output begins is fine") {
    std::vector<float> memory(2 * 3 * 11 * 8 + 2 * 6 * 5 * 8, 1.0f);
    input = tensor_view<const float, 4>(memory.data(), {2, 3, 11, 8});
    layout.rows = tensor_view<float, 4>(memory.data() + 2 * 3 * 11 * 8, {2, 6, 5, 8});
    CHECK(gather_tokens(kept, input, layout).ok());
    layout.rows.data -= 1;
    CHECK(gather_tokens(kept, input, layout).code() == errc::aliasing);
  }
  SECTION("an output over the kept set") {
    std::vector<position_t> memory(2 * 6 * 5 * 8);
    std::copy(positions.begin(), positions.end(), memory.begin());
    const auto before = memory;
    layout.rows = tensor_view<float, 4>(reinterpret_cast<float*>(memory.data()), {2, 6, 5, 8});
    kept.positions.data = memory.data();
    fails(errc::aliasing, {1920, 240}, "kept.positions");
    kept.positions.data = positions.data();
    std::copy(lengths.begin(), lengths.end(), memory.begin());
    kept.lengths.data = memory.data();
    fails(errc::aliasing, {1920, 48}, "kept.lengths");
    std::copy(positions.begin(), positions.end(), memory.begin());
    CHECK(memory == before);
  }
  SECTION("a ragged layout one row short, and offsets that do not ascend") {
    std::vector<std::int64_t> offsets(13);
    for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<std::int64_t>(5 * i);
    const guarded_tensor<float, 2> rows(random, {60, 8}, {});
    const guarded_tensor<float, 2> rows_before(rows);
    ragged_layout<float> ragged{rows.view(), {offsets.data(), {13}}, 2, 6};
    offsets[4] = 19;
    check_error(gather_tokens(kept, input, ragged), errc::shape_mismatch, {3, 0, 5, 4}, "room");
    offsets[4] = 27;
    check_error(gather_tokens(kept, input, ragged), errc::invalid_argument, {4, 27, 25});
    offsets[4] = 20;
    ragged.rows.extents[0] = 59;
    check_error(gather_tokens(kept, input, ragged), errc::shape_mismatch, {60, 59});
    ragged.rows.extents[0] = 60;
    ragged.rows.strides[0] = 0;
    check_error(gather_tokens(kept, input, ragged), errc::aliasing, {480}, "overlaps itself");
    CHECK(rows.same_bytes(rows_before));
  }
  SECTION("a paged layout with a null page") {
    paged_rows<float> paged{
        .pages = tensor_view<float, 3>(nullptr, {12, 5, 8}), .table = {}, .sequences = 2, .heads_per_sequence = 6};
    for (index_t i = 0; i < 12; ++i) paged.table.push_back({i});
    check_error(gather_tokens(kept, input, paged), errc::missing_input, {0, 5}, "null row");
  }
  SECTION("one element per token") {
    const tensor_view<float, 3> scales(source.view().data, {2, 3, 11});
    const tensor_view<float, 3> kept_scales(out.view().data, {2, 6, 4});
    check_error(gather_tokens(kept, scales, kept_scales), errc::shape_mismatch, {5, 4}, "room");
    check_error(gather_tokens(kept, scales, tensor_view<float, 3>(out.view().data, {2, 6, 5}, {5, 0, 1})),
                errc::aliasing, {60}, "overlaps itself");
    check_error(gather_tokens(kept, scales, scales), errc::shape_mismatch, {3, 6}, "heads");
    CHECK(out.same_bytes(untouched));
  }
}
