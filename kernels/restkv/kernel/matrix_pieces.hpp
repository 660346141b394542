// SPDX-License-Identifier: Apache-2.0
/// @file
/// The metric's factor as sums of 16-bit matrices, for products on tensor cores.
#pragma once

#include <restkv/kernel/output_image.hpp>

namespace restkv::kernel {

/// A head's factor of the metric in pieces, [query_heads, pieces, width, width], multiplied by a power of two that
/// brings its largest element near 2^8: half's exponents then reach 2^-32 of that. Zero where channels pad to `width`.
template <element T>
struct metric_pieces {
  static constexpr index_t step = 32;
  const T* data = nullptr;         ///< null: the kernels multiply floats
  const float* inverse = nullptr;  ///< of the powers of two, [query_heads]
  index_t width = 0;

  /// Channels rounded up.
  [[nodiscard]] static constexpr index_t width_of(index_t head_dim) noexcept {
    return (head_dim + step - 1) / step * step;
  }
  /// Row c of a piece of a head's factor.
  [[nodiscard]] RESTKV_HD const T* row(index_t head, int piece, index_t c) const noexcept {
    return data + ((head * pieces_of<T> + piece) * width + c) * width;
  }
};

/// Splits the factors of all heads. Blocks: [query_heads].
template <element T>
struct metric_split {
  static constexpr int threads = 256;
  struct shared {
    collective_memory<float, threads> collective;
  };

  metric_source metric;
  index_t head_dim;
  index_t width;
  T* data;
  float* inverse;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t head) const {
    auto mine = group.template locals<float, 1>();
    group.for_each_thread([&](int t) {
      mine(t)[0] = 0.0f;
      for (index_t i = t; i < head_dim * head_dim; i += threads) {
        const float size = std::fabs(metric.at(head, i / head_dim, i % head_dim));
        if (size > mine(t)[0]) mine(t)[0] = size;
      }
    });
    const float largest = group.reduce(
        mine, [](float x, float y) { return x > y ? x : y; }, memory.collective);
    int exponent = 0;
    if (largest > 1e-30f && largest < 1e30f) std::frexp(largest, &exponent);
    const float scale = std::ldexp(1.0f, 9 - exponent);
    group.for_each(width * width, [&](index_t i) {
      const index_t c = i / width;
      const index_t r = i % width;
      const float x = c < head_dim && r <= c ? metric.at(head, c, r) * scale : 0.0f;
      split_float<T>(
          x, [&](auto piece, T part) { group.write(data[(head * pieces_of<T> + piece) * width * width + i], part); });
    });
    group.for_each(1, [&](index_t) { group.write(inverse[head], std::ldexp(1.0f, exponent - 9)); });
  }
};

}  // namespace restkv::kernel
