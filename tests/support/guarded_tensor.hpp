// SPDX-License-Identifier: Apache-2.0
// Tensors of random strides inside guarded memory. Needs no test framework: fuzzers and benchmarks may use it.
#pragma once

#include "support/random.hpp"

#include <restkv/core/tensor_view.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

namespace restkv_test {

using restkv::tensor_view;

/// Memory with guards in front, behind and in the gaps between elements, all of it random bytes. A test says what it
/// expects by writing into a copy and comparing everything.
template <class T, std::size_t Rank>
class guarded_tensor {
 public:
  struct options {
    bool contiguous_channels = false;  ///< last axis innermost with stride 1
    bool row_major = false;            ///< all axes in their order
    bool reversed_axes = false;        ///< allow negative strides
    bool gaps = true;
  };

  guarded_tensor(random_engine& random, const std::array<index_t, Rank>& extents, options how) {
    std::array<std::size_t, Rank> order;  // innermost first
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::shuffle(order.begin(), order.end(), random);
    if (how.row_major) std::iota(order.rbegin(), order.rend(), std::size_t{0});
    if (how.contiguous_channels) {
      std::iter_swap(order.begin(), std::find(order.begin(), order.end(), Rank - 1));
    }
    std::array<index_t, Rank> strides{};
    index_t step = 1;
    index_t first = guard;
    for (const std::size_t axis : order) {
      if (how.gaps && !(how.contiguous_channels && axis == Rank - 1)) step += pick(random, 0, 2);
      strides[axis] = step;
      step *= std::max<index_t>(extents[axis], 1);
      if (how.reversed_axes && !(how.contiguous_channels && axis == Rank - 1) && chance(random, 25)) {
        first += (std::max<index_t>(extents[axis], 1) - 1) * strides[axis];
        strides[axis] = -strides[axis];
      }
    }
    memory_.resize(static_cast<std::size_t>(step + 2 * guard));
    for (T& element : memory_) {
      unsigned char bytes[sizeof(T)];
      for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
      std::memcpy(static_cast<void*>(&element), bytes, sizeof(T));
    }
    view_ = {memory_.data() + first, extents, strides};
  }
  guarded_tensor(const guarded_tensor& other) : memory_(other.memory_), view_(other.view_) {
    view_.data = memory_.data() + (other.view_.data - other.memory_.data());
  }
  guarded_tensor& operator=(const guarded_tensor&) = delete;

  [[nodiscard]] const tensor_view<T, Rank>& view() const { return view_; }
  [[nodiscard]] tensor_view<const T, Rank> read() const { return view_; }

  /// Every byte, guards and gaps included.
  [[nodiscard]] bool same_bytes(const guarded_tensor& other) const {
    return memory_.size() == other.memory_.size() &&
           std::memcmp(memory_.data(), other.memory_.data(), memory_.size() * sizeof(T)) == 0;
  }

 private:
  static constexpr index_t guard = 16;
  std::vector<T> memory_;
  tensor_view<T, Rank> view_;
};

/// Calls `body` for every element, in row-major order.
template <class T, std::size_t Rank, class Body>
void for_each(const tensor_view<T, Rank>& view, Body&& body) {
  for (index_t i = 0; i < view.extent(0); ++i) {
    if constexpr (Rank == 1) {
      body(view(i));
    } else {
      for_each(view[i], body);
    }
  }
}

template <class T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

}  // namespace restkv_test
