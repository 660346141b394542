// SPDX-License-Identifier: Apache-2.0
/// @file
/// The observation window's attention over one sequence, tile by tile.
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
#include <memory>

namespace restkv::eigen {

/// The window queries of a few query heads of one KV head, side by side: lane j * stride + i is query i of head j. Lanes
/// beyond a head's window pad to whole vectors; their query is 0 and nobody reads them.
struct lane_block {
  index_t first_head = 0;  ///< query head
  index_t heads = 0;
  index_t window = 0;
  index_t stride = 0;  ///< lanes of one head, padded

  [[nodiscard]] constexpr index_t lanes() const noexcept { return heads * stride; }
  /// The first lane of a query head.
  [[nodiscard]] constexpr index_t lane_of(index_t head) const noexcept { return (head - first_head) * stride; }
};

/// Lanes of a block: with more, the logits of a tile leave the second-level cache; with fewer, keys are read more often.
inline constexpr index_t most_block_lanes = 256;

/// Tokens rounded up to whole tiles.
[[nodiscard]] constexpr index_t padded_tokens(index_t tokens) noexcept {
  return (tokens + tile_tokens - 1) / tile_tokens * tile_tokens;
}

/// The most query heads of a group that are observed together.
[[nodiscard]] constexpr index_t most_heads_of_block(index_t group, index_t lanes_of_head) noexcept {
  return std::clamp<index_t>(most_block_lanes / std::max<index_t>(lanes_of_head, 1), 1, std::max<index_t>(group, 1));
}

/// Query heads that are observed together: as many as keep their logits, the most where not even one does.
[[nodiscard]] constexpr index_t heads_of_block(index_t group, index_t lanes_of_head, index_t tokens,
                                               index_t kept_logits) noexcept {
  const index_t most = most_heads_of_block(group, lanes_of_head);
  const index_t kept = kept_logits / std::max<index_t>(padded_tokens(tokens) * lanes_of_head, 1);
  return kept <= 0 ? most : std::min(most, kept);
}

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

/// `make_finite` where a tile needs it: one multiply-add per vector tells.
inline void make_tile_finite(float* logits, index_t count) noexcept {
  using namespace Eigen::internal;
  packet probe = pset1<packet>(0.0f);  // 0 as long as every logit is finite
  for (index_t i = 0; i < count; i += packet_size) {
    probe = pmadd(ploadu<packet>(logits + i), pset1<packet>(0.0f), probe);
  }
  if (!(predux(probe) == 0.0f)) make_finite(logits, count);
}

/// restkv::least_rest in float.
inline constexpr auto least_rest = static_cast<float>(restkv::least_rest);

/// Attention of a lane block: per lane, what turns a logit into a share of attention,
/// a = min(exp(logit - largest) scale, 1). Exponentials, and where they were not kept logits, are computed again where a
/// share is needed: every reader gets the same bits, whichever tokens it asks for. The largest logit of a lane is kept
/// apart from the sum of the others all the way, so that 1 - a and a / (1 - a) lose no digits even when one token holds all
/// but 1e-9 of the attention.
class window_softmax {
 public:
  window_softmax() = default;

  /// Room for sequences of `tokens` tokens and blocks of `lanes` lanes, `kept_logits` of whose logits are kept at most.
  window_softmax(index_t tokens, index_t lanes, index_t head_dim, index_t kept_logits, workspace& space) noexcept {
    most_kept_ = std::min(padded_tokens(tokens) * lanes, std::max(kept_logits, tokens));
    kept_ = space.take<float>(most_kept_);
    tile_ = space.take<float>(tile_tokens, lanes);
    queries_ = space.take<float>(head_dim, lanes);
    keys_ = space.take<float>(tile_tokens, head_dim);
    largest_ = space.take<float>(lanes);
    rest_ = space.take<float>(lanes);
    scale_ = space.take<float>(lanes);
    top_ = space.take<index_t>(lanes);
    sums_ = space.take<double>(lanes);
    tile_largest_ = space.take<float>(lanes);
    tile_rest_ = space.take<float>(lanes);
    tile_top_ = space.take<index_t>(lanes);
  }

  /// What turns exp(logit - largest) into a share. [lanes]
  [[nodiscard]] const float* scale() const noexcept { return scale_; }
  /// The token with the largest share; the first of equals. [lanes]
  [[nodiscard]] const index_t* top() const noexcept { return top_; }
  /// Sum over the other tokens of exp(logit - largest): a[top] = 1 / (1 + rest), odds[top] = 1 / rest. [lanes]
  [[nodiscard]] const float* rest() const noexcept { return rest_; }
  /// The queries, scaled by 1 / sqrt(head_dim), one head's lanes behind the other's. [heads, head_dim, stride]
  [[nodiscard]] const float* queries() const noexcept { return queries_; }
  /// The largest logit; the largest of the others where the rest would fall below least_rest. [lanes]
  [[nodiscard]] const float* largest() const noexcept { return largest_; }
  [[nodiscard]] const lane_block& block() const noexcept { return block_; }

  /// Reads every key once and prepares everything above.
  template <element T>
  void run(const layer_view<T>& layer, index_t batch, const lane_block& block, const sequence_span& span,
           const head_perturbation& perturbation = {}) noexcept {
    begin(layer, batch, block, span);
    perturbation_ = perturbation;
    const index_t lanes = block.lanes();
    const index_t tiles = padded_tokens(span.length) / tile_tokens;
    keeps_ = tiles * tile_tokens * lanes <= most_kept_;
    for (index_t t = 0; t < tiles; ++t) {
      float* const tile = keeps_ ? kept_ + t * tile_tokens * lanes : tile_;
      const index_t count = compute_logits(layer, t, tile);
      reduce_tile(tile, count);
      combine(t);
    }
    bool extreme = false;
    for (index_t lane = 0; lane < lanes; ++lane) {
      rest_[lane] = static_cast<float>(sums_[lane]);
      scale_[lane] = 1.0f / (1.0f + rest_[lane]);
      extreme = extreme || (lane % block.stride < block.window && rest_[lane] < least_rest);
    }
    if (extreme) keep_proportions(layer, tiles);
  }

  /// Logits of a tile of the sequence that `run` has seen, masked causally, finite. [tile_tokens, lanes]; valid until the
  /// next call.
  template <element T>
  [[nodiscard]] const float* tile_logits(const layer_view<T>& layer, index_t tile) noexcept {
    if (keeps_) return kept_ + tile * tile_tokens * block_.lanes();
    static_cast<void>(compute_logits(layer, tile, tile_));
    return tile_;
  }

  /// Queries whose logits over a whole sequence fit into the memory at a time.
  [[nodiscard]] index_t rows_at_once(index_t length) const noexcept {
    return std::max<index_t>(1, most_kept_ / std::max<index_t>(length, 1));
  }

  /// Order keys of the logits of the queries [first_row, first_row + rows) of one head, one contiguous row each, in the
  /// memory of the kept logits; tokens a query does not see sort lowest. [rows, length]
  template <element T>
  [[nodiscard]] std::uint32_t* logit_keys(const layer_view<T>& layer, index_t batch, const lane_block& one_head,
                                          const sequence_span& span, index_t first_row, index_t rows) noexcept {
    begin(layer, batch, one_head, span);
    auto* const keys = reinterpret_cast<std::uint32_t*>(kept_);
    const index_t lanes = one_head.lanes();
    for (index_t t = 0; t * tile_tokens < span.length; ++t) {
      const index_t count = compute_logits(layer, t, tile_);
      for (index_t i = 0; i < rows; ++i) {
        std::uint32_t* const row = keys + i * span.length + t * tile_tokens;
        for (index_t n = 0; n < count; ++n) std::construct_at(row + n, order_key(tile_[n * lanes + first_row + i]));
      }
    }
    keeps_ = false;
    return keys;
  }

 private:
  template <element T>
  void begin(const layer_view<T>& layer, index_t batch, const lane_block& block, const sequence_span& span) noexcept {
    block_ = block;
    batch_ = batch;
    span_ = span;
    perturbation_ = {};
    kv_head_ = block.first_head / (layer.query.extent(1) / layer.key.extent(1));
    pack_queries(layer);
  }

  template <element T>
  void pack_queries(const layer_view<T>& layer) noexcept {
    const index_t head_dim = layer.query.extent(3);
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    std::fill_n(queries_, head_dim * block_.lanes(), 0.0f);
    for (index_t j = 0; j < block_.heads; ++j) {
      const auto rows = window_queries(layer, batch_, block_.first_head + j, block_.window);
      for (index_t i = 0; i < block_.window; ++i) {
        for (index_t c = 0; c < head_dim; ++c) {
          queries_[(j * head_dim + c) * block_.stride + i] = widen<float>(rows(i, c)) * scale;
        }
      }
    }
  }

  /// Logits of a tile into `out` [tile_tokens, lanes]; returns how many tokens it has.
  template <element T>
  [[nodiscard]] index_t compute_logits(const layer_view<T>& layer, index_t tile, float* out) noexcept {
    const index_t first = tile * tile_tokens;
    const index_t count = std::min(tile_tokens, span_.length - first);
    const index_t head_dim = layer.key.extent(3);
    const index_t lanes = block_.lanes();
    const float_rows keys = load_tokens(layer.key, batch_, kv_head_, span_.begin + first, count, head_dim, keys_);
    for (index_t j = 0; j < block_.heads; ++j) {
      multiply({keys.data, keys.stride, 1}, count, queries_ + j * head_dim * block_.stride, block_.stride, block_.stride,
               head_dim, out + j * block_.stride, lanes);
    }
    // Query i sees the tokens before length - window + i + 1.
    const index_t seen_by_all = span_.length - block_.window + 1;
    for (index_t n = std::max<index_t>(0, seen_by_all - first); n < count; ++n) {
      const index_t hidden = std::min(block_.window, first + n - seen_by_all + 1);  // queries that do not see it
      for (index_t j = 0; j < block_.heads; ++j) {
        std::fill_n(out + n * lanes + j * block_.stride, hidden, masked_logit);
      }
    }
    make_tile_finite(out, count * lanes);
    if (perturbation_.active()) perturb(first, count, out);
    return count;
  }

  /// The same noise whenever a tile is computed.
  void perturb(index_t first, index_t count, float* logits) const noexcept {
    constexpr float most = std::numeric_limits<float>::max() / 2;
    for (index_t n = 0; n < count; ++n) {
      for (index_t j = 0; j < block_.heads; ++j) {
        float* const row = logits + n * block_.lanes() + j * block_.stride;
        for (index_t i = 0; i < block_.window; ++i) {
          if (row[i] == masked_logit) continue;
          const index_t query = span_.length - block_.window + i;
          row[i] = std::clamp(perturbation_(row[i], batch_, block_.first_head + j, query, first + n), -most, most);
        }
      }
    }
  }

  /// A tile's largest logit of every lane, its token, and the sum of the other tokens' exponentials relative to it.
  void reduce_tile(const float* tile, index_t count) const noexcept {
    using namespace Eigen::internal;
    const index_t lanes = block_.lanes();
    const packet zero = pset1<packet>(0.0f);
    for (index_t lane = 0; lane < lanes; lane += packet_size) {
      const float* const column = tile + lane;
      packet best = ploadu<packet>(column);
      packet best_row = zero;  // rows of a tile are exact in float
      for (index_t n = 1; n < count; ++n) {
        const packet logit = ploadu<packet>(column + n * lanes);
        const packet higher = pcmp_lt(best, logit);
        best = pselect(higher, logit, best);
        best_row = pselect(higher, pset1<packet>(static_cast<float>(n)), best_row);
      }
      packet sum = zero;
      for (index_t n = 0; n < count; ++n) {
        const packet value = exponential(psub(ploadu<packet>(column + n * lanes), best));
        const packet is_top = pcmp_eq(best_row, pset1<packet>(static_cast<float>(n)));
        sum = padd(sum, pselect(is_top, zero, value));
      }
      pstoreu(tile_largest_ + lane, best);
      pstoreu(tile_rest_ + lane, sum);
      float rows[packet_size];
      pstoreu(rows, best_row);
      for (index_t i = 0; i < packet_size; ++i) tile_top_[lane + i] = static_cast<index_t>(rows[i]);
    }
  }

  /// Adds a tile, in order, to what the lanes know: their top token and the sum of the others.
  void combine(index_t tile) noexcept {
    for (index_t lane = 0; lane < block_.lanes(); ++lane) {
      const auto tile_sum = static_cast<double>(tile_rest_[lane]);
      const double rise = static_cast<double>(tile_largest_[lane]) - static_cast<double>(largest_[lane]);
      if (tile > 0 && rise <= 0) {
        sums_[lane] += (tile_sum + 1.0) * std::exp(rise);
        continue;
      }
      sums_[lane] = tile == 0 ? tile_sum : (sums_[lane] + 1.0) * std::exp(-rise) + tile_sum;
      largest_[lane] = tile_largest_[lane];
      top_[lane] = tile * tile_tokens + tile_top_[lane];
    }
  }

  /// Gives least_rest to all tokens but the top one in the lanes where they have less, in proportion to what they have.
  template <element T>
  void keep_proportions(const layer_view<T>& layer, index_t tiles) noexcept {
    const index_t lanes = block_.lanes();
    float* const second = tile_largest_;  // largest logit of the others
    std::fill_n(second, lanes, masked_logit);
    std::fill_n(sums_, lanes, 0.0);
    const auto visit = [&](auto&& body) {
      for (index_t t = 0; t < tiles; ++t) {
        const float* const logits = tile_logits(layer, t);
        const index_t count = std::min(tile_tokens, span_.length - t * tile_tokens);
        for (index_t lane = 0; lane < lanes; ++lane) {
          if (!(rest_[lane] < least_rest)) continue;
          for (index_t n = 0; n < count; ++n) {
            const float logit = logits[n * lanes + lane];
            if (t * tile_tokens + n != top_[lane] && logit != masked_logit) body(lane, logit);
          }
        }
      }
    };
    visit([&](index_t lane, float logit) { second[lane] = std::max(second[lane], logit); });
    visit([&](index_t lane, float logit) {
      sums_[lane] += std::exp(static_cast<double>(logit) - static_cast<double>(second[lane]));
    });
    for (index_t lane = 0; lane < lanes; ++lane) {
      if (!(rest_[lane] < least_rest) || !(sums_[lane] > 0)) continue;  // or the query sees nothing but its own token
      largest_[lane] = second[lane];
      rest_[lane] = least_rest;
      scale_[lane] = static_cast<float>(static_cast<double>(least_rest) / sums_[lane]);
    }
  }

  lane_block block_{};
  index_t batch_ = 0;
  index_t kv_head_ = 0;
  sequence_span span_{};
  head_perturbation perturbation_{};
  bool keeps_ = false;  // whether kept_ holds the logits of the block
  index_t most_kept_ = 0;
  float* kept_ = nullptr;
  float* tile_ = nullptr;
  float* queries_ = nullptr;
  float* keys_ = nullptr;
  float* largest_ = nullptr;
  float* rest_ = nullptr;
  float* scale_ = nullptr;
  index_t* top_ = nullptr;
  double* sums_ = nullptr;  // of the others' exponentials, relative to largest_
  float* tile_largest_ = nullptr;
  float* tile_rest_ = nullptr;
  index_t* tile_top_ = nullptr;
};

}  // namespace restkv::eigen
