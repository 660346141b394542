// SPDX-License-Identifier: Apache-2.0
/// @file
/// Attention outputs over splits of the tokens, the top token left out: one per query of the window, or one per head
/// for attention that was smoothed first.
#pragma once

#include <restkv/kernel/float_pieces.hpp>
#include <restkv/kernel/softmax_lanes.hpp>

namespace restkv::kernel {

/// Channels of an output that a block adds up.
inline constexpr int output_channels = 128;

/// Copies the values of the first `tokens` tokens of `from` to shared memory as floats [tokens, stride], 16 bytes at a
/// time where they lie so; zeros behind the sequence and beyond head_dim.
template <class Group, cached T>
RESTKV_HD void stage_values(Group& group, float* to, int stride, int tokens, int channels, const token_chunks<T>& cache,
                            index_t b, index_t kv_head, const head_span& span, const tile_tokens& from,
                            index_t first_channel, index_t head_dim) {
  constexpr int step = 16 / static_cast<int>(sizeof(number_of<T>));
  const int pieces = channels / step;
  group.for_each(tokens * pieces, [&](index_t item) {
    const int row_index = static_cast<int>(item) / pieces;
    const int c = static_cast<int>(item) % pieces * step;
    float* const target = to + row_index * stride + c;
    const index_t n = from[row_index];
    const index_t left = n < span.length ? head_dim - first_channel - c : 0;
    token_row<T> source;
    if (left > 0) source = cache.row(b, kv_head, span.begin + n).from(first_channel + c);
    if constexpr (requires { source.whole(); }) {
      if (left >= step && source.whole()) {
        const auto values = group.load_16_bytes(source.data);
        unrolled<step>(
            [&](auto i) { group.write(target[i], group.to_float(values[static_cast<std::size_t>(int{i})])); });
        return;
      }
    }
    for (int i = 0; i < step; ++i) group.write(target[i], i < left ? group.to_float(source.number(i)) : 0.0f);
  });
}

/// Order `before`: per split and lane, sum over n != top of a_n v_n, over all tokens of the split (those that a query
/// does not see have a_n = 0). 16-bit values are multiplied on tensor cores, the weights as sums of 16-bit pieces; an
/// infinite value then makes an output that is no number. Blocks: [batch, kv_heads, lane tiles, channel blocks,
/// splits].
template <cached T>
struct output_split {
  static constexpr int threads = 128;
  static constexpr int lanes = 32;
  using number = number_of<T>;
  using tile = logit_tile<T, lanes, threads>;
  static constexpr int pieces = pieces_of<number>;
  static constexpr int value_tokens = sizeof(number) == 2 ? token_tile : token_tile / 2;
  static constexpr int value_stride = output_channels + 16 / static_cast<int>(sizeof(number));
  static constexpr int piece_stride = token_tile + 8;
  /// Half holds the weights relative to the lane's largest, times 2^15: what is lost is below 2^-40 of the largest. The
  /// other types hold the shares themselves.
  static constexpr bool relative = std::is_same_v<number, restkv::half>;
  static constexpr float relative_scale = 32768.0f;
  struct shared {
    union {
      typename tile::operands operands;
      alignas(32) number values[value_tokens * value_stride];
    };
    alignas(32) float weights[lanes * tile::stride];
    alignas(32) number weight_pieces[sizeof(number) == 2 ? pieces * lanes * piece_stride : 1];
  };

  attention_problem<T> problem;
  const lane_softmax* softmax;  ///< [batch * kv_heads * lanes]
  float* parts;                 ///< [batch * kv_heads * lanes, splits, head_dim]

  [[nodiscard]] RESTKV_HD index_t channel_blocks() const noexcept {
    return (problem.head_dim + output_channels - 1) / output_channels;
  }
  [[nodiscard]] RESTKV_HD index_t lane_tiles() const noexcept { return (problem.lanes() + lanes - 1) / lanes; }
  [[nodiscard]] index_t blocks() const noexcept {
    return problem.batch * problem.kv_heads * lane_tiles() * channel_blocks() * problem.splits;
  }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t split = block % problem.splits;
    const index_t first_channel = block / problem.splits % channel_blocks() * output_channels;
    const index_t tile_index = block / problem.splits / channel_blocks();
    const index_t first_lane = tile_index % lane_tiles() * lanes;
    const index_t b = tile_index / lane_tiles() / problem.kv_heads;
    const index_t kv_head = tile_index / lane_tiles() % problem.kv_heads;
    const head_span span = problem.span(b, kv_head);
    const index_t count = problem.lanes() - first_lane < lanes ? problem.lanes() - first_lane : lanes;
    const index_t begin = split * problem.split_tokens;
    const index_t end = begin + problem.split_tokens < span.length ? begin + problem.split_tokens : span.length;
    const index_t lane_base = problem.first_lane(b, kv_head) + first_lane;
    // A warp: 16 lanes, half of the channels.
    constexpr int columns = output_channels / 16 / 2;
    static_assert(lanes == 32 && threads == 4 * warp_size);
    auto sums = group.template accumulators<number, columns>();
    for (index_t first = begin; first < end; first += token_tile) {
      tile::compute(group, memory.operands, memory.weights, problem, span, {b, kv_head, first_lane, count, first});
      group.for_each(lanes * token_tile, [&](index_t item) {
        const index_t r = item / token_tile;
        const index_t t = item % token_tile;
        float& cell = memory.weights[r * tile::stride + t];
        const float logit = group.read(cell);
        float weight = 0;
        if (logit != masked_logit) {
          const lane_softmax lane = softmax[lane_base + r];
          if (first + t != lane.top) {
            weight = std::exp(logit - lane.second) * (relative ? relative_scale : lane.second_scale);
          }
        }
        if constexpr (sizeof(number) == 2) {
          split_float<number>(weight, [&](auto piece, number part) {
            group.write(memory.weight_pieces[(piece * lanes + r) * piece_stride + t], part);
          });
        } else {
          group.write(cell, weight);
        }
      });
      for (int part = 0; part < token_tile; part += value_tokens) {
        stage_rows<Group, number>(group, memory.values, value_tokens, output_channels, value_stride, first_channel,
                                  problem.head_dim, [&](index_t t) -> token_row<T> {
                                    const index_t n = first + part + t;
                                    if (n >= span.length) return {};
                                    return problem.value.row(b, kv_head, span.begin + n);
                                  });
        group.sync();
        group.for_each_warp([&](int w) {
          for (int k = 0; k < value_tokens; k += 16) {
            unrolled<columns>([&](auto i) {
              const number* const values = memory.values + k * value_stride + (w / 2 * columns + i) * 16;
              if constexpr (sizeof(number) == 2) {
                unrolled<pieces>([&](auto piece) {
                  group.template mma<number>(
                      sums(w)[i], memory.weight_pieces + (piece * lanes + w % 2 * 16) * piece_stride + part + k,
                      piece_stride, values, value_stride);
                });
              } else {
                group.template mma<number>(sums(w)[i], memory.weights + w % 2 * 16 * tile::stride + part + k,
                                           tile::stride, values, value_stride);
              }
            });
          }
        });
        group.sync();
      }
    }
    // Through shared memory to where they belong, a half of the channels at a time.
    for (int half = 0; half < 2; ++half) {
      group.for_each_warp([&](int w) {
        if (w / 2 != half) return;
        unrolled<columns>([&](auto i) {
          group.template store<number>(sums(w)[i], memory.weights + w % 2 * 16 * tile::stride + i * 16, tile::stride);
        });
      });
      group.sync();
      group.for_each(lanes * columns * 16, [&](index_t item) {
        const index_t r = item / (columns * 16);
        const index_t c = first_channel + half * columns * 16 + item % (columns * 16);
        if (r >= count || c >= problem.head_dim) return;
        float sum = group.read(memory.weights[r * tile::stride + item % (columns * 16)]);
        if constexpr (relative) sum = sum / relative_scale * softmax[lane_base + r].second_scale;
        group.write(parts[((lane_base + r) * problem.splits + split) * problem.head_dim + c], sum);
      });
      group.sync();
    }
  }
};

/// The largest of some tokens' smoothed attention.
struct row_top {
  float share = 0;
  float rest = 1;        ///< 1 - share, without cancellation
  position_t token = 0;  ///< the first of equals
};

/// Order `after`: per split and query head, sum over past n != top of row[n] v_n. Blocks: [batch, kv_heads, head tiles
/// of 16, channel blocks, splits].
template <cached T>
struct row_output_split {
  static constexpr int threads = 128;
  static constexpr int heads = 16;
  static constexpr int weight_stride = token_tile + 4;
  static constexpr int value_stride = output_channels + 4;
  struct shared {
    alignas(32) float weights[heads * weight_stride];
    alignas(32) float values[token_tile * value_stride];
  };

  attention_problem<T> problem;
  const float* rows;    ///< [batch * query_heads, tokens]
  const row_top* tops;  ///< [batch * query_heads]
  float* parts;         ///< [batch * query_heads, splits, head_dim]
  index_t row_stride;

  [[nodiscard]] RESTKV_HD index_t channel_blocks() const noexcept {
    return (problem.head_dim + output_channels - 1) / output_channels;
  }
  [[nodiscard]] RESTKV_HD index_t head_tiles() const noexcept { return (problem.group() + heads - 1) / heads; }
  [[nodiscard]] index_t blocks() const noexcept {
    return problem.batch * problem.kv_heads * head_tiles() * channel_blocks() * problem.splits;
  }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t split = block % problem.splits;
    const index_t first_channel = block / problem.splits % channel_blocks() * output_channels;
    const index_t unit = block / problem.splits / channel_blocks();
    const index_t first_of_group = unit % head_tiles() * heads;
    const index_t b = unit / head_tiles() / problem.kv_heads;
    const index_t kv_head = unit / head_tiles() % problem.kv_heads;
    const head_span span = problem.span(b, kv_head);
    const index_t past = problem.past_of(span);
    const index_t first_head = b * problem.query_heads + kv_head * problem.group() + first_of_group;
    const index_t left = problem.group() - first_of_group;
    const index_t count = left < heads ? left : heads;
    const index_t begin = split * problem.split_tokens;
    const index_t end = begin + problem.split_tokens < past ? begin + problem.split_tokens : past;
    constexpr int columns = output_channels / 16 / (threads / warp_size);
    auto sums = group.template accumulators<float, columns>();  // a warp: 16 heads, 32 channels
    for (index_t first = begin; first < end; first += token_tile) {
      group.for_each(heads * token_tile, [&](index_t item) {
        const index_t r = item / token_tile;
        const index_t n = first + item % token_tile;
        const bool counts = r < count && n < past && n != tops[first_head + r].token;
        group.write(memory.weights[r * weight_stride + item % token_tile],
                    counts ? rows[(first_head + r) * row_stride + n] : 0.0f);
      });
      const head_span past_span{span.begin, static_cast<position_t>(past), span.first_row};
      stage_values(group, memory.values, value_stride, token_tile, output_channels, problem.value, b, kv_head,
                   past_span, first, first_channel, problem.head_dim);
      group.sync();
      group.for_each_warp([&](int w) {
        for (int k = 0; k < token_tile; k += 16) {
          unrolled<columns>([&](auto i) {
            group.template mma<float>(sums(w)[i], memory.weights + k, weight_stride,
                                      memory.values + k * value_stride + (w * columns + i) * 16, value_stride);
          });
        }
      });
      group.sync();
    }
    group.for_each_warp([&](int w) {
      unrolled<columns>([&](auto i) {
        group.template store<float>(sums(w)[i], memory.values + (w * columns + i) * 16, value_stride);
      });
    });
    group.sync();
    group.for_each(heads * output_channels, [&](index_t item) {
      const index_t r = item / output_channels;
      const index_t c = first_channel + item % output_channels;
      if (r >= count || c >= problem.head_dim) return;
      group.write(parts[((first_head + r) * problem.splits + split) * problem.head_dim + c],
                  group.read(memory.values[r * value_stride + item % output_channels]));
    });
  }
};

}  // namespace restkv::kernel
