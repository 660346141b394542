// SPDX-License-Identifier: Apache-2.0
#include "support/check_error.hpp"
#include "support/random.hpp"

#include <restkv/core/layer.hpp>

#include <functional>

using namespace restkv_test;
using restkv::check_layer;
using restkv::errc;
using restkv::layer_view;
using restkv::padding;
using restkv::problem_shape;
using restkv::sequence;
using restkv::tensor_view;
using restkv::window_queries;

namespace {

/// A layer that is in order: 2 sequences, 6 query heads, 3 KV heads, 4 channels, 10 tokens, 7 queries.
struct good_layer {
  std::vector<float> floats = std::vector<float>(2 * 6 * 10 * 4);
  std::vector<double> doubles = std::vector<double>(6 * 4 * 4);
  std::vector<std::int32_t> lengths{10, 3};
  std::vector<std::uint8_t> mask = std::vector<std::uint8_t>(2 * 10);
  problem_shape shape{.batch = 2, .query_heads = 6, .kv_heads = 3, .head_dim = 4, .tokens = 12};
  layer_view<float> layer{};

  good_layer() {
    layer.query = {floats.data(), {2, 6, 7, 4}};
    layer.key = cache();
    layer.value = cache();
    layer.metric = {{doubles.data(), {6, 4, 4}}, {floats.data(), {6, 4, 4}}, {floats.data(), {6, 4}}};
    layer.lengths = {lengths.data(), {2}};
    layer.keep_mask = {mask.data(), {2, 10}};
  }
  [[nodiscard]] tensor_view<const float, 4> cache() const { return {floats.data(), {2, 3, 10, 4}}; }
  [[nodiscard]] restkv::status check(index_t window = 7, bool query = true, bool value = true,
                                     bool metric = true) const {
    return check_layer(layer, shape, window, query, value, metric);
  }
};

/// A copy of a view with another extent on one axis.
template <class View>
View resized(View view, std::size_t axis, index_t extent) {
  view.extents[axis] = extent;
  return view;
}

}  // namespace

TEST_CASE("a layer in order passes, whatever is asked for") {
  const good_layer good;
  for (const bool query : {false, true}) {
    for (const bool value : {false, true}) {
      for (const bool metric : {false, true}) {
        const auto outcome = good.check(7, query, value, metric);
        INFO(outcome.message());
        CHECK(outcome.ok());
      }
    }
  }
}

TEST_CASE("what is not asked for may be missing") {
  good_layer good;
  good.layer.metric = {};
  CHECK(good.check(7, true, true, false).ok());
  good.layer.value = {};
  CHECK(good.check(7, true, false, false).ok());
  good.layer.query = {};
  CHECK(good.check(0, false, false, false).ok());
  good.layer.lengths = {};
  good.layer.keep_mask = {};
  CHECK(good.check(0, false, false, false).ok());
}

TEST_CASE("every misfit of a layer is named with both numbers") {
  struct misfit {
    const char* word;
    errc code;
    std::vector<index_t> numbers;
    std::function<void(good_layer&)> damage;
  };
  using G = good_layer;
  const tensor_view<const float, 4> null_cache(nullptr, {2, 3, 10, 4});
  const auto chunk = [](index_t axis, index_t extent) {
    return [axis, extent](G& g) {
      static std::array<tensor_view<const float, 4>, 2> chunks;
      chunks = {g.cache().slice(2, 0, 6), g.cache().slice(2, 6, 4)};
      chunks[1] = resized(chunks[1], static_cast<std::size_t>(axis), extent);
      g.layer.key = {chunks.data(), 2};
    };
  };
  const std::vector<misfit> misfits{
      {"no key", errc::missing_input, {}, [](G& g) { g.layer.key = {}; }},
      {"no value", errc::missing_input, {}, [](G& g) { g.layer.value = {}; }},
      {"key", errc::shape_mismatch, {5, 2}, [](G& g) { g.layer.key = resized(g.cache(), 0, 5); }},
      {"key", errc::shape_mismatch, {6, 3}, [](G& g) { g.layer.key = resized(g.cache(), 1, 6); }},
      {"key", errc::shape_mismatch, {13, 12}, [](G& g) { g.layer.key = resized(g.cache(), 2, 13); }},
      {"key", errc::shape_mismatch, {12}, [](G& g) { g.layer.key = resized(g.cache(), 2, -1); }},
      {"key", errc::shape_mismatch, {5, 4}, [](G& g) { g.layer.key = resized(g.cache(), 3, 5); }},
      {"key", errc::shape_mismatch, {1, 2}, chunk(0, 1)},
      {"key", errc::shape_mismatch, {2, 3}, chunk(1, 2)},
      {"key", errc::shape_mismatch, {3, 4}, chunk(3, 3)},
      {"key", errc::missing_input, {240}, [&](G& g) { g.layer.key = null_cache; }},
      {"value", errc::shape_mismatch, {1, 2}, [](G& g) { g.layer.value = resized(g.cache(), 0, 1); }},
      {"value", errc::shape_mismatch, {1, 3}, [](G& g) { g.layer.value = resized(g.cache(), 1, 1); }},
      {"value", errc::shape_mismatch, {9, 10}, [](G& g) { g.layer.value = resized(g.cache(), 2, 9); }},
      {"value", errc::shape_mismatch, {8, 4}, [](G& g) { g.layer.value = resized(g.cache(), 3, 8); }},
      {"value", errc::missing_input, {240}, [&](G& g) { g.layer.value = null_cache; }},
      {"lengths", errc::shape_mismatch, {3, 2}, [](G& g) { g.layer.lengths = resized(g.layer.lengths, 0, 3); }},
      {"length", errc::invalid_argument, {1, -2, 10}, [](G& g) { g.lengths[1] = -2; }},
      {"length", errc::invalid_argument, {0, 11, 10}, [](G& g) { g.lengths[0] = 11; }},
      {"query", errc::missing_input, {336}, [](G& g) { g.layer.query.data = nullptr; }},
      {"query", errc::shape_mismatch, {3, 2}, [](G& g) { g.layer.query = resized(g.layer.query, 0, 3); }},
      {"query", errc::shape_mismatch, {8, 6}, [](G& g) { g.layer.query = resized(g.layer.query, 1, 8); }},
      {"query", errc::shape_mismatch, {6, 7}, [](G& g) { g.layer.query = resized(g.layer.query, 2, 6); }},
      {"query", errc::shape_mismatch, {5, 4}, [](G& g) { g.layer.query = resized(g.layer.query, 3, 5); }},
      {"layer.metric", errc::missing_input, {}, [](G& g) { g.layer.metric = {}; }},
      {"metric.gram", errc::shape_mismatch, {3, 6}, [](G& g) { g.layer.metric.gram.extents[0] = 3; }},
      {"metric.gram", errc::shape_mismatch, {5, 4}, [](G& g) { g.layer.metric.gram.extents[1] = 5; }},
      {"metric.gram", errc::shape_mismatch, {9, 4}, [](G& g) { g.layer.metric.gram.extents[2] = 9; }},
      {"metric.factor", errc::missing_input, {}, [](G& g) { g.layer.metric.factor = {}; }},
      {"metric.factor", errc::shape_mismatch, {3, 6}, [](G& g) { g.layer.metric.factor.extents[0] = 3; }},
      {"metric.factor", errc::shape_mismatch, {9, 4}, [](G& g) { g.layer.metric.factor.extents[2] = 9; }},
      {"metric.spectrum", errc::missing_input, {}, [](G& g) { g.layer.metric.spectrum = {}; }},
      {"metric.spectrum", errc::shape_mismatch, {2, 4}, [](G& g) { g.layer.metric.spectrum.extents[1] = 2; }},
      {"keep_mask", errc::shape_mismatch, {1, 2}, [](G& g) { g.layer.keep_mask.extents[0] = 1; }},
      {"keep_mask", errc::shape_mismatch, {12, 10}, [](G& g) { g.layer.keep_mask.extents[1] = 12; }},
  };
  for (std::size_t i = 0; i < misfits.size(); ++i) {
    good_layer bad;
    misfits[i].damage(bad);
    CAPTURE(i);
    check_error(bad.check(), misfits[i].code, misfits[i].numbers, misfits[i].word);
  }
}

TEST_CASE("queries need as many rows as the window, or as the sequence where that is shorter") {
  good_layer good;
  good.layer.query = resized(good.layer.query, 2, 3);
  CHECK_FALSE(good.check(7).ok());  // the sequence of 10 tokens needs 7
  good.lengths = {2, 3};
  good.layer.lengths = {good.lengths.data(), {2}};
  CHECK(good.check(7).ok());
  good.lengths = {0, 0};
  good.layer.query = {nullptr, {2, 6, 0, 4}};
  CHECK(good.check(7).ok());
}

TEST_CASE("a layer may have fewer tokens than its plan, and none at all") {
  good_layer good;
  good.layer.keep_mask = {};
  good.lengths = {0, 0};
  good.layer.key = tensor_view<const float, 4>(nullptr, {2, 3, 0, 4});
  good.layer.value = tensor_view<const float, 4>(nullptr, {2, 3, 0, 4});
  const auto outcome = good.check();
  INFO(outcome.message());
  CHECK(outcome.ok());
}

TEST_CASE("shape_of reads the shape off the tensors") {
  const good_layer good;
  const problem_shape shape = restkv::shape_of(good.layer, 3, 28);
  CHECK(shape.batch == 2);
  CHECK(shape.query_heads == 6);
  CHECK(shape.kv_heads == 3);
  CHECK(shape.head_dim == 4);
  CHECK(shape.tokens == 10);
  CHECK(shape.layer == 3);
  CHECK(shape.layers == 28);
  CHECK(shape.group() == 2);
  CHECK(problem_shape{}.group() == 0);
}

TEST_CASE("sequences lie at the end of the token axis with left padding, at its beginning with right padding") {
  random_engine random(1);
  std::vector<float> numbers(3 * 20 * 2);
  for (int trial = 0; trial < 200; ++trial) {
    const index_t tokens = pick(random, 0, 20);
    layer_view<float> layer;
    layer.key = tensor_view<const float, 4>(numbers.data(), {3, 1, tokens, 2});
    for (index_t b = 0; b < 3; ++b) {  // without lengths: everything, whatever the padding
      layer.pad = padding::right;
      CHECK(sequence(layer, b, 0).begin == 0);
      CHECK(sequence(layer, b, 0).length == tokens);
    }
    std::vector<std::int32_t> lengths(3);
    for (auto& length : lengths) length = static_cast<std::int32_t>(pick(random, 0, tokens));
    layer.lengths = {lengths.data(), {3}};
    for (const padding pad : {padding::left, padding::right}) {
      layer.pad = pad;
      for (index_t b = 0; b < 3; ++b) {
        const auto span = sequence(layer, b, 0);
        CHECK(span.length == lengths[static_cast<std::size_t>(b)]);
        CHECK(span.begin == (pad == padding::left ? tokens - span.length : 0));
      }
    }
  }
}

TEST_CASE("window queries are the last rows of the sequence, oldest first") {
  random_engine random(2);
  for (int trial = 0; trial < 500; ++trial) {
    const index_t tokens = pick(random, 1, 12);
    // The last n queries, or the whole query tensor (n = tokens).
    const index_t rows = chance(random, 50) ? tokens : pick(random, 1, 12);
    std::vector<float> numbers(2 * 3 * 12 * 2);
    for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i);
    layer_view<float> layer;
    layer.query = {numbers.data(), {2, 3, rows, 2}};
    layer.key = tensor_view<const float, 4>(numbers.data(), {2, 1, tokens, 2});
    std::vector<std::int32_t> lengths{static_cast<std::int32_t>(pick(random, 0, tokens)),
                                      static_cast<std::int32_t>(pick(random, 0, tokens))};
    const bool padded = chance(random, 70);
    if (padded) layer.lengths = {lengths.data(), {2}};
    layer.pad = chance(random, 50) ? padding::left : padding::right;
    for (index_t b = 0; b < 2; ++b) {
      const index_t length = sequence(layer, b, 0).length;
      const index_t window = pick(random, 0, std::min(length, rows));
      // With right padding and a query for every token, the padding's own queries stand behind the sequence's.
      const bool row_is_token = padded && layer.pad == padding::right && rows == tokens;
      const index_t end = row_is_token ? length : rows;
      const auto part = window_queries(layer, b, 2, window);
      CAPTURE(tokens, rows, length, window, padded, static_cast<int>(layer.pad));
      REQUIRE(part.extent(0) == window);
      for (index_t i = 0; i < window; ++i) CHECK(&part(i, 1) == &layer.query(b, 2, end - window + i, 1));
    }
  }
}
