// SPDX-License-Identifier: Apache-2.0
#include "support/check_error.hpp"
#include "support/random.hpp"

#include <restkv/selection/kept_tokens.hpp>
#include <restkv/selection/protection.hpp>

#include <functional>
#include <limits>
#include <set>
#include <type_traits>

using namespace restkv_test;
using restkv::check_kept;
using restkv::const_kept_tokens;
using restkv::errc;
using restkv::kept_tokens;
using restkv::position_t;
using restkv::protection;

namespace {

static_assert(std::is_trivially_copyable_v<kept_tokens>);
static_assert(std::is_convertible_v<kept_tokens, const_kept_tokens>);
static_assert(!std::is_convertible_v<const_kept_tokens, kept_tokens>);

/// [2 sequences, 4 heads], capacity 5: head h of sequence b keeps 1 + (b + h) % 5 tokens, every second one.
struct good_set {
  std::vector<position_t> positions = std::vector<position_t>(2 * 4 * 5, -1);
  std::vector<position_t> lengths = std::vector<position_t>(2 * 4);
  kept_tokens set{{positions.data(), {2, 4, 5}}, {lengths.data(), {2, 4}}};

  good_set() {
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        set.lengths(b, h) = static_cast<position_t>(1 + (b + h) % 5);
        for (index_t i = 0; i < set.lengths(b, h); ++i) set.positions(b, h, i) = static_cast<position_t>(2 * i + b);
      }
    }
  }
};

}  // namespace

TEST_CASE("a kept set in order passes for its cache") {
  const good_set good;
  CHECK(check_kept(good.set, 2, 4, 10).ok());
  CHECK(check_kept(good.set, 2, 2, 10).ok());  // one set per query head of 2 KV heads
  CHECK(check_kept(good.set, 2, 1, 10).ok());
  CHECK(good.set.batch() == 2);
  CHECK(good.set.heads() == 4);
  CHECK(good.set.capacity() == 5);
  CHECK(good.set.total() == (1 + 2 + 3 + 4) + (2 + 3 + 4 + 5));
}

TEST_CASE("every fault of a kept set is named with both numbers") {
  const good_set good;
  check_error(check_kept(good.set, 3, 4, 10), errc::shape_mismatch, {2, 3}, "sequences");
  check_error(check_kept(good.set, 2, 3, 10), errc::shape_mismatch, {4, 3}, "heads");
  check_error(check_kept(good.set, 2, 8, 10), errc::shape_mismatch, {4, 8}, "heads");
  check_error(check_kept(good.set, 2, 0, 10), errc::shape_mismatch, {4, 0}, "heads");
  check_error(check_kept(good.set, 2, 4, 9), errc::invalid_argument, {9, 4, 3, 1}, "position");  // 9 at slot 4
  struct fault {
    errc code;
    std::vector<index_t> numbers;
    std::function<void(good_set&)> damage;
  };
  const std::vector<fault> faults{
      {errc::shape_mismatch, {3, 4, 2}, [](good_set& g) { g.set.positions.extents = {3, 4, 5}; }},
      {errc::shape_mismatch, {2, 3, 4}, [](good_set& g) { g.set.positions.extents = {2, 3, 5}; }},
      {errc::invalid_argument, {-1, 5, 3, 1}, [](good_set& g) { g.set.lengths(1, 3) = -1; }},
      {errc::invalid_argument, {6, 5, 0, 1}, [](good_set& g) { g.set.lengths(1, 0) = 6; }},
      {errc::invalid_argument, {2, 3, 0, 10}, [](good_set& g) { g.set.positions(0, 3, 2) = 2; }},  // twice
      {errc::invalid_argument, {1, 2, 3, 0}, [](good_set& g) { g.set.positions(0, 3, 2) = 1; }},   // falls
      {errc::invalid_argument, {-3, 0, -1, 10}, [](good_set& g) { g.set.positions(0, 0, 0) = -3; }},
      {errc::invalid_argument, {10, 3, 10}, [](good_set& g) { g.set.positions(0, 3, 3) = 10; }},
  };
  for (std::size_t i = 0; i < faults.size(); ++i) {
    good_set bad;
    faults[i].damage(bad);
    CAPTURE(i);
    check_error(check_kept(bad.set, 2, 4, 10), faults[i].code, faults[i].numbers);
  }
}

TEST_CASE("what lies behind a head's length is nobody's business") {
  good_set good;
  for (auto& position : good.positions) {
    if (position == -1) position = std::numeric_limits<position_t>::max();
  }
  CHECK(check_kept(good.set, 2, 4, 10).ok());
  for (auto& length : good.lengths) length = 0;
  CHECK(check_kept(good.set, 2, 4, 0).ok());
  CHECK(good.set.total() == 0);
}

TEST_CASE("random sets pass exactly when they are ascending, unique and in range") {
  random_engine random(1);
  int passed = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    const index_t tokens = pick(random, 0, 8);
    const index_t capacity = pick(random, 0, 5);
    std::vector<position_t> positions(static_cast<std::size_t>(std::max<index_t>(capacity, 1)));
    for (auto& position : positions) position = static_cast<position_t>(pick(random, -1, tokens));
    if (chance(random, 60)) std::sort(positions.begin(), positions.end());
    position_t length = static_cast<position_t>(pick(random, -1, capacity + 1));
    const kept_tokens set{{positions.data(), {1, 1, capacity}}, {&length, {1, 1}}};
    bool fits = length >= 0 && length <= capacity;
    if (fits) {
      std::set<position_t> unique;
      for (position_t i = 0; i < length; ++i) {
        const position_t position = positions[static_cast<std::size_t>(i)];
        fits = fits && position >= 0 && position < tokens && unique.insert(position).second &&
               *unique.rbegin() == position;
      }
    }
    CAPTURE(positions, length, tokens, capacity);
    CHECK(check_kept(set, 1, 1, tokens).ok() == fits);
    passed += fits ? 1 : 0;
  }
  CHECK(passed > 500);
  CHECK(passed < 2500);
}

TEST_CASE("an empty batch is a kept set") {
  const kept_tokens none{{nullptr, {0, 4, 5}}, {nullptr, {0, 4}}};
  CHECK(check_kept(none, 0, 4, 10).ok());
  CHECK(none.total() == 0);
}

TEST_CASE("protection is a number of tokens at each end") {
  CHECK(protection{}.check().ok());
  CHECK(protection{.sink = 0, .recent = 0}.check().ok());
  constexpr index_t most = std::numeric_limits<position_t>::max();
  CHECK(protection{.sink = most, .recent = most}.check().ok());
  check_error(protection{.sink = -1, .recent = 32}.check(), errc::invalid_argument, {-1, 32}, "sink");
  check_error(protection{.sink = 4, .recent = -7}.check(), errc::invalid_argument, {4, -7}, "recent");
  // Beyond the longest axis: their sum must not overflow.
  check_error(protection{.sink = most + 1, .recent = 0}.check(), errc::invalid_argument, {most + 1, most}, "sink");
  check_error(protection{.sink = 0, .recent = std::numeric_limits<index_t>::max()}.check(), errc::invalid_argument,
              {most}, "recent");
}
