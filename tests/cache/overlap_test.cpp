// SPDX-License-Identifier: Apache-2.0
#include "cache/cache_support.hpp"

#include <restkv/cache/overlap.hpp>

#include <set>

using namespace restkv_test;
using restkv::may_overlap;
using restkv::may_overlap_itself;

namespace {

/// Every address a view can name, element by element.
template <class T>
std::vector<const unsigned char*> addresses(const tensor_view<T, 3>& view) {
  std::vector<const unsigned char*> found;
  for (index_t i = 0; i < view.extent(0); ++i) {
    for (index_t j = 0; j < view.extent(1); ++j) {
      for (index_t k = 0; k < view.extent(2); ++k) {
        found.push_back(reinterpret_cast<const unsigned char*>(&view(i, j, k)));
      }
    }
  }
  return found;
}

template <class T, class U>
bool share_memory(const tensor_view<T, 3>& a, const tensor_view<U, 3>& b) {
  std::set<const unsigned char*> bytes;
  for (const unsigned char* first : addresses(a)) {
    for (std::size_t i = 0; i < sizeof(T); ++i) bytes.insert(first + i);
  }
  for (const unsigned char* first : addresses(b)) {
    for (std::size_t i = 0; i < sizeof(U); ++i) {
      if (bytes.count(first + i) != 0) return true;
    }
  }
  return false;
}

template <class T>
bool repeats_memory(const tensor_view<T, 3>& view) {
  const auto all = addresses(view);
  return std::set<const unsigned char*>(all.begin(), all.end()).size() != all.size();
}

}  // namespace

TEST_CASE("may_overlap_itself: a repeated element is always found, and dense tensors are never suspected") {
  random_engine random(1);
  std::vector<float> memory(4096);
  int repeating = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    const std::array<index_t, 3> extents{pick(random, 0, 4), pick(random, 1, 4), pick(random, 1, 4)};
    const std::array<index_t, 3> strides{pick(random, -20, 20), pick(random, -20, 20), pick(random, -20, 20)};
    const tensor_view<float, 3> view(memory.data() + 2048, extents, strides);
    const bool repeats = repeats_memory(view);
    repeating += repeats ? 1 : 0;
    if (repeats) CHECK(may_overlap_itself(view));
  }
  CHECK(repeating > 100);
  for (int trial = 0; trial < 1000; ++trial) {
    const guarded_tensor<float, 3> tensor(random, {pick(random, 0, 4), pick(random, 1, 4), pick(random, 1, 4)},
                                          {.reversed_axes = true});
    CHECK_FALSE(may_overlap_itself(tensor.view()));
  }
}

TEST_CASE("may_overlap: exact for slices of one tensor, never blind otherwise") {
  random_engine random(2);
  std::array<int, 2> outcomes{};
  for (int trial = 0; trial < 4000; ++trial) {
    const guarded_tensor<float, 3> tensor(random, {6, 7, 8}, {.reversed_axes = true});
    const auto slice = [&] {
      tensor_view<float, 3> part = tensor.view();
      for (std::size_t axis = 0; axis < 3; ++axis) {
        const index_t begin = pick(random, 0, part.extent(axis) - 1);
        part = part.slice(axis, begin, pick(random, 1, part.extent(axis) - begin));
      }
      return part;
    };
    const auto a = slice();
    const auto b = slice();
    const bool shares = share_memory(a, b);
    ++outcomes[shares ? 1 : 0];
    CHECK(may_overlap(a, b) == shares);
    CHECK(may_overlap(b, a) == shares);
  }
  CHECK(outcomes[0] > 500);
  CHECK(outcomes[1] > 500);

  // Any strides, elements of two sizes: no overlap is missed.
  std::vector<float> memory(4096);
  for (int trial = 0; trial < 4000; ++trial) {
    const auto strides = [&] {
      return std::array<index_t, 3>{pick(random, -30, 30), pick(random, -30, 30), pick(random, -30, 30)};
    };
    const auto extents = [&] {
      return std::array<index_t, 3>{pick(random, 1, 3), pick(random, 1, 3), pick(random, 1, 3)};
    };
    const auto strides_of_a = strides();
    const tensor_view<float, 3> a(memory.data() + 2048, extents(), strides_of_a);
    const auto first = reinterpret_cast<unsigned char*>(memory.data() + 2048) + pick(random, -200, 200);
    auto like_a = a.strides;
    for (index_t& stride : like_a) stride *= 4;
    const auto strides_of_b = chance(random, 50) ? strides() : like_a;
    const tensor_view<unsigned char, 3> b(first, extents(), strides_of_b);
    if (share_memory(a, b)) CHECK(may_overlap(a, b));
  }
}

TEST_CASE("may_overlap: keys and values interleaved in one buffer are apart") {
  std::vector<restkv::half> memory(2 * 5 * 2 * 3 * 4);
  const tensor_view<restkv::half, 5> both(memory.data(), {2, 5, 2, 3, 4});  // [batch, tokens, key or value, heads, d]
  const auto part = [&](index_t which) {
    return tensor_view<restkv::half, 4>(memory.data() + which * both.stride(2), {2, 3, 5, 4},
                                        {both.stride(0), both.stride(3), both.stride(1), both.stride(4)});
  };
  CHECK(restkv::touched_bytes(part(0)).overlaps(restkv::touched_bytes(part(1))));
  CHECK_FALSE(may_overlap(part(0), part(1)));
  CHECK(may_overlap(part(0), part(0)));
  CHECK_FALSE(may_overlap_itself(part(0)));
}
