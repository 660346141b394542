// SPDX-License-Identifier: Apache-2.0
/// @file
/// The sums that a budget across layers looks at, and the shares that follow, in the memory of a bulk backend.
#pragma once

#include <restkv/backend/bulk.hpp>
#include <restkv/budget/apportion.hpp>
#include <restkv/core/workspace.hpp>
#include <restkv/model/bulk_pool.hpp>
#include <restkv/model/layer_sums.hpp>

#include <algorithm>

namespace restkv::detail {

namespace bulk {

/// What `sum_tiles` adds up: sums of double over the tiles of rows.
struct sum_rows {
  index_t rows_per_sequence;
  index_t tiles;    ///< of the longest row
  double* partial;  ///< [batch, rows_per_sequence, tiles]

  /// The sum over the rows of a sequence, in order.
  [[nodiscard]] RESTKV_HD double of_sequence(index_t b) const noexcept {
    double sum = 0;
    const double* const first = partial + b * rows_per_sequence * tiles;
    for (index_t i = 0; i < rows_per_sequence * tiles; ++i) sum += first[i];
    return sum;
  }
};

/// Attention of the heads of a layer: rows are those of all heads.
struct attention_terms {
  bulk_rows rows;       ///< of the selection
  const float* scores;  ///< [batch * heads, stride]
  index_t stride;
  index_t copies;  ///< heads of a row of the selection
  index_t window;

  [[nodiscard]] RESTKV_HD double operator()(index_t head_row, index_t tile) const noexcept {
    const index_t length = rows.span_of(head_row / copies).length;
    const float* const row = scores + head_row * stride;
    return sum_of_tile(tile, length > window ? length - window : 0,
                       [&](double sum, index_t n) { return sum + static_cast<double>(row[n]); });
  }
};

/// Scores of the candidates.
struct score_terms {
  bulk_rows rows;
  const std::uint32_t* keys;

  [[nodiscard]] RESTKV_HD double operator()(index_t row, index_t tile) const noexcept {
    return sum_of_tile(tile, rows.units_of(row), add_scores<float>{keys + rows.begin_of(row)});
  }
};

/// Their entropy, given their sum.
struct entropy_terms {
  bulk_rows rows;
  const std::uint32_t* keys;
  index_t rows_per_sequence;
  const layer_summary* summaries;

  [[nodiscard]] RESTKV_HD double operator()(index_t row, index_t tile) const noexcept {
    const layer_summary& summary = summaries[row / rows_per_sequence];
    if (!has_entropy(summary)) return 0;
    return sum_of_tile(tile, rows.units_of(row), add_entropy<float>{keys + rows.begin_of(row), summary.score_sum});
  }
};

/// The sum of each tile. For each (row, tile).
template <class Terms>
struct sum_tiles {
  Terms terms;
  sum_rows sums;

  RESTKV_HD void operator()(index_t item) const noexcept {
    sums.partial[item] = terms(item / sums.tiles, item % sums.tiles);
  }
};

/// One number of the summary. For each sequence.
template <double layer_summary::*Field>
struct sum_into {
  sum_rows sums;
  layer_summary* summaries;

  RESTKV_HD void operator()(index_t b) const noexcept { summaries[b].*Field = sums.of_sequence(b); }
};

/// A summary with what the host knows. For each sequence.
struct begin_summary {
  bulk_rows rows;
  index_t rows_per_sequence;
  index_t layer;
  index_t layers;
  layer_summary* summaries;

  RESTKV_HD void operator()(index_t b) const noexcept {
    layer_summary summary;
    summary.layer = layer;
    summary.layers = layers;
    for (index_t r = 0; r < rows_per_sequence; ++r) {
      summary.candidates += rows.span_of(b * rows_per_sequence + r).candidates;
    }
    summaries[b] = summary;
  }
};

/// The entropy's last step. For each sequence.
struct finish_entropy {
  sum_rows sums;
  layer_summary* summaries;

  RESTKV_HD void operator()(index_t b) const noexcept {
    layer_summary& summary = summaries[b];
    if (has_entropy(summary)) summary.score_entropy = relative_entropy(summary, sums.of_sequence(b));
  }
};

/// How many candidates each layer keeps, and so each segment of the pool. For each sequence.
template <class Budget>
struct share_layers {
  Budget budget;
  pool_rows pool;
  index_t layer;
  const layer_summary* summaries;  ///< [batch]
  const index_t* chosen;           ///< of all layers, [batch]
  const index_t* live;             ///< candidates of the pool's rows
  double* preferences;             ///< [batch, layers], those of the layers before
  index_t* ceilings;               ///< [batch, layers]
  index_t* shares;                 ///< [batch, layers]
  index_t* wanted;                 ///< of segments: layers where heads compete, else rows

  RESTKV_HD void operator()(index_t b) const noexcept {
    constexpr bool competing = Budget::compares_heads;
    const index_t first = b * pool.layers;
    preferences[first + layer] = budget.preference(summaries[b]);
    for (index_t l = 0; l < pool.layers; ++l) {
      index_t ceiling = 0;
      for (index_t r = 0; r < pool.rows; ++r) {
        const index_t candidates = live[(first + l) * pool.rows + r];
        ceiling = competing ? ceiling + candidates : (ceiling > candidates ? ceiling : candidates);
      }
      ceilings[first + l] = ceiling;
      shares[first + l] = 0;
    }
    const auto size = static_cast<std::size_t>(layer + 1);
    // Where heads do not compete, shares are those of one head.
    apportion({preferences + first, size}, {ceilings + first, size}, competing ? chosen[b] : chosen[b] / pool.rows,
              {shares + first, size});
    for (index_t l = 0; l < pool.layers; ++l) {
      if (competing) {
        wanted[first + l] = shares[first + l];
      } else {
        for (index_t r = 0; r < pool.rows; ++r) wanted[(first + l) * pool.rows + r] = shares[first + l];
      }
    }
  }
};

}  // namespace bulk

/// Everything a model_selection on a bulk backend keeps from layer to layer; carved by the same code when planning and
/// when running.
template <class Backend, class ModelPlan>
struct bulk_model_state {
  static constexpr memory_space space = space_of<Backend>();

  tensor_view<position_t, 3, space> positions;  // [batch, heads, tokens]
  tensor_view<position_t, 2, space> lengths;    // [batch, heads]
  double* preferences;                          // [batch, layers]
  bulk_pool<Backend> pool;

  bulk_model_state(const ModelPlan& p, workspace& from)
      : positions(from.take<position_t>(p.layer.shape.batch * p.layer.heads * p.layer.shape.tokens),
                  {p.layer.shape.batch, p.layer.heads, p.layer.shape.tokens}),
        lengths(from.take<position_t>(p.layer.shape.batch * p.layer.heads), {p.layer.shape.batch, p.layer.heads}),
        preferences(from.take<double>(p.layer.shape.batch * p.layer.shape.layers)),
        pool({p.layer.shape.batch, p.layer.shape.layers, p.layer.rows, p.entries}, units_of(p), from) {}

  /// Units of the longest row.
  [[nodiscard]] static index_t units_of(const ModelPlan& p) noexcept {
    const index_t unit = p.layer.policy.granularity.tokens;
    return p.layer.shape.tokens / unit + (p.layer.shape.tokens % unit != 0 ? 1 : 0);
  }
};

/// In place of `attention_sums`, for budgets that do not look at attention.
struct no_attention_sums {
  template <class... Arguments>
  explicit constexpr no_attention_sums(const Arguments&...) noexcept {}
};

/// What it needs while a layer comes in.
template <class Backend, class ModelPlan>
struct bulk_model_scratch {
  layer_summary* summaries;  // [batch]
  index_t* chosen;           // [batch]
  index_t* ceilings;         // [batch, layers]
  index_t* shares;           // [batch, layers]
  double* partial;           // [batch, heads, tiles]
  typename bulk_pool<Backend>::scratch pool;

  bulk_model_scratch(const Backend& backend, const ModelPlan& p, const bulk::pool_rows& rows, workspace& from)
      : summaries(from.take<layer_summary>(rows.batch)),
        chosen(from.take<index_t>(rows.batch)),
        ceilings(from.take<index_t>(rows.batch * rows.layers)),
        shares(from.take<index_t>(rows.batch * rows.layers)),
        partial(from.take<double>(rows.batch * p.layer.heads * tiles_of_sum(p.layer.shape.tokens))),
        pool(backend, rows, bulk_model_state<Backend, ModelPlan>::units_of(p), from) {}
};

}  // namespace restkv::detail
