// SPDX-License-Identifier: Apache-2.0
#include "support/catch.hpp"
#include "support/guarded_tensor.hpp"

#include <restkv/core/tensor_view.hpp>

#include <algorithm>
#include <type_traits>

using namespace restkv_test;
using restkv::byte_range;
using restkv::chunked_tensor_view;
using restkv::memory_space;
using restkv::touched_bytes;

namespace {

using view = tensor_view<float, 3>;

static_assert(std::is_trivially_copyable_v<view> && std::is_trivially_copyable_v<chunked_tensor_view<float>>);
static_assert(std::is_convertible_v<view, tensor_view<const float, 3>>);
static_assert(!std::is_convertible_v<tensor_view<const float, 3>, view>);
static_assert(!std::is_convertible_v<view, tensor_view<float, 3, memory_space::device>>);
static_assert(!std::is_convertible_v<view, tensor_view<const float, 2>>);
static_assert(std::is_convertible_v<tensor_view<float, 4>, chunked_tensor_view<const float>>);
static_assert(!std::is_convertible_v<tensor_view<const float, 4>, chunked_tensor_view<float>>);
static_assert(!std::is_invocable_v<view, int, int>, "an index for every axis is needed");

/// Any extents from 0 to 5 and any strides from -20 to 20, around the middle of a buffer of `buffer_size`.
constexpr index_t buffer_size = 1000;

view random_view(random_engine& random, float* buffer) {
  view v;
  v.data = buffer + buffer_size / 2;
  for (std::size_t axis = 0; axis < 3; ++axis) {
    v.extents[axis] = pick(random, 0, 5);
    v.strides[axis] = pick(random, -20, 20);
  }
  return v;
}

/// The address of every element, in row-major order of their indices.
std::vector<const float*> addresses(const view& v) {
  std::vector<const float*> all;
  for (index_t i = 0; i < v.extents[0]; ++i) {
    for (index_t j = 0; j < v.extents[1]; ++j) {
      for (index_t k = 0; k < v.extents[2]; ++k) {
        all.push_back(v.data + i * v.strides[0] + j * v.strides[1] + k * v.strides[2]);
      }
    }
  }
  return all;
}

}  // namespace

TEST_CASE("a view addresses its elements by its strides") {
  random_engine random(1);
  std::vector<float> buffer(buffer_size);
  for (int trial = 0; trial < 2000; ++trial) {
    const view v = random_view(random, buffer.data());
    CAPTURE(v.extents, v.strides);
    const auto all = addresses(v);
    CHECK(v.size() == static_cast<index_t>(all.size()));
    CHECK(v.empty() == all.empty());
    std::size_t at = 0;
    bool same = true;
    for (index_t i = 0; i < v.extent(0); ++i) {
      const auto part = v[i];
      same = same && part.extents == std::array{v.extent(1), v.extent(2)} &&
             part.strides == std::array{v.stride(1), v.stride(2)};
      for (index_t j = 0; j < v.extent(1); ++j) {
        for (index_t k = 0; k < v.extent(2); ++k, ++at) {
          same = same && &v(i, j, k) == all[at] && v.data + v.offset(i, j, k) == all[at];
          same = same && &part(j, k) == all[at] && &part[j](k) == all[at] && v.contains(i, j, k);
        }
      }
    }
    CHECK(same);
    CHECK(at == all.size());
    CHECK_FALSE(v.contains(v.extent(0), 0, 0));
    CHECK_FALSE(v.contains(0, -1, 0));
    CHECK_FALSE(v.contains(0, 0, v.extent(2)));
    const tensor_view<const float, 3> read = v;
    CHECK((read.data == v.data && read.extents == v.extents && read.strides == v.strides));
  }
}

TEST_CASE("a slice is the part of an axis it names") {
  random_engine random(2);
  std::vector<float> buffer(buffer_size);
  for (int trial = 0; trial < 2000; ++trial) {
    const view v = random_view(random, buffer.data());
    const auto axis = static_cast<std::size_t>(pick(random, 0, 2));
    const index_t begin = pick(random, 0, v.extent(axis));
    const index_t count = pick(random, 0, v.extent(axis) - begin);
    const view part = v.slice(axis, begin, count);
    CAPTURE(v.extents, v.strides, axis, begin, count);
    CHECK(part.strides == v.strides);
    bool same = true;
    for (index_t i = 0; i < part.extent(0); ++i) {
      for (index_t j = 0; j < part.extent(1); ++j) {
        for (index_t k = 0; k < part.extent(2); ++k) {
          const std::array<index_t, 3> whole{i + (axis == 0 ? begin : 0), j + (axis == 1 ? begin : 0),
                                             k + (axis == 2 ? begin : 0)};
          same = same && &part(i, j, k) == &v(whole[0], whole[1], whole[2]);
        }
      }
    }
    CHECK(same);
    CHECK(part.extent(axis) == count);
  }
  // Nothing is added to a null pointer.
  const view nothing(nullptr, {0, 4, 5});
  CHECK(nothing.slice(1, 2, 1).data == nullptr);
  CHECK(nothing[0].data == nullptr);
  CHECK(nothing.empty());
  CHECK(view(buffer.data(), {2, 0, 3}).empty());
  CHECK(view().empty());
}

TEST_CASE("dense says whether elements follow each other in row-major order") {
  random_engine random(3);
  std::vector<float> buffer(buffer_size);
  int dense = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    view v(buffer.data() + buffer_size / 2, {pick(random, 1, 4), pick(random, 1, 4), pick(random, 1, 4)});
    if (trial % 2 == 1) v.strides[static_cast<std::size_t>(pick(random, 0, 2))] = pick(random, -4, 16);
    const auto all = addresses(v);
    bool follow = true;
    for (std::size_t i = 0; i < all.size(); ++i) follow = follow && all[i] == all[0] + i;
    CAPTURE(v.extents, v.strides);
    CHECK(v.dense() == follow);
    dense += follow ? 1 : 0;
  }
  CHECK(dense > 2000);
  CHECK(dense < 3500);
}

TEST_CASE("touched_bytes are the bounds of the elements, and ranges overlap when they share a byte") {
  random_engine random(4);
  std::vector<float> buffer(buffer_size);
  const auto bytes = [&](const float* p) { return reinterpret_cast<const unsigned char*>(p); };
  view previous(buffer.data(), {1, 1, 1});
  int overlaps = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const view v = random_view(random, buffer.data());
    CAPTURE(v.extents, v.strides);
    const byte_range range = touched_bytes(v);
    const auto all = addresses(v);
    if (all.empty()) {
      CHECK(range.first == range.last);
      CHECK_FALSE(range.overlaps(range));
      continue;
    }
    CHECK(range.first == bytes(*std::min_element(all.begin(), all.end())));
    CHECK(range.last == bytes(*std::max_element(all.begin(), all.end()) + 1));
    const byte_range other = touched_bytes(previous);
    bool shared = false;
    for (const unsigned char* p = range.first; p != range.last; ++p) {
      shared = shared || (p >= other.first && p < other.last);
    }
    CHECK(range.overlaps(other) == shared);
    CHECK(other.overlaps(range) == shared);
    overlaps += shared ? 1 : 0;
    previous = v;
    previous.data += pick(random, -200, 200);
  }
  CHECK(overlaps > 100);
  CHECK(overlaps < 1900);
  const byte_range left = touched_bytes(view(buffer.data(), {1, 1, 4}));
  const byte_range right = touched_bytes(view(buffer.data() + 4, {1, 1, 4}));
  CHECK_FALSE(left.overlaps(right));
}

TEST_CASE("a chunked view finds every token of its chunks") {
  random_engine random(5);
  std::vector<float> buffer(4000);
  for (int trial = 0; trial < 500; ++trial) {
    const index_t batch = pick(random, 1, 2);
    const index_t heads = pick(random, 1, 3);
    const index_t channels = pick(random, 1, 4);
    std::vector<tensor_view<float, 4>> chunks;
    std::vector<std::pair<std::size_t, index_t>> place;  // of each token: chunk, and position in it
    const auto count = static_cast<std::size_t>(pick(random, 1, 5));
    for (std::size_t i = 0; i < count; ++i) {
      const index_t tokens = chance(random, 30) ? 0 : pick(random, 1, 6);
      chunks.push_back({buffer.data() + pick(random, 0, 1000), {batch, heads, tokens, channels}});
      for (index_t n = 0; n < tokens; ++n) place.emplace_back(i, n);
    }
    const chunked_tensor_view<float> all(chunks.data(), static_cast<index_t>(count));
    CHECK_FALSE(all.missing());
    CHECK(all.chunks() == static_cast<index_t>(count));
    CHECK(all.extent(0) == batch);
    CHECK(all.extent(1) == heads);
    CHECK(all.extent(2) == static_cast<index_t>(place.size()));
    CHECK(all.extent(3) == channels);
    for (std::size_t token = 0; token < place.size(); ++token) {
      const auto [chunk, position] = place[token];
      const auto part = all.from_token(static_cast<index_t>(token));
      CAPTURE(token, chunk, position);
      REQUIRE(part.extent(2) == chunks[chunk].extent(2) - position);
      CHECK(&part(batch - 1, heads - 1, 0, channels - 1) ==
            &chunks[chunk](batch - 1, heads - 1, position, channels - 1));
    }
    CHECK(all.from_token(static_cast<index_t>(place.size())).data == nullptr);
  }
}

TEST_CASE("one view is a chunked view of one chunk, and none is missing") {
  std::vector<float> buffer(2 * 3 * 5 * 4);
  const tensor_view<float, 4> whole(buffer.data(), {2, 3, 5, 4});
  const chunked_tensor_view<const float> single = whole;
  CHECK(single.chunks() == 1);
  CHECK(single.chunk(0).data == buffer.data());
  for (std::size_t axis = 0; axis < 4; ++axis) CHECK(single.extent(axis) == whole.extent(axis));
  CHECK(&single.from_token(3)(1, 2, 1, 3) == &whole(1, 2, 4, 3));
  const chunked_tensor_view<const float> none;
  CHECK(none.missing());
  CHECK(none.extent(0) == 0);
  CHECK(none.extent(2) == 0);
  CHECK(none.from_token(0).data == nullptr);
  CHECK_FALSE(single.missing());
}
