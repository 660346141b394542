// SPDX-License-Identifier: Apache-2.0
/// @file
/// Sums over channels, in double, for all pairs of 16 vectors and 64 rows of elements: what the verifier is made of.
#pragma once

#include <restkv/kernel/attention_logits.hpp>

namespace restkv::kernel {

/// Every product of two elements is exact in double, so that what is left is the rounding of sums of head_dim terms,
/// relative to the sum of their magnitudes: head_dim 2^-53.
template <element T>
struct exact_tile {
  static constexpr int threads = 128;
  static constexpr int vectors = 16;
  static constexpr int rows = token_tile;
  static constexpr int pairs = vectors * rows / threads;  ///< of a thread: one row, `pairs` vectors

  /// Staging; free for other uses between two calls.
  struct operands {
    alignas(32) T y[rows * staged<T>::stride];
    alignas(16) double x[staged<T>::columns * vectors];  ///< [columns, vectors]
  };

  /// The row of a thread.
  [[nodiscard]] RESTKV_HD static constexpr int row_of(int thread) noexcept { return thread % rows; }
  /// The first of its vectors.
  [[nodiscard]] RESTKV_HD static constexpr int first_vector_of(int thread) noexcept { return thread / rows * pairs; }

  /// sums(t)[i] = step(.. step(0, x_0, y_0) .., x_c, y_c) over the channels in ascending order, for vector
  /// x = first_vector_of(t) + i and row y = row_of(t). `vector(r, c)` is a double, `row(r)` a token_row, null: zeros.
  /// Begins and ends with a phase of its own.
  template <class Group, class Sums, class Vector, class Row, class Step>
  RESTKV_HD static void sum(Group& group, operands& memory, Sums& sums, index_t channels, const Vector& vector,
                            const Row& row, const Step& step) {
    constexpr int columns = staged<T>::columns;
    group.for_each_thread([&](int t) {
      for (double& x : sums(t)) x = 0.0;
    });
    for (index_t first = 0; first < channels; first += columns) {
      stage_rows(group, memory.y, rows, columns, staged<T>::stride, first, channels, row);
      group.for_each(vectors * columns, [&](index_t item) {
        const int r = static_cast<int>(item) / columns;
        const int c = static_cast<int>(item) % columns;
        group.write(memory.x[c * vectors + r], first + c < channels ? vector(r, first + c) : 0.0);
      });
      group.sync();
      group.for_each_thread([&](int t) {
        const T* const y = memory.y + row_of(t) * staged<T>::stride;
        const double* const x = memory.x + first_vector_of(t);
        auto& mine = sums(t);
        for (int c = 0; c < columns; ++c) {
          const auto element = static_cast<double>(group.to_float(group.read(y[c])));
          unrolled<pairs>([&](auto i) { mine[i] = step(mine[i], group.read(x[c * vectors + i]), element); });
        }
      });
      group.sync();
    }
  }
};

/// x . y
struct dot_step {
  [[nodiscard]] RESTKV_HD double operator()(double sum, double x, double y) const noexcept {
    return std::fma(x, y, sum);
  }
};

/// ||x - y||^2, which does not cancel where x is close to y.
struct distance_step {
  [[nodiscard]] RESTKV_HD double operator()(double sum, double x, double y) const noexcept {
    return std::fma(x - y, x - y, sum);
  }
};

}  // namespace restkv::kernel
