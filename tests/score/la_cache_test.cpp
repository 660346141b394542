// SPDX-License-Identifier: Apache-2.0
// The ladder of LaCache: published patterns, the same by lists of positions, and repeated eviction.
#include "score/head_support.hpp"
#include "support/check_error.hpp"

#include <restkv/selection/la_cache.hpp>

#include <set>

using namespace restkv_test;
using restkv::errc;
using restkv::la_cache;
using restkv::la_cache_eviction;
using restkv::la_cache_state;
using restkv::position_t;

namespace {

using positions = std::vector<index_t>;

positions kept_of(const la_cache_eviction& eviction, index_t layer) {
  std::vector<position_t> room(static_cast<std::size_t>(eviction.length()), -1);
  index_t count = -1;
  REQUIRE(eviction.keep(layer, room, count).ok());
  return {room.begin(), room.begin() + count};
}

positions range(index_t begin, index_t end) {
  positions out;
  for (index_t n = begin; n < end; ++n) out.push_back(n);
  return out;
}

positions join(const std::vector<positions>& parts) {
  positions out;
  for (const positions& part : parts) out.insert(out.end(), part.begin(), part.end());
  return out;
}

index_t ceil_div(index_t a, index_t b) {
  return static_cast<index_t>(std::ceil(static_cast<double>(a) / static_cast<double>(b)));
}

/// Lists of positions, thinned once, and a second time where the ladder starts over.
struct plain_ladder {
  index_t layers, size, start, span, overlap;
  bool compensation;
  index_t cursor = start;
  bool first = true;

  [[nodiscard]] index_t block() const { return 1 + ceil_div(layers - span, span - overlap); }
  [[nodiscard]] index_t rung() const { return std::min(ceil_div(span, span - overlap), block()); }

  static positions thin(const positions& from, index_t begin, index_t shift, index_t block, index_t rung,
                        index_t stride, index_t blocks) {
    std::set<index_t> chosen;
    const auto length = static_cast<index_t>(from.size());
    for (index_t n = 0; n < std::min(begin, length); ++n) chosen.insert(n);
    for (index_t j = 0; j < blocks; ++j) {
      for (index_t k = 0; k < rung; ++k) chosen.insert(begin + shift + block * j + stride * k);
    }
    for (index_t n = begin + block * blocks; n < length; ++n) chosen.insert(n);
    positions out;
    for (const index_t n : chosen) {
      if (n < length) out.push_back(from[static_cast<std::size_t>(n)]);
    }
    return out;
  }

  /// What every layer keeps of a cache of `length` tokens.
  std::vector<positions> evict(index_t length) {
    std::vector<positions> kept(static_cast<std::size_t>(layers), range(0, length));
    if (length <= size) return kept;
    const index_t b = block();
    const index_t r = rung();
    const index_t loss = b - r;
    if (compensation && first) size += static_cast<index_t>(std::floor(static_cast<double>(loss) / 2));
    first = false;
    const index_t excess = length - size;
    if (excess <= 0) return kept;
    const index_t room = std::max<index_t>(size - cursor - layers, 0);
    const index_t possible = room / r * loss;
    const index_t increment = excess <= possible ? ceil_div(excess, loss) * r : room;
    for (index_t i = 0; i < layers; ++i) {
      auto& mine = kept[static_cast<std::size_t>(i)];
      mine = thin(mine, cursor, i % (loss + 1), b, r, 1, increment / r);
    }
    if (excess <= possible) {
      cursor += increment;
      return kept;
    }
    const index_t one = (size - start - layers) / r * loss;
    const index_t left = excess - possible;
    const index_t t = ceil_div(left, one);
    const index_t wide = b + (t - 1) * (b - 1);
    const index_t blocks = ceil_div(left, wide - r);
    for (index_t i = 0; i < layers; ++i) {
      auto& mine = kept[static_cast<std::size_t>(i)];
      mine = thin(mine, start, i % (wide - r + 1), wide, r, t, blocks);
    }
    cursor = start + blocks * r;
    return kept;
  }
};

}  // namespace

TEST_CASE("Ladders of the release, without compensation") {
  const auto evict = [](index_t layers, index_t length, const la_cache& ladder) {
    la_cache_eviction eviction;
    REQUIRE(ladder.evict(layers, length, ladder.begin(), eviction).ok());
    return eviction;
  };
  SECTION("one block") {
    const auto made = evict(4, 18, {.cache_size = 16, .start = 4, .span = 2, .overlap = 0, .compensation = false});
    for (const index_t layer : {0, 2}) CHECK(kept_of(made, layer) == join({range(0, 4), {4, 6}, range(8, 18)}));
    for (const index_t layer : {1, 3}) CHECK(kept_of(made, layer) == join({range(0, 4), {5, 7}, range(8, 18)}));
    CHECK(made.state().cursor == 6);
  }
  SECTION("overlapping rungs") {
    const auto made = evict(8, 30, {.cache_size = 24, .start = 4, .span = 4, .overlap = 2, .compensation = false});
    const positions even{0, 1, 2, 3, 4, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19, 20};
    const positions odd{0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21};
    for (index_t layer = 0; layer < 8; ++layer) {
      CHECK(kept_of(made, layer) == join({layer % 2 == 0 ? even : odd, range(22, 30)}));
    }
    CHECK(made.state().cursor == 16);
  }
  SECTION("start over") {
    const auto made = evict(4, 40, {.cache_size = 16, .start = 4, .span = 2, .overlap = 0, .compensation = false});
    const std::vector<positions> middle{{4, 10, 16, 21, 24, 27, 30, 33},
                                        {7, 13, 19, 22, 25, 28, 31, 34},
                                        {8, 14, 20, 23, 26, 29, 32, 35},
                                        {5, 11, 17, 21, 24, 27, 30, 33}};
    for (index_t layer = 0; layer < 4; ++layer) {
      CHECK(kept_of(made, layer) == join({range(0, 4), middle[static_cast<std::size_t>(layer)], range(36, 40)}));
    }
    CHECK(made.state().cursor == 12);
  }
}

TEST_CASE("Ladders by lists of positions, over many evictions of one cache") {
  random_engine random(1);
  int evictions = 0;
  int restarts = 0;
  for (int trial = 0; trial < 300; ++trial) {
    const index_t layers = pick(random, 2, 12);
    la_cache ladder{.start = pick(random, 0, 6), .span = pick(random, 1, layers), .compensation = chance(random, 50)};
    ladder.overlap = pick(random, 0, ladder.span - 1);
    ladder.cache_size = pick(random, 10, 60);
    if (!ladder.check(layers).ok()) continue;
    plain_ladder plain{layers, ladder.cache_size, ladder.start, ladder.span, ladder.overlap, ladder.compensation};
    la_cache_state state = ladder.begin();
    index_t length = pick(random, 0, 200);
    for (int step = 0; step < 12; ++step) {
      CAPTURE(trial, step, layers, ladder.span, ladder.overlap, ladder.start, length, state.cursor, state.capacity);
      la_cache_eviction made;
      REQUIRE(ladder.evict(layers, length, state, made).ok());
      const auto wanted = plain.evict(length);
      evictions += length > state.capacity ? 1 : 0;
      restarts += made.state().cursor < state.cursor ? 1 : 0;
      index_t longest = 0;
      for (index_t layer = 0; layer < layers; ++layer) {
        const auto mine = kept_of(made, layer);
        CHECK(mine == wanted[static_cast<std::size_t>(layer)]);
        longest = std::max(longest, static_cast<index_t>(mine.size()));
        for (index_t n = 0; n < std::min(ladder.start, length); ++n) CHECK(mine[static_cast<std::size_t>(n)] == n);
      }
      CHECK(longest <= std::max(made.state().capacity, std::min(length, state.capacity)));
      CHECK(made.state().capacity <= ladder.cache_size + (ladder.compensation ? layers : 0));
      CHECK(made.state().cursor == plain.cursor);
      state = made.state();
      length = longest + pick(random, 0, 3) * pick(random, 0, 40);
    }
  }
  CHECK(evictions > 300);
  CHECK(restarts > 50);
}

TEST_CASE("A ladder token by token: the cache stays within its capacity and reaches back to the beginning") {
  const la_cache ladder{.cache_size = 128, .start = 4, .span = 4};
  const index_t layers = 16;
  la_cache_state state = ladder.begin();
  std::vector<positions> cache(static_cast<std::size_t>(layers));  // original positions
  std::size_t longest = 0;
  for (index_t token = 0; token < 3000; ++token) {
    for (positions& mine : cache) mine.push_back(token);
    la_cache_eviction made;
    REQUIRE(ladder.evict(layers, static_cast<index_t>(cache[0].size()), state, made).ok());
    state = made.state();
    for (index_t layer = 0; layer < layers; ++layer) {
      positions next;
      for (const index_t n : kept_of(made, layer)) {
        next.push_back(cache[static_cast<std::size_t>(layer)][static_cast<std::size_t>(n)]);
      }
      cache[static_cast<std::size_t>(layer)] = next;
      longest = std::max(longest, next.size());
      REQUIRE(next.size() == cache[0].size());
      REQUIRE(next.back() == token);
    }
  }
  CHECK(static_cast<index_t>(longest) <= state.capacity);
  CHECK(state.capacity == 129);  // a block of 4 loses 3: half of it, once
  std::set<index_t> seen;
  for (const positions& mine : cache) seen.insert(mine.begin(), mine.end());
  CHECK(seen.size() > cache[0].size() + 20);
}

TEST_CASE("la_cache_score: the ladder first, then the newest") {
  random_engine random(2);
  random_cache<half> cache(random, {.batch = 2, .tokens = 40, .lengths = {40, 10}});
  cache.shape.layers = 4;
  const restkv::la_cache_score score{
      {.cache_size = 16, .start = 4, .span = 2, .overlap = 0, .compensation = false}};
  for (index_t layer = 0; layer < 4; ++layer) {
    cache.shape.layer = layer;
    REQUIRE(score.check(cache.shape).ok());
    la_cache_eviction made;
    REQUIRE(score.ladder.evict(4, 40, score.ladder.begin(), made).ok());
    const positions kept = kept_of(made, layer);
    row wanted;
    for (index_t n = 0; n < 40; ++n) wanted.push_back(static_cast<double>(n) / 40);
    for (const index_t n : kept) wanted[static_cast<std::size_t>(n)] = 1;
    check_row(scores_of<double>(score, cache.layer, cache.shape, 0, 0), wanted, 0);
    check_row(scores_of<float>(score, cache.layer, cache.shape, 0, 3), wanted, 1e-7);
    check_row(scores_of<float>(score, cache.layer, cache.shape, 1, 0), row(10, 1.0), 0);
  }
  static_assert(restkv::head_score<restkv::la_cache_score>);
}

TEST_CASE("Ladders that cannot be built are refused") {
  const la_cache good{.cache_size = 64, .start = 4, .span = 4, .overlap = 2};
  CHECK(good.check(8).ok());
  check_error(good.check(4), errc::invalid_argument, {4}, "layers");
  la_cache bad = good;
  bad.start = -1;
  check_error(bad.check(8), errc::invalid_argument, {-1, 0}, "start");
  bad = good;
  bad.overlap = 4;
  check_error(bad.check(8), errc::invalid_argument, {4}, "overlap");
  bad = {.cache_size = 64, .span = 7, .overlap = 6};  // blocks of 2, of which both are kept
  check_error(bad.check(8), errc::invalid_argument, {2, 7, 6, 8}, "block");
  bad = good;
  bad.cache_size = 13;
  check_error(bad.check(8), errc::invalid_argument, {13, 14}, "cache_size");
  la_cache_eviction eviction;
  check_error(good.evict(8, -1, good.begin(), eviction), errc::invalid_argument, {-1, 0}, "tokens");
  check_error(good.evict(8, 90, {.cursor = 3, .capacity = 64}, eviction), errc::invalid_argument, {3, 4, 56},
              "cursor");
  check_error(good.evict(8, 90, {.cursor = 57, .capacity = 64}, eviction), errc::invalid_argument, {57, 4, 56},
              "cursor");
  check_error(good.evict(8, 90, {.cursor = 4, .capacity = 73}, eviction), errc::invalid_argument, {73, 64, 72},
              "capacity");
  check_error(good.evict(8, 90, {.cursor = 4, .capacity = 63}, eviction), errc::invalid_argument, {63, 64},
              "capacity");
  REQUIRE(good.evict(8, 90, good.begin(), eviction).ok());
  std::vector<position_t> room(9, -1);
  index_t count = 77;
  check_error(eviction.keep(0, room, count), errc::shape_mismatch, {9}, "positions");
  CHECK(count == 77);
  CHECK(restkv::la_cache_score{good}.check({.layers = 4}).code() == errc::invalid_argument);
}
