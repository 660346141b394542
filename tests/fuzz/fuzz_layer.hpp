// SPDX-License-Identifier: Apache-2.0
// A layer made of the bytes a fuzzer hands over: sizes, strides, padding and masks from the bytes, numbers from a
// generator that they seed.
#pragma once

#include "support/layer_metric.hpp"

#include <restkv/core/layer.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace restkv_test {

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

template <class T>
class fuzz_layer {
 public:
  explicit fuzz_layer(byte_source& bytes) {
    const index_t batch = bytes.within(0, 2);
    const index_t kv_heads = bytes.within(1, 3);
    const index_t query_heads = kv_heads * bytes.within(1, 3);
    const index_t dim = bytes.within(1, 9);
    const index_t tokens = bytes.chance(4) ? bytes.within(0, 3) : bytes.within(4, 40);
    const index_t rows = bytes.flag() ? tokens : bytes.chance(10) ? bytes.within(0, 14) : 14;
    query_ = tensor({batch, query_heads, rows, dim}, bytes);
    key = tensor({batch, kv_heads, tokens, dim}, bytes);
    value = tensor({batch, kv_heads, tokens, dim}, bytes);
    fill(bytes);
    view_.query = query_.view;
    view_.key = chunked(key.view, key_chunks_, bytes);
    view_.value = chunked(value.view, value_chunks_, bytes);
    if (bytes.flag()) {
      view_.pad = bytes.flag() ? restkv::padding::left : restkv::padding::right;
      lengths_.resize(static_cast<std::size_t>(batch) + 1);
      for (auto& length : lengths_) {
        length = static_cast<std::int32_t>(bytes.chance(100)  ? bytes.any_number()
                                           : bytes.chance(60) ? tokens + bytes.within(1, 3)
                                                              : bytes.within(0, tokens));
      }
      view_.lengths = {lengths_.data(), {bytes.chance(60) ? batch + 1 : batch}};
    }
    if (bytes.chance(3)) {
      mask_.resize(static_cast<std::size_t>(batch * tokens) + 1);
      for (auto& bit : mask_) bit = bytes.chance(12) ? 1 : 0;
      view_.keep_mask = {mask_.data(), {batch, bytes.chance(60) ? tokens - 1 : tokens}};
    }
    if (!bytes.chance(40)) attach_metric(query_heads, dim, bytes);
    if (bytes.chance(30)) damage(bytes);
  }
  fuzz_layer(const fuzz_layer&) = delete;
  fuzz_layer& operator=(const fuzz_layer&) = delete;

  [[nodiscard]] const restkv::layer_view<T>& view() const { return view_; }

  exact_tensor<T, 4> key;
  exact_tensor<T, 4> value;

 private:
  static exact_tensor<T, 4> tensor(const std::array<index_t, 4>& extents, byte_source& bytes) {
    if (bytes.flag()) return exact_tensor<T, 4>(extents);
    // Axes in any order, gaps, some reversed, some repeated; or any strides at all, so that elements overlap.
    std::array<index_t, 4> strides{};
    std::array<std::size_t, 4> order{0, 1, 2, 3};
    for (std::size_t i = 3; i > 0; --i) {
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
    return exact_tensor<T, 4>(extents, strides);
  }

  /// Numbers as they occur, and as they should not.
  void fill(byte_source& bytes) {
    std::uint64_t state = static_cast<std::uint64_t>(bytes.any_number()) | 1;
    const bool odd_numbers = bytes.chance(3);
    const float scale = bytes.flag() ? 1.0f : 30.0f;
    for (auto* memory : {&query_.memory, &key.memory, &value.memory}) {
      for (T& element : *memory) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const auto draw = static_cast<std::uint32_t>(state >> 33);
        float number = (static_cast<float>(draw % 2001) / 1000.0f - 1.0f) * scale;
        if (odd_numbers && draw % 97 < 8) {
          using limits = std::numeric_limits<float>;
          constexpr float odd[] = {limits::quiet_NaN(), limits::infinity(),   -limits::infinity(), limits::max(),
                                   limits::lowest(),    limits::denorm_min(), -0.0f,               1e30f};
          number = odd[draw % 97];
        }
        element = restkv::narrow<T>(number);
      }
    }
  }

  static restkv::chunked_tensor_view<const T> chunked(const tensor_view<T, 4>& whole,
                                                      std::vector<tensor_view<const T, 4>>& chunks,
                                                      byte_source& bytes) {
    const index_t count = bytes.chance(3) ? bytes.within(1, 4) : 1;
    if (count == 1) return whole;
    index_t begin = 0;
    for (index_t i = 0; i < count; ++i) {
      const index_t left = whole.extent(2) - begin;
      const index_t size = i + 1 == count ? left : bytes.within(0, left);
      chunks.push_back(whole.slice(2, begin, size));
      begin += size;
    }
    if (bytes.chance(60)) chunks.back().extents[static_cast<std::size_t>(bytes.within(0, 3))] -= 1;
    return {chunks.data(), count};
  }

  void attach_metric(index_t query_heads, index_t dim, byte_source& bytes) {
    const index_t hidden = bytes.within(0, 6);
    std::vector<float> weights(static_cast<std::size_t>(hidden * query_heads * dim));
    for (float& weight : weights) weight = static_cast<float>(bytes.byte()) / 128.0f - 1.0f;
    if (weights.empty()) weights.resize(1);  // a pointer that is not null
    metric_ = build_metric({weights.data(), {hidden, query_heads * dim}}, query_heads, dim);
    view_.metric = metric_.view();
  }

  /// One tensor without memory, or smaller than it says elsewhere.
  void damage(byte_source& bytes) {
    switch (bytes.within(0, 6)) {
      case 0: view_.query.data = nullptr; break;
      case 1: view_.query.extents[static_cast<std::size_t>(bytes.within(0, 3))] -= 1; break;
      case 2: view_.key = {}; break;
      case 3: view_.value = {}; break;
      case 4: view_.metric.factor = {}; break;
      case 5: view_.metric.gram.extents[0] -= 1; break;
      default: view_.metric.spectrum.extents[1] -= 1; break;
    }
  }

  exact_tensor<T, 4> query_;
  std::vector<tensor_view<const T, 4>> key_chunks_;
  std::vector<tensor_view<const T, 4>> value_chunks_;
  std::vector<std::int32_t> lengths_;
  std::vector<std::uint8_t> mask_;
  restkv::output_metric metric_;
  restkv::layer_view<T> view_{};
};

}  // namespace restkv_test
