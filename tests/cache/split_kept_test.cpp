// SPDX-License-Identifier: Apache-2.0
#include "cache/cache_support.hpp"

#include <restkv/cache/split_kept.hpp>

#include <array>

using namespace restkv_test;
using restkv::errc;
using restkv::kept_tokens;
using restkv::split_kept;

TEST_CASE("the parts of a kept set gather what the whole gathers") {
  random_engine random(81);
  for (int trial = 0; trial < 300; ++trial) {
    const index_t batch = pick(random, 0, 2), heads = pick(random, 1, 3), tokens = pick(random, 0, 20);
    const index_t boundary = pick(random, 0, tokens + 2);
    const random_kept made(random, batch, heads, tokens, tokens + 1);
    const auto kept = made.read();
    const guarded_tensor<position_t, 3> front(random, {batch, heads, tokens + 1}, {}),
        back(random, {batch, heads, tokens + 1}, {});
    const guarded_tensor<position_t, 2> front_lengths(random, {batch, heads}, {}),
        back_lengths(random, {batch, heads}, {});
    REQUIRE(split_kept(kept, boundary, {front.view(), front_lengths.view()}, {back.view(), back_lengths.view()}).ok());
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        std::vector<position_t> whole, parts;
        for (index_t i = 0; i < kept.lengths(b, h); ++i) whole.push_back(kept.positions(b, h, i));
        for (index_t i = 0; i < front_lengths.view()(b, h); ++i) {
          parts.push_back(front.view()(b, h, i));
          CHECK(parts.back() < boundary);
        }
        for (index_t i = 0; i < back_lengths.view()(b, h); ++i) {
          CHECK(back.view()(b, h, i) >= 0);
          parts.push_back(static_cast<position_t>(back.view()(b, h, i) + boundary));
        }
        CHECK(parts == whole);
      }
    }
  }
}

TEST_CASE("a kept set is not split into parts that do not fit") {
  std::array<position_t, 4> positions{1, 2, 5, 7}, front{-1, -1, -1, -1}, back{-1, -1, -1, -1};
  std::array<position_t, 1> length{4}, front_length{-1}, back_length{-1};
  const restkv::const_kept_tokens kept({positions.data(), {1, 1, 4}}, {length.data(), {1, 1}});
  const auto split = [&](index_t boundary, index_t front_room, index_t back_room) {
    return split_kept(kept, boundary, {{front.data(), {1, 1, front_room}}, {front_length.data(), {1, 1}}},
                      {{back.data(), {1, 1, back_room}}, {back_length.data(), {1, 1}}});
  };
  check_error(split(-1, 4, 4), errc::invalid_argument, {4, -1});
  check_error(split(5, 1, 4), errc::shape_mismatch, {2, 1}, "front");
  check_error(split(5, 2, 1), errc::shape_mismatch, {2, 1}, "back");
  length[0] = 5;
  check_error(split(5, 4, 4), errc::invalid_argument, {5, 4});
  length[0] = 4;
  const kept_tokens good({front.data(), {1, 1, 4}}, {front_length.data(), {1, 1}});
  check_error(split_kept(kept, 5, good, {{front.data(), {1, 1, 4}}, {back_length.data(), {1, 1}}}), errc::aliasing,
              {16});
  check_error(split_kept(kept, 5, good, {{positions.data(), {1, 1, 4}}, {back_length.data(), {1, 1}}}), errc::aliasing,
              {16});
  check_error(split_kept(kept, 5, good, {{back.data(), {1, 1, 4}}, {length.data(), {1, 1}}}), errc::aliasing, {4});
  check_error(split_kept(kept, 5, good, {{back.data(), {1, 2, 4}}, {back_length.data(), {1, 1}}}), errc::shape_mismatch,
              {2, 1});
  check_error(split_kept(kept, 5, good, {{nullptr, {1, 1, 4}}, {back_length.data(), {1, 1}}}), errc::missing_input,
              {4});
  CHECK(front[0] == -1);
  CHECK(front_length[0] == -1);
  CHECK(back_length[0] == -1);
  CHECK(split(5, 2, 2).ok());
  CHECK(front[1] == 2);
  CHECK(back[0] == 0);
  CHECK(back[1] == 2);
}
