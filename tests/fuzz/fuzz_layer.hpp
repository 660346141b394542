// SPDX-License-Identifier: Apache-2.0
// A layer made of the bytes a fuzzer hands over: sizes, strides, padding and masks from the bytes, numbers from a
// generator that they seed.
#pragma once

#include "fuzz/byte_source.hpp"
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
    query_ = strided_tensor<T, 4>({batch, query_heads, rows, dim}, bytes);
    key = strided_tensor<T, 4>({batch, kv_heads, tokens, dim}, bytes);
    value = strided_tensor<T, 4>({batch, kv_heads, tokens, dim}, bytes);
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

  /// One tensor without memory, smaller than it says elsewhere, or larger than any.
  void damage(byte_source& bytes) {
    switch (bytes.within(0, 8)) {
      case 0:
        view_.query.data = nullptr;
        break;
      case 1:
        view_.query.extents[static_cast<std::size_t>(bytes.within(0, 3))] -= 1;
        break;
      case 2:
        view_.key = {};
        break;
      case 3:
        view_.value = {};
        break;
      case 4:
        view_.metric.factor = {};
        break;
      case 5:
        view_.metric.gram.extents[0] -= 1;
        break;
      case 6:
        restkv_test::damage(view_.query, bytes);
        break;
      case 7: {
        auto whole = key.view;
        restkv_test::damage(whole, bytes);
        view_.key = whole;
        break;
      }
      default:
        view_.metric.spectrum.extents[1] -= 1;
        break;
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
