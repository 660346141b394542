// SPDX-License-Identifier: Apache-2.0
/// @file
/// The observation window's attention over one sequence, in one pass over the keys.
#pragma once

#include <restkv/backend/eigen/packet.hpp>
#include <restkv/backend/eigen/token_tile.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/core/workspace.hpp>
#include <restkv/score/features.hpp>
#include <restkv/selection/order_key.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv::eigen {

/// The window queries of a few query heads of one KV head, side by side: lane j * window + i is query i of head j. Lanes
/// beyond `used` pad to whole vectors; their query is 0 and nobody reads them.
struct lane_block {
  index_t first_head = 0;  ///< query head
  index_t heads = 0;
  index_t window = 0;
  index_t lanes = 0;  ///< padded

  [[nodiscard]] constexpr index_t used() const noexcept { return heads * window; }
};

/// The logit of a token that a query does not see.
inline constexpr float masked_logit = std::numeric_limits<float>::lowest();

/// Logits that are not numbers, or infinite, become finite ones: NaN the lowest, so that a token whose key is damaged gets
/// no attention and spoils nobody else's. Still, a query that sees nothing else attends to those rather than to tokens
/// that it does not see.
inline void make_finite(float* logits, index_t count) noexcept {
  constexpr float most = std::numeric_limits<float>::max() / 2;
  for (index_t i = 0; i < count; ++i) {
    if (logits[i] == masked_logit) continue;
    logits[i] = std::isnan(logits[i]) ? -most : std::clamp(logits[i], -most, most);
  }
}

/// restkv::least_rest in float.
inline constexpr auto least_rest = static_cast<float>(restkv::least_rest);

/// Attention of a lane block, kept as logits and, per lane, what turns a logit into a share of attention:
/// a = min(exp(logit - largest) scale, 1). The exponential is taken again where a share is needed: every reader gets the same
/// bits, whichever tokens it asks for. The largest logit of a lane is kept apart from the sum of the others all the way,
/// so that 1 - a and a / (1 - a) lose no digits even when one token holds all but 1e-9 of the attention.
class window_softmax {
 public:
  window_softmax() = default;

  /// Room for sequences of `tokens` tokens and `lanes` lanes.
  window_softmax(index_t tokens, index_t lanes, index_t head_dim, workspace& space) noexcept
      : most_tiles_((tokens + tile_tokens - 1) / tile_tokens), most_lanes_(lanes) {
    const index_t cells = most_tiles_ * lanes;
    logits_ = space.take<float>(cells * tile_tokens);
    tile_largest_ = space.take<float>(cells);
    tile_rest_ = space.take<float>(cells);
    tile_top_ = space.take<std::int32_t>(cells);
    queries_ = space.take<float>(head_dim * lanes);
    keys_ = space.take<float>(tile_tokens * head_dim);
    largest_ = space.take<float>(lanes);
    rest_ = space.take<float>(lanes);
    scale_ = space.take<float>(lanes);
    top_ = space.take<index_t>(lanes);
  }

  /// Logits of a tile's tokens. [tile_tokens, lanes]
  [[nodiscard]] const float* logits(index_t tile) const noexcept { return logits_ + tile * tile_tokens * block_.lanes; }
  /// What turns exp(logit - largest) into a share. [lanes]
  [[nodiscard]] const float* scale() const noexcept { return scale_; }
  /// The token with the largest share; the first of equals. [lanes]
  [[nodiscard]] const index_t* top() const noexcept { return top_; }
  /// Sum over the other tokens of exp(logit - largest): a[top] = 1 / (1 + rest), odds[top] = 1 / rest. [lanes]
  [[nodiscard]] const float* rest() const noexcept { return rest_; }
  /// The queries, scaled by 1 / sqrt(head_dim). [head_dim, lanes]
  [[nodiscard]] const float* queries() const noexcept { return queries_; }
  /// The largest logit; the largest of the others where the rest would fall below least_rest. [lanes]
  [[nodiscard]] const float* largest() const noexcept { return largest_; }
  [[nodiscard]] const lane_block& block() const noexcept { return block_; }

  /// The first token a lane's query does not see.
  [[nodiscard]] index_t visible(index_t lane, index_t length) const noexcept {
    return length - block_.window + lane % block_.window + 1;
  }

  /// Logits of `count` tokens from token `first` of the sequence on, masked causally, clamped to finite. out is
  /// [count, lanes].
  template <element T>
  void compute_logits(const layer_view<T>& layer, index_t batch, index_t kv_head, const sequence_span& span, index_t first,
              index_t count, float* out) noexcept {
    const index_t head_dim = layer.key.extent(3);
    const float_rows keys = load_tokens(layer.key, batch, kv_head, span.begin + first, count, head_dim, keys_);
    multiply({keys.data, keys.stride, 1}, count, queries_, block_.lanes, block_.lanes, head_dim, out, block_.lanes);
    mask(first, count, span.length, out);
  }

  /// Sets logits of tokens a query does not see to the lowest float.
  void mask(index_t first, index_t count, index_t length, float* out) const noexcept {
    for (index_t n = std::max<index_t>(0, length - block_.window + 1 - first); n < count; ++n) {
      for (index_t lane = 0; lane < block_.used(); ++lane) {
        if (first + n >= visible(lane, length)) out[n * block_.lanes + lane] = masked_logit;
      }
    }
  }

  /// Order keys of the logits, one contiguous row per query, in the memory of the logits; tokens a query does not
  /// see sort lowest. `tile` is room for [tile_tokens, lanes]. [window, length]
  template <element T>
  [[nodiscard]] std::uint32_t* logit_keys(const layer_view<T>& layer, index_t batch, index_t head, index_t window,
                                          const sequence_span& span, float* tile) noexcept {
    block_ = {head, 1, window, padded_lanes(window)};
    pack_queries(layer, batch);
    auto* const keys = reinterpret_cast<std::uint32_t*>(logits_);
    const index_t kv_head = head / (layer.query.extent(1) / layer.key.extent(1));
    for (index_t first = 0; first < span.length; first += tile_tokens) {
      const index_t count = std::min(tile_tokens, span.length - first);
      compute_logits(layer, batch, kv_head, span, first, count, tile);
      make_finite(tile, count * block_.lanes);
      for (index_t lane = 0; lane < window; ++lane) {
        std::uint32_t* const row = keys + lane * span.length + first;
        for (index_t n = 0; n < count; ++n) row[n] = order_key(tile[n * block_.lanes + lane]);
      }
    }
    return keys;
  }

  /// Reads every key once and prepares everything above.
  template <element T>
  void run(const layer_view<T>& layer, index_t batch, const lane_block& block, const sequence_span& span) noexcept {
    block_ = block;
    const index_t group = layer.query.extent(1) / layer.key.extent(1);
    const index_t kv_head = block.first_head / group;
    pack_queries(layer, batch);
    const index_t tiles = (span.length + tile_tokens - 1) / tile_tokens;
    for (index_t t = 0; t < tiles; ++t) {
      const index_t first = t * tile_tokens;
      const index_t count = std::min(tile_tokens, span.length - first);
      float* const tile = logits_ + t * tile_tokens * block.lanes;
      compute_logits(layer, batch, kv_head, span, first, count, tile);
      reduce_tile(tile, count, tile_largest_ + t * block.lanes, tile_rest_ + t * block.lanes,
                  tile_top_ + t * block.lanes);
    }
    combine(tiles);
    for (index_t lane = 0; lane < block.used(); ++lane) {
      if (rest_[lane] < least_rest) keep_proportions(lane, span.length);
    }
  }

 private:
  template <element T>
  void pack_queries(const layer_view<T>& layer, index_t batch) noexcept {
    const index_t head_dim = layer.query.extent(3);
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    std::fill(queries_, queries_ + head_dim * block_.lanes, 0.0f);
    for (index_t j = 0; j < block_.heads; ++j) {
      const auto rows = window_queries(layer, batch, block_.first_head + j, block_.window);
      for (index_t i = 0; i < block_.window; ++i) {
        for (index_t c = 0; c < head_dim; ++c) {
          queries_[c * block_.lanes + j * block_.window + i] = widen<float>(rows(i, c)) * scale;
        }
      }
    }
  }

  /// A tile's largest logit of every lane, and the sum of the other tokens' exponentials relative to it.
  void reduce_tile(float* tile, index_t count, float* largest, float* rest, std::int32_t* top) const noexcept {
    using namespace Eigen::internal;
    const packet zero = pset1<packet>(0.0f);
    for (index_t lane = 0; lane < block_.lanes; lane += packet_size) {
      float* const column = tile + lane;
      packet best = zero;
      packet best_row = zero;  // rows of a tile are exact in float
      for (bool finite = false; !finite;) {
        best = ploadu<packet>(column);
        best_row = zero;
        packet probe = pmul(best, zero);  // 0 as long as every logit is finite
        for (index_t n = 1; n < count; ++n) {
          const packet logit = ploadu<packet>(column + n * block_.lanes);
          const packet higher = pcmp_lt(best, logit);
          best = pselect(higher, logit, best);
          best_row = pselect(higher, pset1<packet>(static_cast<float>(n)), best_row);
          probe = pmadd(logit, zero, probe);
        }
        finite = predux(probe) == 0.0f;
        for (index_t n = 0; !finite && n < count; ++n) make_finite(column + n * block_.lanes, packet_size);
      }
      packet sum = zero;
      for (index_t n = 0; n < count; ++n) {
        const packet value = pexp(psub(ploadu<packet>(column + n * block_.lanes), best));
        const packet is_top = pcmp_eq(best_row, pset1<packet>(static_cast<float>(n)));
        sum = padd(sum, pselect(is_top, zero, value));
      }
      pstoreu(largest + lane, best);
      pstoreu(rest + lane, sum);
      float rows[packet_size];
      pstoreu(rows, best_row);
      for (index_t i = 0; i < packet_size; ++i) top[lane + i] = static_cast<std::int32_t>(rows[i]);
    }
  }

  /// Combines the tiles, in order: the lane's top token and the sum of the others.
  void combine(index_t tiles) noexcept {
    for (index_t lane = 0; lane < block_.lanes; ++lane) {
      index_t best = 0;
      for (index_t t = 1; t < tiles; ++t) {
        if (tile_largest_[t * block_.lanes + lane] > tile_largest_[best * block_.lanes + lane]) best = t;
      }
      const float largest = tile_largest_[best * block_.lanes + lane];
      double rest = 0;
      for (index_t t = 0; t < tiles; ++t) {
        const index_t cell = t * block_.lanes + lane;
        const double tile_sum = static_cast<double>(tile_rest_[cell]) + (t == best ? 0.0 : 1.0);
        rest += tile_sum * std::exp(static_cast<double>(tile_largest_[cell]) - static_cast<double>(largest));
      }
      largest_[lane] = largest;
      rest_[lane] = static_cast<float>(rest);
      scale_[lane] = 1.0f / (1.0f + rest_[lane]);
      top_[lane] = best * tile_tokens + tile_top_[best * block_.lanes + lane];
    }
  }

  /// Gives least_rest to all tokens but the top one, where they have less.
  void keep_proportions(index_t lane, index_t length) noexcept {
    const index_t end = visible(lane, length);
    const auto logit = [&](index_t n) { return logits_[n * block_.lanes + lane]; };
    float second = masked_logit;
    for (index_t n = 0; n < end; ++n) second = n == top_[lane] ? second : std::max(second, logit(n));
    double sum = 0;
    for (index_t n = 0; n < end; ++n) {
      if (n != top_[lane]) sum += std::exp(static_cast<double>(logit(n)) - static_cast<double>(second));
    }
    if (!(sum > 0)) return;  // the query sees nothing but its own token
    largest_[lane] = second;
    rest_[lane] = least_rest;
    scale_[lane] = static_cast<float>(static_cast<double>(least_rest) / sum);
  }

  index_t most_tiles_ = 0;
  index_t most_lanes_ = 0;
  lane_block block_{};
  float* logits_ = nullptr;
  float* tile_largest_ = nullptr;
  float* tile_rest_ = nullptr;
  std::int32_t* tile_top_ = nullptr;
  float* queries_ = nullptr;
  float* keys_ = nullptr;
  float* largest_ = nullptr;
  float* rest_ = nullptr;
  float* scale_ = nullptr;
  index_t* top_ = nullptr;
};

}  // namespace restkv::eigen
