// SPDX-License-Identifier: Apache-2.0
/// @file
/// Values of a tile of tokens through a matrix, a few of its columns at a time, in shared memory.
#pragma once

#include <restkv/kernel/matrix_pieces.hpp>

namespace restkv::kernel {

/// W_O in the executor's memory, [hidden, query_heads * head_dim].
template <element T>
struct projection_source {
  const T* data = nullptr;
  index_t hidden = 0;
  index_t strides[2] = {};
};

/// Products of a tile's values with a matrix, 32 columns at a time: image [token_tile, stride].
template <cached T, int Threads>
struct value_images {
  using number = number_of<T>;
  static constexpr int columns = 32;
  static constexpr int stride = columns + 4;

  static constexpr int pieces = pieces_of<number>;
  static constexpr int piece_stride = columns + 8;  ///< of 16-bit rows

  struct float_operands {
    alignas(32) float values[token_tile * stride];
    alignas(32) float matrix[columns * stride];
  };
  struct piece_operands {
    alignas(32) number values[token_tile * piece_stride];
    alignas(32) number matrix[pieces * columns * piece_stride];
  };
  union operands {
    float_operands whole;
    piece_operands split;
  };

  /// image[t][i] = (x of tokens[t])[first + i] of a cache, 0 beyond it. Within one phase.
  template <class Group>
  RESTKV_HD static void copy(Group& group, float* image, const token_chunks<T>& cache, index_t b, index_t kv_head,
                             const head_span& span, const tile_tokens& tokens, index_t first, index_t head_dim) {
    stage_values(group, image, stride, token_tile, columns, cache, b, kv_head, span, tokens, first, head_dim);
  }

  /// image[t][i] = sum over c >= from of v[c] matrix(c, first + i), c ascending. Ends a phase; operands and image must
  /// be free when it begins.
  template <class Group, class Matrix>
  RESTKV_HD static void multiply(Group& group, operands& memory, float* image, const attention_problem<T>& problem,
                                 index_t b, index_t kv_head, const head_span& span, const tile_tokens& tokens,
                                 index_t first, index_t from, const Matrix& matrix) {
    constexpr int warps = Threads / warp_size;
    constexpr int tiles = token_tile / 16 * (columns / 16) / warps;
    auto sums = group.template accumulators<float, tiles>();
    for (index_t depth = from / columns * columns; depth < problem.head_dim; depth += columns) {
      copy(group, memory.whole.values, problem.value, b, kv_head, span, tokens, depth, problem.head_dim);
      group.for_each(columns * columns, [&](index_t item) {
        const index_t c = depth + item / columns;
        group.write(memory.whole.matrix[item / columns * stride + item % columns],
                    c < problem.head_dim ? matrix(c, first + item % columns) : 0.0f);
      });
      group.sync();
      group.for_each_warp([&](int w) {
        for (int k = 0; k < columns; k += 16) {
          unrolled<tiles>([&](auto i) {
            const int at = w * tiles + i;
            group.template mma<float>(sums(w)[i], memory.whole.values + at / 2 * 16 * stride + k, stride,
                                      memory.whole.matrix + k * stride + at % 2 * 16, stride);
          });
        }
      });
      group.sync();
    }
    group.for_each_warp([&](int w) {
      unrolled<tiles>([&](auto i) {
        const int at = w * tiles + i;
        group.template store<float>(sums(w)[i], image + at / 2 * 16 * stride + at % 2 * 16, stride);
      });
    });
    group.sync();
  }

  /// The same with the pieces of a head's factor, on tensor cores: values are exact, and so are products.
  template <class Group>
  RESTKV_HD static void multiply_pieces(Group& group, operands& memory, float* image,
                                        const attention_problem<T>& problem, const metric_pieces<number>& factor,
                                        index_t b, index_t head, const head_span& span, const tile_tokens& tokens,
                                        index_t first) {
    constexpr int warps = Threads / warp_size;
    constexpr int tiles = token_tile / 16 * (columns / 16) / warps;
    constexpr int step = 16 / static_cast<int>(sizeof(number));
    const index_t kv_head = head / problem.group();
    auto sums = group.template accumulators<number, tiles>();
    for (index_t depth = first; depth < problem.head_dim; depth += columns) {
      stage_rows<Group, number>(group, memory.split.values, token_tile, columns, piece_stride, depth, problem.head_dim,
                                [&](index_t t) -> token_row<T> {
                                  const index_t n = tokens[t];
                                  if (n >= span.length) return {};
                                  return problem.value.row(b, kv_head, span.begin + n);
                                });
      group.for_each(pieces * columns * (columns / step), [&](index_t item) {
        const index_t row = item / (columns / step);  // [pieces, columns]
        const index_t c = item % (columns / step) * step;
        group.copy_16_bytes(memory.split.matrix + row * piece_stride + c,
                            factor.row(head, static_cast<int>(row / columns), depth + row % columns) + first + c);
      });
      group.sync();
      group.for_each_warp([&](int w) {
        unrolled<columns / 16>([&](auto k) {
          unrolled<tiles>([&](auto i) {
            const int at = w * tiles + i;
            unrolled<pieces>([&](auto piece) {
              group.template mma<number>(
                  sums(w)[i], memory.split.values + at / 2 * 16 * piece_stride + k * 16, piece_stride,
                  memory.split.matrix + (piece * columns + k * 16) * piece_stride + at % 2 * 16, piece_stride);
            });
          });
        });
      });
      group.sync();
    }
    group.for_each_warp([&](int w) {
      unrolled<tiles>([&](auto i) {
        const int at = w * tiles + i;
        group.template scale<number>(sums(w)[i], factor.inverse[head]);
        group.template store<number>(sums(w)[i], image + at / 2 * 16 * stride + at % 2 * 16, stride);
      });
    });
    group.sync();
  }

  /// (M v)[first .. first + columns) of a query head, 0 beyond head_dim. Ends a phase.
  template <class Group>
  RESTKV_HD static void map(Group& group, operands& memory, float* image, const attention_problem<T>& problem,
                            const metric_source& metric, const metric_pieces<number>& factor, index_t b, index_t head,
                            const head_span& span, const tile_tokens& tokens, index_t first) {
    const index_t kv_head = head / problem.group();
    if constexpr (sizeof(number) == 2) {
      if (factor.data != nullptr) {
        multiply_pieces(group, memory, image, problem, factor, b, head, span, tokens, first);
        return;
      }
    }
    if (metric.factor == nullptr) {
      copy(group, image, problem.value, b, kv_head, span, tokens, first, problem.head_dim);
      group.sync();
      return;
    }
    multiply(group, memory, image, problem, b, kv_head, span, tokens, first, first,
             [&](index_t c, index_t r) { return r < problem.head_dim && r <= c ? metric.at(head, c, r) : 0.0f; });
  }
};

}  // namespace restkv::kernel
