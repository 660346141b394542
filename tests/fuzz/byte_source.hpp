// SPDX-License-Identifier: Apache-2.0
// Numbers and tensors made of the bytes a fuzzer hands over.
#pragma once

#include <restkv/core/tensor_view.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace restkv_test {

using restkv::index_t;
using restkv::tensor_view;

inline void require(bool condition) {
  if (!condition) std::abort();
}

/// Numbers read off the input; behind its end those of a fixed generator, so that short inputs make whole cases too.
class byte_source {
 public:
  byte_source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() {
    if (size_ == 0) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      return static_cast<std::uint8_t>(state_ >> 56);
    }
    --size_;
    return *data_++;
  }
  bool flag() { return (byte() & 1) != 0; }
  /// True for one byte in `times`.
  bool chance(int times) { return byte() % times == times - 1; }
  /// In [low, high], of fewer than 65536 numbers.
  index_t within(index_t low, index_t high) {
    const auto range = high - low + 1;
    const index_t drawn = range <= 256 ? byte() : byte() * 256 + byte();
    return low + drawn % range;
  }
  index_t any_number() {
    std::uint64_t number = 0;
    for (int i = 0; i < 8; ++i) number = number << 8 | byte();
    return static_cast<index_t>(number);
  }
  /// Mostly a sensible parameter in (0, 1], sometimes any float.
  float parameter() {
    if (chance(50)) return std::bit_cast<float>(static_cast<std::uint32_t>(any_number()));
    return static_cast<float>(byte() + 1) / 256.0f;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::uint64_t state_ = 1;
};

/// A tensor in a buffer that ends where its elements end, on both sides.
template <class T, std::size_t Rank>
struct exact_tensor {
  std::vector<T> memory;
  tensor_view<T, Rank> view;

  exact_tensor() = default;
  explicit exact_tensor(const std::array<index_t, Rank>& extents)
      : exact_tensor(extents, tensor_view<T, Rank>(nullptr, extents).strides) {}
  exact_tensor(const std::array<index_t, Rank>& extents, const std::array<index_t, Rank>& strides)
      : view(nullptr, extents, strides) {
    index_t low = 0;
    index_t high = 0;
    for (std::size_t axis = 0; axis < Rank; ++axis) {
      const index_t reach = std::max<index_t>(extents[axis] - 1, 0) * strides[axis];
      (reach < 0 ? low : high) += reach;
    }
    memory.resize(static_cast<std::size_t>(high - low + 1));
    memory.shrink_to_fit();
    view.data = memory.data() - low;
  }
};

/// A tensor with axes in any order, gaps, some reversed, some repeated; or any strides at all, so that elements
/// overlap.
template <class T, std::size_t Rank>
exact_tensor<T, Rank> strided_tensor(const std::array<index_t, Rank>& extents, byte_source& bytes) {
  if (bytes.flag()) return exact_tensor<T, Rank>(extents);
  std::array<index_t, Rank> strides{};
  std::array<std::size_t, Rank> order{};
  for (std::size_t axis = 0; axis < Rank; ++axis) order[axis] = axis;
  for (std::size_t i = Rank - 1; i > 0; --i) {
    std::swap(order[i], order[static_cast<std::size_t>(bytes.within(0, static_cast<index_t>(i)))]);
  }
  const bool overlapping = bytes.chance(4);
  index_t step = 1;
  for (const std::size_t axis : order) {
    const index_t gap = bytes.within(0, 2);
    const bool reversed = bytes.chance(4);
    const bool repeated = bytes.chance(12);
    strides[axis] = overlapping ? bytes.within(-9, 9) : repeated ? 0 : (step + gap) * (reversed ? -1 : 1);
    step = (step + gap) * std::max<index_t>(extents[axis], 1);
  }
  return exact_tensor<T, Rank>(extents, strides);
}

/// Makes a view smaller than its memory, or one that no memory has: what is refused, or is safe.
template <class T, std::size_t Rank>
void damage(tensor_view<T, Rank>& view, byte_source& bytes) {
  const auto axis = static_cast<std::size_t>(bytes.within(0, static_cast<index_t>(Rank) - 1));
  constexpr index_t large = index_t(1) << 61;
  const index_t huge =
      bytes.flag() ? (bytes.any_number() & INT64_MAX) | large : -((bytes.any_number() & INT64_MAX) | large);
  switch (bytes.within(0, 4)) {
    case 0:
      view.data = nullptr;
      break;
    case 1:
      view.extents[axis] -= 1;
      break;
    case 2:
      view.extents[axis] = huge;
      break;
    case 3:
      if (view.extents[axis] > 1) view.strides[axis] = huge;
      break;
    default:
      view.extents.fill(index_t(1) << (Rank > 1 ? 32 : 62));  // a product of 0 in 64 bits
      break;
  }
}

}  // namespace restkv_test
