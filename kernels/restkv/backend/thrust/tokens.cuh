// SPDX-License-Identifier: Apache-2.0
/// @file
/// Scores of tokens under every query of the window, slab by slab of tokens: features, cells, temporal reduction.
#pragma once

#include <restkv/backend/thrust/outputs.cuh>
#include <restkv/backend/thrust/streaming.cuh>

#include <span>

namespace restkv::on_thrust {

/// Part of a problem that is scored together: tokens [first, first + tokens) of query heads.
struct token_slab {
  index_t first_head = 0;
  index_t heads = 0;
  index_t first = 0;
  index_t tokens = 0;

  [[nodiscard]] RESTKV_HD index_t items() const noexcept { return heads * tokens; }
  [[nodiscard]] RESTKV_HD index_t head_of(index_t item) const noexcept { return first_head + item / tokens; }
  [[nodiscard]] RESTKV_HD index_t token_of(index_t item) const noexcept { return first + item % tokens; }
};

/// What is known of a token whatever the query.
struct token_facts {
  float value_norm = 0;
  float key_norm = 0;
  float value_norm_l1 = 0;
  float mean_distance = 0;
  float projected_norm_l1 = 0;
};

/// Memory of a slab of tokens.
struct token_memory {
  float* cells = nullptr;        ///< [items, lanes]
  float* shares = nullptr;       ///< before pooling, [heads, tokens + 2 reach, lanes]
  double* images = nullptr;      ///< M v, [items, head_dim]
  token_facts* facts = nullptr;  ///< [items]

  token_memory(const token_slab& slab, index_t lanes, index_t reach, index_t image_width, workspace& space) noexcept
      : cells(space.take<float>(slab.items() * lanes)),
        shares(reach > 0 ? space.take<float>(slab.heads * (slab.tokens + 2 * reach) * lanes) : nullptr),
        images(space.take<double>(slab.items() * image_width)),
        facts(space.take<token_facts>(slab.items())) {}
  /// M v of an item; null where no feature needs it.
  [[nodiscard]] RESTKV_HD const double* image_of(index_t item, index_t width) const noexcept {
    return images == nullptr ? nullptr : images + item * width;
  }
  /// Bytes of a token, alignment not included.
  [[nodiscard]] static constexpr index_t bytes_of_token(index_t lanes, index_t reach, index_t image_width) noexcept {
    return lanes * static_cast<index_t>(sizeof(float)) * (reach > 0 ? 2 + 2 * reach : 1) +
           image_width * static_cast<index_t>(sizeof(double)) + static_cast<index_t>(sizeof(token_facts));
  }
};

/// M v of the slab's tokens. For each (item, block of channels).
template <class Problem>
struct map_values {
  Problem p;
  token_slab slab;
  double* images;  ///< [items, head_dim]

  RESTKV_HD void operator()(index_t index) const noexcept {
    const index_t blocks = channel_blocks(p.head_dim);
    const index_t item = index / blocks;
    const index_t first = index % blocks * channel_block;
    const index_t head = slab.head_of(item);
    if (slab.token_of(item) >= p.span_of(head).past) return;
    double image[channel_block];
    map_block(p, head, p.value_of(p.kv_of(head), slab.token_of(item)), index % blocks, image);
    for (index_t j = 0; j < channel_block && first + j < p.head_dim; ++j)
      images[item * p.head_dim + first + j] = image[j];
  }
};

/// ||x - y|| of double rows.
[[nodiscard]] RESTKV_HD inline double distance_of(const double* x, const double* y, index_t count) noexcept {
  double sum = 0;
  for (index_t c = 0; c < count; ++c) sum += (x[c] - y[c]) * (x[c] - y[c]);
  return root(sum);
}

/// The facts of the slab's tokens. For each item.
template <class Problem, feature Needs>
struct find_facts {
  Problem p;
  token_slab slab;
  const double* images;       ///< [items, head_dim]
  const double* mean_images;  ///< [heads, head_dim]
  token_facts* facts;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t head = slab.head_of(item);
    const index_t n = slab.token_of(item);
    if (n >= p.span_of(head).past) return;
    token_facts f;
    if constexpr (has(Needs, feature::value_norm)) {
      const double* const image = images + item * p.head_dim;
      f.value_norm = static_cast<float>(root(dot(image, 1, image, 1, p.head_dim)));
    }
    if constexpr (has(Needs, feature::mean_distance)) {
      const double* const image = images + item * p.head_dim;
      f.mean_distance = static_cast<float>(distance_of(image, mean_images + head * p.head_dim, p.head_dim));
    }
    if constexpr (has(Needs, feature::value_norm_l1 | feature::projected_norm_l1)) {
      const auto value = p.value_of(p.kv_of(head), n);
      if constexpr (has(Needs, feature::value_norm_l1)) {
        double sum = 0;
        for (index_t c = 0; c < p.head_dim; ++c) sum += std::fabs(value[c]);
        f.value_norm_l1 = finite_float(sum);
      }
      if constexpr (has(Needs, feature::projected_norm_l1)) {
        const auto* const first = p.projection.data + head % p.query_heads * p.head_dim * p.projection.stride(1);
        double sum = 0;
        for (index_t r = 0; r < p.projection.extent(0); ++r) {
          sum += std::fabs(
              dot(first + r * p.projection.stride(0), p.projection.stride(1), value.data, value.step, p.head_dim));
        }
        f.projected_norm_l1 = finite_float(sum);
      }
    }
    if constexpr (has(Needs, feature::key_norm)) {
      const auto key = p.key_of(p.kv_of(head), n);
      f.key_norm = static_cast<float>(root(dot(key.data, key.step, key.data, key.step, p.head_dim)));
    }
    facts[item] = f;
  }
};

/// What a token's score is made of, apart from what the slab holds.
template <class Score>
struct score_parts {
  Score score;
  output_states outputs;
  index_t layer = 0;

  static constexpr feature needs = Score::needs;

  /// The score of token n of a head from its attention. `output` is the index of the query's output, `top` its top
  /// token.
  template <class Problem>
  [[nodiscard]] RESTKV_HD float operator()(const Problem& p, index_t head, index_t n, double share, double odds,
                                           float logit, index_t output, index_t top, const token_facts* facts,
                                           const double* image) const noexcept {
    token_features<float> f = place_of(p, head, n, layer);
    f.attention = static_cast<float>(share);
    if constexpr (has(needs, feature::odds)) f.odds = finite_float(odds);
    if constexpr (has(needs, feature::logit)) f.logit = logit;
    if constexpr (has(needs, feature::output_norm)) f.output_norm = outputs.norm[output];
    if constexpr (has(needs, feature::distance)) {
      f.distance = n == top ? outputs.top_distance[output]
                            : static_cast<float>(distance_of(outputs.image + output * p.head_dim, image, p.head_dim));
    }
    if constexpr (has(needs, feature::alignment)) {
      f.alignment = finite_float(dot(outputs.image + output * p.head_dim, 1, image, 1, p.head_dim));
    }
    if constexpr (has(needs, feature::value_norm | feature::key_norm | feature::value_norm_l1 | feature::mean_distance |
                                 feature::projected_norm_l1)) {
      f.value_norm = facts->value_norm;
      f.key_norm = facts->key_norm;
      f.value_norm_l1 = facts->value_norm_l1;
      f.mean_distance = facts->mean_distance;
      f.projected_norm_l1 = facts->projected_norm_l1;
    }
    return score(f);
  }
};

/// What cells are filled with.
enum class cell_kind {
  score,  ///< the token's score under the query
  share,  ///< its attention
  rest,   ///< its attention less 1
};

/// cells[item][lane]. For each (item, lane).
template <class Problem, class Score, cell_kind Kind>
struct fill_cells {
  Problem p;
  token_slab slab;
  score_parts<Score> parts;
  token_memory memory;
  const lane_state* states;  ///< [heads, lanes]
  const float* pool_scale;   ///< [heads, lanes]; null where attention is not pooled
  index_t reach;             ///< of the pool

  RESTKV_HD void operator()(index_t index) const noexcept {
    const index_t item = index / p.lanes;
    const index_t lane = index % p.lanes;
    const index_t head = slab.head_of(item);
    const index_t n = slab.token_of(item);
    const head_span& span = p.span_of(head);
    if (n >= span.past || lane >= span.window) return;
    float& cell = memory.cells[index];
    cell = 0;
    if (n >= Problem::seen_by(span, lane)) return;
    const index_t cell_of_head = head * p.lanes + lane;
    const lane_state& state = states[cell_of_head];
    if (pool_scale != nullptr) {
      cell = parts(p, head, n, pooled(item, lane, span.past) * static_cast<double>(pool_scale[cell_of_head]), 0, 0,
                   cell_of_head, -1, nullptr, nullptr);
      return;
    }
    const float logit = p.logit(head, lane, n);
    const double share = state.share(logit, n);
    if constexpr (Kind == cell_kind::share) {
      cell = static_cast<float>(share);
    } else if constexpr (Kind == cell_kind::rest) {
      cell = -static_cast<float>(state.rest_of(share, n));
    } else {
      cell = parts(p, head, n, share, state.odds(share, n), logit, cell_of_head, state.top, memory.facts + item,
                   memory.image_of(item, p.head_dim));
    }
  }

 private:
  /// The sum of the shares around a token, each with its own terms only.
  [[nodiscard]] RESTKV_HD double pooled(index_t item, index_t lane, index_t past) const noexcept {
    const index_t n = slab.token_of(item);
    const index_t width = slab.tokens + 2 * reach;
    const index_t row = item / slab.tokens * width + reach - slab.first;  // + m: where token m's shares lie
    double sum = 0;
    for (index_t m = n - reach > 0 ? n - reach : 0; m <= n + reach && m < past; ++m) {
      sum += static_cast<double>(memory.shares[(row + m) * p.lanes + lane]);
    }
    return sum;
  }
};

/// shares[head][n - first + reach][lane] of the slab's tokens and their neighbours. For each of these.
template <class Problem>
struct fill_shares {
  Problem p;
  token_slab slab;
  const lane_state* states;
  float* shares;
  index_t reach;

  RESTKV_HD void operator()(index_t index) const noexcept {
    const index_t width = slab.tokens + 2 * reach;
    const index_t lane = index % p.lanes;
    const index_t head = slab.first_head + index / p.lanes / width;
    const index_t n = index / p.lanes % width + slab.first - reach;
    const head_span& span = p.span_of(head);
    if (n < 0 || n >= span.past || lane >= span.window) return;
    const bool seen = n < Problem::seen_by(span, lane);
    shares[index] = seen ? static_cast<float>(states[head * p.lanes + lane].share(p.logit(head, lane, n), n)) : 0.0f;
  }
};

/// pool_scale = (sum of a) / (sum of the pooled a), the pool's division included: a token near an end of the past is in
/// fewer means. For each row of a slab of queries, whose logits are shares.
template <class Problem>
struct scale_pools {
  Problem p;
  lane_slab slab;
  const float* shares;  ///< [rows, tokens]
  float* pool_scale;    ///< of the slab's first head and lane
  index_t width;

  RESTKV_HD void operator()(index_t row) const noexcept {
    const head_span& span = p.span_of(slab.head_of(row));
    if (slab.lane_of(row) >= span.window) return;
    const index_t reach = width / 2;
    double whole = 0;
    double in_means = 0;
    for (index_t n = 0; n < span.past; ++n) {
      const auto share = static_cast<double>(shares[row * p.tokens + n]);
      const index_t last = n + reach < span.past ? n + reach : span.past - 1;
      const index_t first = n > reach ? n - reach : 0;
      whole += share;
      in_means += share * static_cast<double>(last - first + 1);
    }
    pool_scale[row / slab.lanes * p.lanes + row % slab.lanes] =
        in_means > 0 ? static_cast<float>(whole / in_means) : 0.0f;
  }
};

/// out[head][n] = the temporal reduction of the cells, clamped to finite for scores. For each item.
template <class Problem, class Temporal, class Out>
struct reduce_cells {
  Problem p;
  token_slab slab;
  Temporal temporal;
  float* cells;           ///< [items, lanes]
  const double* weights;  ///< [batch * kv_heads, lanes], of whole windows
  Out* out;               ///< [heads, tokens]
  bool linear;
  double sign;  ///< of the result

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t head = slab.head_of(item);
    const index_t n = slab.token_of(item);
    const head_span& span = p.span_of(head);
    if (n >= span.past) return;
    const index_t unseen = n - (span.length - span.window) > 0 ? n - (span.length - span.window) : 0;
    float* const row = cells + item * p.lanes + unseen;
    const index_t count = span.window - unseen;
    const double* const of_window = weights + p.kv_of(head) * p.lanes;
    double reduced = reduce(row, count, unseen, of_window);
    if (reduced != reduced) {
      // Not a number: perhaps for a score that is none or infinite, and has a weight of 0.
      for (index_t i = 0; i < count; ++i) {
        row[i] = linear && weight_of(i, count, unseen, of_window) == 0 ? 0.0f : finite_score(row[i]);
      }
      reduced = reduce(row, count, unseen, of_window);
    }
    out[head * p.tokens + n] = static_cast<Out>(finite_float(sign * reduced));
  }

 private:
  [[nodiscard]] RESTKV_HD double weight_of(index_t i, index_t count, index_t unseen,
                                           const double* of_window) const noexcept {
    if constexpr (linear_temporal_smoother<Temporal>) {
      return unseen == 0 ? of_window[i] : temporal.weight(static_cast<int>(i), static_cast<int>(count));
    } else {
      return 1;
    }
  }
  [[nodiscard]] RESTKV_HD double reduce(const float* row, index_t count, index_t unseen,
                                        const double* of_window) const noexcept {
    if (linear) {
      double sum = 0;
      for (index_t i = 0; i < count; ++i) {
        sum += weight_of(i, count, unseen, of_window) * static_cast<double>(row[i]);
      }
      return sum;
    }
    return static_cast<double>(temporal(std::span<const float>(row, static_cast<std::size_t>(count))));
  }
};

/// out[head][n] from smoothed attention, or without queries. For each item.
template <class Problem, class Score>
struct score_once {
  Problem p;
  token_slab slab;
  score_parts<Score> parts;
  token_memory memory;
  const float* smoothed;  ///< [heads, tokens]; null for scores without queries
  const float* rests;     ///< [heads, tokens]
  const peak* tops;       ///< [heads]; null for scores without outputs
  double* out;            ///< [heads, tokens]

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t head = slab.head_of(item);
    const index_t n = slab.token_of(item);
    if (n >= p.span_of(head).past) return;
    double share = 0;
    double odds = 0;
    if (smoothed != nullptr) {
      share = static_cast<double>(smoothed[head * p.tokens + n]);
      const auto rest = static_cast<double>(rests[head * p.tokens + n]);
      odds = share / (rest > least_rest ? rest : least_rest);
    }
    const float score = parts(p, head, n, share, odds, 0, head, tops != nullptr ? tops[head].top : -1,
                              memory.facts + item, memory.image_of(item, p.head_dim));
    out[head * p.tokens + n] = static_cast<double>(finite_score(score));
  }
};

/// A token of a row of smoothed attention.
template <class Problem>
struct peak_of_share {
  Problem p;
  const float* smoothed;  ///< [heads, tokens]

  [[nodiscard]] RESTKV_HD peak operator()(index_t item) const noexcept {
    const index_t n = item % p.tokens;
    if (n >= p.span_of(item / p.tokens).past) return {};
    return {smoothed[item], -std::numeric_limits<float>::infinity(), n};
  }
};

/// out(b, row, n) = the group reduction of the heads' scores. For each (row of the result, token).
template <class Problem, memory_space Space>
struct reduce_groups {
  Problem p;
  group_reduce how;
  index_t heads_of_row;
  const double* scores;  ///< [heads, tokens]
  tensor_view<float, 3, Space> out;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / p.tokens;
    const index_t n = item % p.tokens;
    const index_t head = row * heads_of_row;
    if (n >= p.span_of(head).past) return;
    float folded = 0;
    for (index_t j = 0; j < heads_of_row; ++j) {
      folded = group_fold(how, folded, finite_float(scores[(head + j) * p.tokens + n]), j == 0);
    }
    const index_t rows = p.query_heads / heads_of_row;
    out.data[out.offset(row / rows, row % rows, n)] = finite_score(group_finish(how, folded, heads_of_row));
  }
};

}  // namespace restkv::on_thrust
