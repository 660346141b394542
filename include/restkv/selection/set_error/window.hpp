// SPDX-License-Identifier: Apache-2.0
/// @file
/// Attention of observed queries over a sequence, and the full outputs, for the tokens that may be exchanged.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/selection/set_error/lanes.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

namespace restkv::detail {

/// The queries that a set is judged by. Row i of `rows` stands at position length - horizon + i mod horizon of its
/// sequence, and sees the tokens up to and including that one.
struct observed_rows {
  index_t rows = 0;
  index_t horizon = 0;
  index_t lanes = 0;  ///< rows, padded

  /// Tokens of a sequence that row i sees.
  [[nodiscard]] constexpr index_t visible(index_t length, index_t i) const noexcept {
    return length - horizon + i % horizon + 1;
  }
};

/// Channels of a row as floats, then zeros up to `width`.
template <element T>
void widen_padded(const tensor_view<const T, 1>& row, index_t width, float* out) noexcept {
  widen_row(row, out);
  std::fill(out + row.extent(0), out + width, 0.0f);
}

/// Attention below this is 0: its squares would be subnormal, which processors compute slowly.
inline constexpr float least_share = 1e-15f;

/// Tokens of one query head read at a time.
inline constexpr index_t set_tile = 16;

/// Working memory of one query head's attention.
struct window_buffers {
  float* queries = nullptr;  ///< [width, lanes], scaled by 1 / sqrt(head_dim)
  float* rows = nullptr;     ///< [set_tile, width]
  float* shares = nullptr;   ///< [set_tile, lanes]
  float* sums = nullptr;     ///< [width, lanes], of a tile
  float* largest = nullptr;  ///< [lanes]
  double* total = nullptr;   ///< [lanes]
};

/// Attention of the observed queries of one query head.
template <element T>
class set_window {
 public:
  set_window(const layer_view<T>& layer, const observed_rows& observed, index_t batch, index_t query_head,
             index_t kv_head, const window_buffers& buffers) noexcept
      : layer_(layer),
        observed_(observed),
        batch_(batch),
        kv_head_(kv_head),
        span_(sequence(layer, batch, kv_head)),
        channels_(layer.key.extent(3)),
        width_(padded_set_lanes(channels_)),
        buffers_(buffers) {
    const auto queries = window_queries(layer, batch, query_head, observed.rows);
    const float scale = 1.0f / std::sqrt(static_cast<float>(channels_));
    std::fill_n(buffers_.queries, width_ * observed.lanes, 0.0f);
    for (index_t i = 0; i < observed.rows; ++i) {
      for (index_t c = 0; c < channels_; ++c) {
        buffers_.queries[c * observed.lanes + i] = widen<float>(queries(i, c)) * scale;
      }
    }
  }

  /// Fills shares[i] with the attention of the tokens candidates[i], ascending, [candidates, lanes], and outputs with
  /// sum_n A[n] v_n over all tokens, [width, lanes]. Keys are read twice, values once.
  void run(std::span<const position_t> candidates, float* shares, double* outputs) noexcept {
    const index_t lanes = observed_.lanes;
    std::fill_n(buffers_.largest, lanes, -std::numeric_limits<float>::max());
    for (index_t first = 0; first < span_.length; first += set_tile) {
      const index_t count = logits(first);
      for (index_t t = 0; t < count; ++t) {
        const float* const row = buffers_.shares + t * lanes;
        for (index_t i = 0; i < lanes; ++i) buffers_.largest[i] = std::max(buffers_.largest[i], row[i]);
      }
    }
    std::fill_n(buffers_.total, lanes, 0.0);
    std::fill_n(outputs, width_ * lanes, 0.0);
    std::size_t next = 0;
    for (index_t first = 0; first < span_.length; first += set_tile) {
      const index_t count = logits(first);
      for (index_t t = 0; t < count; ++t) {
        float* const row = buffers_.shares + t * lanes;
        for (index_t i = 0; i < lanes; ++i) row[i] = lane_exponential(row[i] - buffers_.largest[i]);
        const index_t sees_all = span_.length - observed_.horizon;
        for (index_t i = 0; first + t > sees_all && i < observed_.rows; ++i) {
          if (first + t >= observed_.visible(span_.length, i)) row[i] = 0.0f;
        }
        for (index_t i = 0; i < lanes; ++i) buffers_.total[i] += static_cast<double>(row[i]);
        if (next < candidates.size() && candidates[next] == span_.begin + first + t) {
          std::copy_n(row, lanes, shares + static_cast<index_t>(next) * lanes);
          ++next;
        }
        widen_padded(layer_.value.from_token(span_.begin + first + t)[batch_][kv_head_][0], width_,
                     buffers_.rows + t * width_);
      }
      lane_product({buffers_.rows, 1, width_}, width_, buffers_.shares, lanes, lanes, count, buffers_.sums, lanes);
      for (index_t i = 0; i < width_ * lanes; ++i) outputs[i] += static_cast<double>(buffers_.sums[i]);
    }
    for (index_t i = 0; i < lanes; ++i) buffers_.total[i] = i < observed_.rows ? 1.0 / buffers_.total[i] : 0.0;
    for (index_t c = 0; c < width_; ++c) {
      for (index_t i = 0; i < lanes; ++i) outputs[c * lanes + i] *= buffers_.total[i];
    }
    for (std::size_t n = 0; n < candidates.size(); ++n) {
      float* const row = shares + static_cast<index_t>(n) * lanes;
      for (index_t i = 0; i < lanes; ++i) {
        const float share = row[i] * static_cast<float>(buffers_.total[i]);
        row[i] = share < least_share ? 0.0f : share;
      }
    }
  }

 private:
  /// Logits of a tile, a masked or undefined one the lowest number; how many tokens it has. [set_tile, lanes]
  index_t logits(index_t first) noexcept {
    constexpr float most = std::numeric_limits<float>::max() / 2;
    const index_t lanes = observed_.lanes;
    const index_t count = std::min(set_tile, span_.length - first);
    for (index_t t = 0; t < count; ++t) {
      widen_padded(layer_.key.from_token(span_.begin + first + t)[batch_][kv_head_][0], width_,
                   buffers_.rows + t * width_);
    }
    lane_product({buffers_.rows, width_, 1}, count, buffers_.queries, lanes, lanes, channels_, buffers_.shares, lanes);
    for (index_t t = 0; t < count; ++t) {
      float* const row = buffers_.shares + t * lanes;
      // A logit that is not a number counts as the lowest, so that a damaged key spoils nobody else's share.
      for (index_t i = 0; i < lanes; ++i) row[i] = row[i] > -most ? std::min(row[i], most) : -most;
      if (first + t <= span_.length - observed_.horizon) continue;
      for (index_t i = 0; i < observed_.rows; ++i) {
        if (first + t >= observed_.visible(span_.length, i)) row[i] = -most;
      }
    }
    return count;
  }

  const layer_view<T>& layer_;
  observed_rows observed_;
  index_t batch_;
  index_t kv_head_;
  sequence_span span_;
  index_t channels_;
  index_t width_;
  window_buffers buffers_;
};

}  // namespace restkv::detail
