// SPDX-License-Identifier: Apache-2.0
// Views whose extents and strides no memory can have: 2^62 heads, a stride of -2^63, a group of 2^63 - 1 tokens.
// Everything that takes a view refuses them with a text and computes nothing with them that overflows: run under the
// undefined-behaviour sanitizer.
#include "support/check_error.hpp"

#include <restkv/cache/channel_pruning.hpp>
#include <restkv/cache/compact.hpp>
#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_gather.hpp>
#include <restkv/cache/paged_sequence.hpp>
#include <restkv/cache/quantise.hpp>
#include <restkv/cache/quantised_gather.hpp>
#include <restkv/cache/rope.hpp>
#include <restkv/cache/split_kept.hpp>

#include <functional>
#include <numeric>

using namespace restkv_test;
using restkv::errc;
using restkv::index_t;
using restkv::page_t;
using restkv::position_t;
using restkv::status;
using restkv::tensor_view;

namespace {

constexpr index_t most = INT64_MAX;
constexpr index_t least = INT64_MIN;
/// Extents that no tensor has.
constexpr index_t bad_extents[] = {-1, least, index_t(1) << 60, index_t(1) << 62, most - 1, most};
/// Strides over which no two elements have addresses.
constexpr index_t bad_strides[] = {least, least + 1, -(index_t(1) << 62), index_t(1) << 60, index_t(1) << 62, most};

/// Gives every extent and stride of `view`, one after the other, each bad number: `call` must fail, with a text.
template <class View, class Call>
void check_refused(const char* name, View& view, const Call& call) {
  const View good = view;
  const auto check = [&](const char* what, std::size_t axis, index_t number) {
    INFO(name << ": " << what << " " << axis << " is " << number);
    const status outcome = call();
    CHECK_FALSE(outcome.ok());
    CHECK(outcome.message()[0] != '\0');
    view = good;
  };
  for (std::size_t axis = 0; axis < View::rank; ++axis) {
    for (const index_t extent : bad_extents) {
      view.extents[axis] = extent;
      check("extent", axis, extent);
    }
    for (const index_t stride : bad_strides) {
      if (view.extents[axis] < 2) continue;  // leads nowhere
      view.strides[axis] = stride;
      check("stride", axis, stride);
    }
  }
  view.extents.fill(index_t(1) << (View::rank > 1 ? 32 : 62));  // a product of 0 in 64 bits
  check("every extent", 0, index_t(1) << 32);
  CHECK(call().ok());
}

template <class T, std::size_t Rank>
struct tensor {
  explicit tensor(const std::array<index_t, Rank>& extents)
      : memory(static_cast<std::size_t>(tensor_view<T, Rank>(nullptr, extents).size())), view(memory.data(), extents) {}
  tensor(const tensor&) = delete;
  std::vector<T> memory;
  tensor_view<T, Rank> view;
};

/// A cache of 2 sequences with 2 heads of 8 tokens and 4 channels, of which every second token is kept.
struct small_cache {
  tensor<float, 4> key{{2, 2, 8, 4}};
  tensor<float, 4> value{{2, 2, 8, 4}};
  tensor<position_t, 3> positions{{2, 2, 4}};
  tensor<position_t, 2> lengths{{2, 2}};
  restkv::kept_tokens kept{positions.view, lengths.view};

  small_cache() {
    for (std::size_t i = 0; i < positions.memory.size(); ++i) positions.memory[i] = static_cast<position_t>(i % 4 * 2);
    std::fill(lengths.memory.begin(), lengths.memory.end(), 4);
  }
};

}  // namespace

TEST_CASE("sizes and bounds of views saturate") {
  tensor_view<float, 3> view(nullptr, {index_t(1) << 32, index_t(1) << 32, 2});
  CHECK(view.size() == most);
  view.extents[1] = 0;
  CHECK(view.size() == 0);
  view.extents = {-3, -3, 1};
  CHECK(view.size() == 0);

  float element = 0;
  float other = 0;
  for (const index_t stride : bad_strides) {
    view = {&element, {2, 3, 5}, {stride, stride, 1}};
    const restkv::byte_range bytes = restkv::touched_bytes(view);
    const auto* const beside = reinterpret_cast<const unsigned char*>(&other);
    CHECK(bytes.overlaps({beside, beside + 1}));
    CHECK(restkv::may_overlap_itself(view));
    CHECK(restkv::may_overlap(view, view));
  }
  CHECK(tensor_view<float, 3>(nullptr, {most, most, 2}).dense());
  const tensor_view<float, 4> chunks[] = {{nullptr, {1, 1, most, 1}}, {nullptr, {1, 1, most, 1}}};
  CHECK(restkv::chunked_tensor_view<float>(chunks, 2).extent(2) == most);
}

TEST_CASE("a layer refuses views of nothing") {
  small_cache cache;
  tensor<float, 4> query({2, 4, 3, 4});
  tensor<float, 2> projection({5, 16});
  tensor<double, 3> gram({4, 4, 4});
  tensor<float, 3> factor({4, 4, 4});
  tensor<float, 2> spectrum({4, 4});
  tensor<std::int32_t, 1> lengths({2});
  tensor<std::int32_t, 2> head_lengths({2, 2});
  tensor<std::uint8_t, 2> mask({2, 8});
  restkv::layer_view<float> layer;
  layer.query = query.view;
  layer.key = cache.key.view;
  layer.value = cache.value.view;
  layer.projection = projection.view;
  layer.metric = {gram.view, factor.view, spectrum.view};
  const restkv::problem_shape shape = restkv::shape_of(layer);
  const auto check = [&] { return restkv::check_layer(layer, shape, 3, true, true, true); };
  check_refused("query", layer.query, check);
  check_refused("key", cache.key.view, [&] {
    layer.key = cache.key.view;
    return check();
  });
  check_refused("value", cache.value.view, [&] {
    layer.value = cache.value.view;
    return check();
  });
  check_refused("gram", layer.metric.gram, check);
  check_refused("factor", layer.metric.factor, check);
  check_refused("spectrum", layer.metric.spectrum, check);
  check_refused("W_O", layer.projection, [&] { return restkv::check_projection(layer, shape); });
  layer.keep_mask = mask.view;
  check_refused("keep_mask", layer.keep_mask, check);
  layer.keep_mask = {};
  layer.lengths = lengths.view;
  check_refused("lengths", layer.lengths, check);
  layer.lengths = {};
  layer.head_lengths = head_lengths.view;
  check_refused("head_lengths", layer.head_lengths, check);
}

TEST_CASE("compaction refuses views of nothing") {
  small_cache cache;
  tensor<float, 4> out_key({2, 2, 4, 4});
  tensor<float, 4> out_value({2, 2, 4, 4});
  const auto compact = [&] {
    return restkv::compact(cache.kept, cache.key.view, cache.value.view, restkv::dense_layout{out_key.view},
                           restkv::dense_layout{out_value.view});
  };
  check_refused("key", cache.key.view, compact);
  check_refused("value", cache.value.view, compact);
  check_refused("kept.positions", cache.kept.positions, compact);
  check_refused("kept.lengths", cache.kept.lengths, compact);
  check_refused("out_key", out_key.view, compact);
  check_refused("out_value", out_value.view, compact);

  tensor<std::int64_t, 1> offsets({5});
  std::iota(offsets.memory.begin(), offsets.memory.end(), 0);
  for (std::int64_t& offset : offsets.memory) offset *= 4;
  tensor<float, 2> rows({16, 4});
  restkv::ragged_layout<float> ragged{rows.view, offsets.view, 2, 2};
  const auto gather = [&] { return restkv::gather_tokens(cache.kept, cache.key.view, ragged); };
  check_refused("rows", ragged.rows, gather);
  check_refused("offsets", ragged.offsets, gather);
  for (index_t* const count : {&ragged.sequences, &ragged.heads_per_sequence}) {
    for (const index_t bad : bad_extents) {
      *count = bad;
      CHECK_FALSE(gather().ok());
    }
    *count = 2;
  }
  const restkv::kept_tokens no_heads({cache.positions.view.data, {index_t(1) << 40, 0, 4}},
                                     {cache.lengths.view.data, {index_t(1) << 40, 0}});
  CHECK_FALSE(
      restkv::ragged_offsets(no_heads, offsets.view.slice(0, 0, 1)).ok());  // not after 2^40 sequences without heads
  check_refused("ragged_offsets", offsets.view, [&] { return restkv::ragged_offsets(cache.kept, offsets.view); });

  const auto in_place = [&] { return restkv::compact_in_place(cache.kept, cache.key.view, cache.value.view); };
  for (std::size_t i = 0; i < 16; ++i) cache.positions.memory[i] = static_cast<position_t>(i % 4);  // stays as it is
  check_refused("key in place", cache.key.view, in_place);
  check_refused("value in place", cache.value.view, in_place);

  small_cache front;
  small_cache back;
  const auto split = [&] { return restkv::split_kept(cache.kept, 2, front.kept, back.kept); };
  check_refused("front", front.kept.positions, split);
  check_refused("back", back.kept.lengths, split);

  std::vector<double> frequencies{1.0, 0.5};
  check_refused("rotated keys", out_key.view,
                [&] { return restkv::rotate_keys(cache.kept, out_key.view, frequencies); });
}

TEST_CASE("channel pruning refuses views of nothing") {
  small_cache cache;
  tensor<float, 4> query({2, 4, 3, 4});
  tensor<double, 3> scores({2, 2, 4});
  tensor<position_t, 3> channels({2, 2, 2});
  tensor<float, 4> out({2, 2, 8, 2});
  restkv::layer_view<float> layer;
  layer.query = query.view;
  layer.key = cache.key.view;
  const auto score = [&] { return restkv::score_channels(layer, 3, scores.view); };
  check_refused("query", layer.query, score);
  check_refused("scores", scores.view, score);
  check_refused("key", cache.key.view, [&] {
    layer.key = cache.key.view;
    return score();
  });
  const auto choose = [&] { return restkv::select_channels(scores.view, channels.view); };
  check_refused("scores", scores.view, choose);
  check_refused("channels", channels.view, choose);
  const auto gather = [&] {
    return restkv::gather_channels(tensor_view<const position_t, 3>(channels.view), cache.key.view, out.view);
  };
  check_refused("channels", channels.view, gather);
  check_refused("source", cache.key.view, gather);
  check_refused("out", out.view, gather);
}

TEST_CASE("quantised caches refuse views of nothing, and groups of any size are groups") {
  small_cache cache;
  tensor<std::uint8_t, 4> codes({2, 2, 8, 2});
  tensor<float, 4> scale({2, 2, 4, 2});
  tensor<float, 4> zero({2, 2, 4, 2});
  tensor<float, 4> back({2, 2, 8, 4});
  restkv::quantised_view<float> quantised{codes.view, scale.view, zero.view, {}, 8, 4, 2, 2, {.bits = 4}};
  const auto quantise = [&] { return restkv::quantise(cache.key.view, quantised); };
  const auto dequantise = [&] { return restkv::dequantise(quantised, back.view); };
  const auto compact = [&] { return restkv::compact_in_place(cache.kept, quantised); };
  const std::function<status()> calls[] = {quantise, dequantise, compact};
  for (const auto& call : calls) {
    check_refused("codes", quantised.codes, call);
    check_refused("scale", quantised.scale, call);
    check_refused("zero", quantised.zero, call);
    for (index_t* const count :
         {&quantised.tokens, &quantised.channels, &quantised.tokens_per_group, &quantised.channels_per_group}) {
      const index_t before = *count;
      for (const index_t bad : bad_extents) {
        *count = bad;
        CHECK_FALSE(call().ok());
      }
      *count = before;
    }
  }
  check_refused("in", cache.key.view, quantise);
  check_refused("out", back.view, dequantise);
  for (const index_t first : {least, index_t(-1), most, most - 7}) {
    CHECK_FALSE(restkv::dequantise(quantised, back.view, first).ok());
  }

  tensor<float, 4> one({2, 2, 1, 1});
  for (const index_t huge : {index_t(1) << 62, most}) {
    restkv::quantised_view<float> whole{codes.view, one.view, {}, {}, 8, 4, huge, huge, {.bits = 4}};
    REQUIRE(restkv::quantise(cache.key.view, whole).ok());
    REQUIRE(restkv::dequantise(whole, back.view).ok());
    whole.format.packed = restkv::cache_axis::tokens;
    CHECK_FALSE(restkv::quantise(cache.key.view, whole).ok());
  }
}

TEST_CASE("page tables refuse views of nothing") {
  tensor<float, 4> pool_key({8, 2, 4, 4});
  tensor<float, 4> pool_value({8, 2, 4, 4});
  tensor<page_t, 3> ids({2, 1, 4});
  tensor<position_t, 2> lengths({2, 1});
  std::iota(ids.memory.begin(), ids.memory.end(), 0);
  std::fill(lengths.memory.begin(), lengths.memory.end(), 8);
  restkv::page_tables tables{ids.view, lengths.view};
  restkv::paged_layout<float> layout{pool_key.view, tables};
  const auto check = [&] { return layout.check(); };
  check_refused("pages", layout.pages, check);
  check_refused("ids", layout.tables.ids, check);
  check_refused("lengths", layout.tables.lengths, check);
  for (const index_t bad : {least, index_t(-1), index_t(0)}) CHECK_FALSE(check_tables(tables, 8, bad).ok());
  for (const index_t large : {index_t(1) << 62, most}) {
    CHECK(check_tables(tables, 8, large).ok());  // one page holds a sequence
    CHECK_FALSE(check_tables(tables, large, 1).ok());
  }
  CHECK(restkv::pages_of(most, most) == 1);
  CHECK(restkv::pages_of(most, 1) == most);

  tensor<float, 4> out({2, 2, 8, 4});
  const auto copy = [&] { return restkv::copy_pages(layout, out.view); };
  check_refused("pages", layout.pages, copy);
  check_refused("out", out.view, copy);

  std::vector<std::byte> memory(restkv::page_pool::required_bytes(8));
  restkv::page_pool pool;
  REQUIRE(pool.reset(8, restkv::workspace(memory)).ok());
  for (const index_t bad : bad_extents) CHECK_FALSE(pool.reset(bad, restkv::workspace(memory)).ok());
  std::fill(lengths.memory.begin(), lengths.memory.end(), 0);
  const auto extend = [&](index_t count) {
    return extend_sequence(pool, tables, 0, count, pool_key.view, pool_value.view);
  };
  for (const index_t bad : bad_extents) CHECK_FALSE(extend(bad).ok());
  const auto extend_some = [&] { return extend(0); };
  check_refused("pool", pool_key.view, extend_some);
  check_refused("second pool", pool_value.view, extend_some);
  REQUIRE(extend(8).ok());

  small_cache cache;
  for (std::size_t i = 0; i < 16; ++i) cache.positions.memory[i] = static_cast<position_t>(i % 4);
  restkv::kept_tokens kept{cache.positions.view.slice(0, 0, 1), cache.lengths.view.slice(0, 0, 1)};
  restkv::page_tables first = tables.sequence(0);
  std::vector<std::byte> plan(restkv::page_moves_bytes(first));
  restkv::page_moves moves;
  const index_t free = pool.available();
  const auto refuse = [&](const char* name, auto& view) {
    const auto good = view;
    for (std::size_t axis = 0; axis < good.rank; ++axis) {
      for (const index_t bad : bad_extents) {
        INFO(name << ": extent " << axis << " is " << bad);
        view.extents[axis] = bad;
        CHECK_FALSE(
            restkv::compact_pages(pool, kept, first, restkv::workspace(plan), moves, pool_key.view, pool_value.view)
                .ok());
        CHECK(pool.available() == free);
        view = good;
      }
    }
  };
  refuse("kept.positions", kept.positions);
  refuse("kept.lengths", kept.lengths);
  refuse("tables.ids", first.ids);
  refuse("tables.lengths", first.lengths);
  refuse("pages", pool_key.view);
  refuse("other pages", pool_value.view);
  CHECK(restkv::compact_pages(pool, kept, first, restkv::workspace(plan), moves, pool_key.view, pool_value.view).ok());
}
