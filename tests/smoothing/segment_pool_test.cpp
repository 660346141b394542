// SPDX-License-Identifier: Apache-2.0
// Smoothers that carry importance forward, and where segments begin.
#include "smoothing/row_support.hpp"
#include "support/random_layer.hpp"

#include <restkv/smoothing/following_pool.hpp>
#include <restkv/smoothing/key_links.hpp>
#include <restkv/smoothing/segment_pool.hpp>

#include <numeric>

using namespace restkv_test;
using restkv::errc;
using restkv::following_pool;
using restkv::layer_view;
using restkv::segment_pool;
using restkv::tensor_view;

namespace {

static_assert(restkv::monotone_spatial_smoother<following_pool> && restkv::parted_spatial_smoother<following_pool>);
static_assert(restkv::monotone_spatial_smoother<segment_pool> && restkv::parted_spatial_smoother<segment_pool>);

std::vector<std::uint8_t> random_begins(random_engine& random, index_t count) {
  std::vector<std::uint8_t> begins(static_cast<std::size_t>(count));
  for (std::uint8_t& begin : begins) begin = chance(random, 15) ? 1 : 0;
  return begins;
}

tensor_view<const std::uint8_t, 2> as_rows(const std::vector<std::uint8_t>& begins, index_t rows) {
  return {begins.data(), {rows, static_cast<index_t>(begins.size()) / rows}};
}

/// Links of a layer, and what was said of it.
struct links_of_layer {
  std::vector<double> links;
  restkv::status result;

  explicit links_of_layer(const layer_view<float>& layer, std::vector<double> before = {}) : links(std::move(before)) {
    links.resize(static_cast<std::size_t>(layer.key.extent(0) * layer.key.extent(2)));
    std::vector<double> scratch(static_cast<std::size_t>(restkv::key_links_scratch(layer.key.extent(3))));
    result = restkv::add_key_links(layer, {links.data(), {layer.key.extent(0), layer.key.extent(2)}}, scratch);
  }
};

std::vector<std::uint8_t> segments(const std::vector<double>& links, double share) {
  std::vector<std::uint8_t> begins(links.size());
  std::vector<double> scratch(links.size());
  const auto tokens = static_cast<index_t>(links.size());
  REQUIRE(restkv::find_segments({links.data(), {1, tokens}}, {}, {begins.data(), {1, tokens}}, scratch, share).ok());
  return begins;
}

}  // namespace

TEMPLATE_TEST_CASE("following_pool is the maximum over a token and those before it", "", float, double) {
  random_engine random(1);
  for (int trial = 0; trial < 300; ++trial) {
    const auto in = random_row<TestType>(random, trial < 30 ? trial % 3 : pick(random, 0, 80));
    const following_pool pool{.width = static_cast<int>(pick(random, 1, 20))};
    row<TestType> expected = in;
    for (std::size_t n = 0; n < in.size(); ++n) {
      for (std::size_t back = 0; back < static_cast<std::size_t>(pool.width) && back <= n; ++back) {
        expected[n] = std::max(expected[n], in[n - back]);
      }
    }
    CAPTURE(trial, pool.width);
    CHECK(smooth(pool, in) == expected);
    check_monotone_within_reach(random, pool, in, 0);
  }
  check_error(following_pool{.width = 0}.check(), errc::invalid_argument, {0, 1}, "following_pool.width");
  CHECK(following_pool{.width = 2}.check().ok());
}

TEMPLATE_TEST_CASE("segment_pool is the maximum from the segment's first token on", "", float, double) {
  random_engine random(2);
  for (int trial = 0; trial < 300; ++trial) {
    const index_t length = trial < 30 ? trial % 3 : pick(random, 0, 80);
    const auto in = random_row<TestType>(random, length);
    const auto begins = random_begins(random, 2 * std::max<index_t>(length, 1));
    const segment_pool pool{as_rows(begins, 2)};
    for (const index_t sequence : {0, 1}) {
      row<TestType> expected = in;
      for (index_t n = 1; n < length; ++n) {
        const bool goes_on = begins[static_cast<std::size_t>(sequence * pool.begins.extent(1) + n)] == 0;
        const auto i = static_cast<std::size_t>(n);
        if (goes_on) expected[i] = std::max(expected[i], expected[i - 1]);
      }
      row<TestType> whole(in.size(), TestType(-77)), parts(in.size(), TestType(-77));
      const row_context context{.sequence = sequence};
      pool(std::span<const TestType>(in), std::span<TestType>(whole), context);
      for (index_t part = pool.parts(length, context) - 1; part >= 0; --part) {
        pool.smooth_part(part, std::span<const TestType>(in), std::span<TestType>(parts), context);
      }
      CAPTURE(trial, sequence);
      CHECK(whole == expected);
      CHECK(parts == expected);
    }
  }
}

TEST_CASE("a NaN spreads forward, to the end of its segment or the pool's width") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const row<float> in{5, nan, 1, 2, 9, 3};
  const std::vector<std::uint8_t> begins{0, 0, 0, 0, 1, 0};
  const auto of_segments = smooth(segment_pool{as_rows(begins, 1)}, in);
  const auto following = smooth(following_pool{.width = 2}, in);
  for (std::size_t n = 0; n < in.size(); ++n) {
    CHECK(std::isnan(of_segments[n]) == (n >= 1 && n < 4));
    CHECK(std::isnan(following[n]) == (n == 1 || n == 2));
  }
  CHECK(of_segments[5] == 9);
}

TEST_CASE("segment_pool names what does not fit a plan") {
  const std::vector<std::uint8_t> begins(20);
  const segment_pool pool{as_rows(begins, 2)};
  CHECK(pool.check({.batch = 2, .tokens = 10}).ok());
  check_error(pool.check({.batch = 2, .tokens = 11}), errc::shape_mismatch, {10, 11}, "segment_pool.begins");
  check_error(pool.check({.batch = 3, .tokens = 10}), errc::shape_mismatch, {2, 3}, "sequences");
  CHECK(segment_pool{}.check({.batch = 1, .tokens = 1}).code() == errc::missing_input);
}

TEST_CASE("key links are the cosines of neighbouring keys, of all layers together") {
  random_engine random(4);
  for (int trial = 0; trial < 60; ++trial) {
    const layer_recipe recipe{.batch = pick(random, 1, 2),
                              .kv_heads = pick(random, 1, 3),
                              .head_dim = pick(random, 2, 9),
                              .tokens = pick(random, 1, 40),
                              .strided = chance(random, 50),
                              .chunks = pick(random, 1, 3),
                              .padded = chance(random, 50),
                              .pad = chance(random, 50) ? restkv::padding::left : restkv::padding::right};
    const random_layer<float> first(random, recipe);
    const layer_view<float>& layer = first.view();
    const links_of_layer once(layer);
    REQUIRE(once.result.ok());
    const links_of_layer twice(layer, once.links);
    bool close = true, doubled = true;
    for (index_t b = 0; b < recipe.batch; ++b) {
      const auto span = restkv::sequence(layer, b, 0);
      for (index_t n = 0; n < recipe.tokens; ++n) {
        double expected = 0;
        for (index_t h = 0; h < recipe.kv_heads && n > 0 && n < span.length; ++h) {
          std::vector<double> a, c;
          for (index_t channel = 0; channel < recipe.head_dim; ++channel) {
            double sum = 0;
            for (index_t i = 0; i < span.length; ++i) sum += double(first.key.view()(b, h, span.begin + i, channel));
            const double mean = sum / static_cast<double>(span.length);
            a.push_back(double(first.key.view()(b, h, span.begin + n, channel)) - mean);
            c.push_back(double(first.key.view()(b, h, span.begin + n - 1, channel)) - mean);
          }
          expected += std::inner_product(a.begin(), a.end(), c.begin(), 0.0) /
                      std::sqrt(std::inner_product(a.begin(), a.end(), a.begin(), 0.0)) /
                      std::sqrt(std::inner_product(c.begin(), c.end(), c.begin(), 0.0)) /
                      static_cast<double>(recipe.kv_heads);
        }
        const auto i = static_cast<std::size_t>(b * recipe.tokens + n);
        close = close && std::fabs(once.links[i] - expected) < 1e-9;
        doubled = doubled && std::fabs(twice.links[i] - 2 * once.links[i]) < 1e-12;
      }
    }
    CAPTURE(trial);
    CHECK(close);
    CHECK(doubled);
  }
}

TEST_CASE("segments begin where keys turn to something else") {
  random_engine random(5);
  random_layer<float> layer(random, {.head_dim = 16, .tokens = 40});
  const std::vector<index_t> subjects{0, 7, 8, 25, 33};  // first tokens
  for (index_t h = 0; h < 2; ++h) {
    for (std::size_t s = 0; s < subjects.size(); ++s) {
      const index_t end = s + 1 < subjects.size() ? subjects[s + 1] : 40;
      for (index_t n = subjects[s]; n < end; ++n) {
        for (index_t c = 0; c < 16; ++c) {
          const bool own = c == 3 * static_cast<index_t>(s);
          layer.key.view()(0, h, n, c) = static_cast<float>((own ? 10.0 : 0.0) + 0.1 * normal(random));
        }
      }
    }
  }
  const links_of_layer found(layer.view());
  REQUIRE(found.result.ok());
  const auto begins = segments(found.links, 0.1);  // floor(3.9) = 3 of the 4 changes
  const auto all = segments(found.links, 0.11);
  index_t few = 0;
  for (index_t n = 0; n < 40; ++n) {
    const bool changes = std::find(subjects.begin(), subjects.end(), n) != subjects.end();
    CHECK((all[static_cast<std::size_t>(n)] != 0) == changes);
    few += begins[static_cast<std::size_t>(n)];
    if (begins[static_cast<std::size_t>(n)] != 0) CHECK(changes);
  }
  CHECK(few == 4);
}

TEST_CASE("the weakest links are cut, ties from the left") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(segments({9, 3, 1, 1, nan, 1, 5}, 0.5) == std::vector<std::uint8_t>{1, 0, 1, 1, 0, 1, 0});
  CHECK(segments({9, 3, 1, 1, nan, 1, 5}, 0.34) == std::vector<std::uint8_t>{1, 0, 1, 1, 0, 0, 0});
  CHECK(segments({9, 3, 1}, 0.0) == std::vector<std::uint8_t>{1, 0, 0});
  CHECK(segments({9, 3, nan}, 1.0) == std::vector<std::uint8_t>{1, 1, 1});
  CHECK(segments({9}, 1.0) == std::vector<std::uint8_t>{1});
}

TEST_CASE("what does not fit leaves links and segments as they were") {
  random_engine random(6);
  random_layer<float> layer(random, {.batch = 2, .tokens = 10});
  std::vector<double> links(20, 7.0), scratch(64);
  CHECK(restkv::add_key_links(layer.view(), {links.data(), {2, 9}}, scratch).code() == errc::shape_mismatch);
  CHECK(restkv::add_key_links(layer.view(), {links.data(), {1, 20}}, scratch).code() == errc::shape_mismatch);
  CHECK(restkv::add_key_links(layer.view(), {links.data(), {2, 10}}, std::span(scratch).first(23)).code() ==
        errc::workspace_too_small);
  std::vector<std::int32_t> lengths(4, 5);
  layer.view().head_lengths = {lengths.data(), {2, 2}};
  CHECK(restkv::add_key_links(layer.view(), {links.data(), {2, 10}}, scratch).code() == errc::invalid_argument);
  CHECK(links == std::vector<double>(20, 7.0));

  std::vector<std::uint8_t> begins(20, 7);
  const tensor_view<const double, 2> of(links.data(), {2, 10});
  const tensor_view<std::uint8_t, 2> to(begins.data(), {2, 10});
  const std::vector<index_t> long_ones{3, 11};
  check_error(restkv::find_segments(of, long_ones, to, scratch), errc::invalid_argument, {1, 11, 10});
  CHECK(restkv::find_segments(of, {}, {begins.data(), {2, 9}}, scratch).code() == errc::shape_mismatch);
  CHECK(restkv::find_segments(of, {}, to, scratch, 1.5).code() == errc::invalid_argument);
  CHECK(restkv::find_segments(of, {}, to, scratch, std::nan("")).code() == errc::invalid_argument);
  CHECK(restkv::find_segments(of, {}, to, std::span(scratch).first(9)).code() == errc::workspace_too_small);
  CHECK(begins == std::vector<std::uint8_t>(20, 7));
  const std::vector<index_t> short_ones{3, 0};
  REQUIRE(restkv::find_segments(of, short_ones, to, scratch, 1.0).ok());
  CHECK(begins == std::vector<std::uint8_t>{1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
}
