// SPDX-License-Identifier: Apache-2.0
/// @file
/// Window attention as plain loops in double: the definition that everything faster is compared with.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/score/features.hpp>

#include <cmath>
#include <limits>
#include <vector>

/// What the reference backend is made of.
namespace restkv::reference {

/// One token's vector of a cache, in double. [head_dim]
template <element T>
[[nodiscard]] std::vector<double> token_row(const chunked_tensor_view<const T>& cache, index_t batch, index_t head,
                                            index_t token) {
  const auto part = cache.from_token(token);
  std::vector<double> row(static_cast<std::size_t>(part.extent(3)));
  for (index_t c = 0; c < part.extent(3); ++c) {
    row[static_cast<std::size_t>(c)] = widen<double>(part(batch, head, 0, c));
  }
  return row;
}

/// One query's attention over a sequence: a[n] = exp(s_n - max) / sum, s_n = q k_n / sqrt(d), over the tokens up to and
/// including the query's own; 0 beyond. See also `least_rest`.
struct attention_row {
  std::vector<double> share;  ///< a[n], [length]
  std::vector<double> logit;  ///< s_n, [tokens the query sees]
  index_t top = 0;            ///< the first token with the largest share
  double top_rest = 0;        ///< 1 - a[top], added up from the other shares

  /// 1 - a[n]. Only the top token can hold more than half, so only there would the subtraction lose digits.
  [[nodiscard]] double rest(index_t n) const { return n == top ? top_rest : 1.0 - share[static_cast<std::size_t>(n)]; }
};

/// Attention of window query `i` (0 the oldest of `window`) of one sequence and query head.
template <element T>
[[nodiscard]] attention_row window_attention(const layer_view<T>& layer, index_t batch, index_t query_head,
                                             index_t window, index_t i,
                                             const logit_perturbation& perturbation = {}) {
  const index_t group = layer.query.extent(1) / layer.key.extent(1);
  const index_t kv_head = query_head / group;
  const sequence_span span = sequence(layer, batch, kv_head);
  const index_t head_dim = layer.query.extent(3);
  const auto query = window_queries(layer, batch, query_head, window)[i];
  const index_t visible = span.length - window + i + 1;
  attention_row row;
  row.share.assign(static_cast<std::size_t>(span.length), 0.0);
  double largest = -std::numeric_limits<double>::infinity();
  for (index_t n = 0; n < visible; ++n) {
    const auto key = token_row(layer.key, batch, kv_head, span.begin + n);
    double dot = 0;
    for (index_t c = 0; c < head_dim; ++c) dot += widen<double>(query(c)) * key[static_cast<std::size_t>(c)];
    // A logit that is not a number counts as the lowest: a damaged key gets no attention and spoils nobody else's.
    constexpr double most = std::numeric_limits<double>::max();
    row.share[static_cast<std::size_t>(n)] =
        std::isnan(dot) ? -most : std::clamp(dot / std::sqrt(static_cast<double>(head_dim)), -most, most);
    if (perturbation.active()) {
      double& logit = row.share[static_cast<std::size_t>(n)];
      logit = std::clamp(perturbation(logit, batch, query_head, visible - 1, n), -most, most);
    }
    if (row.share[static_cast<std::size_t>(n)] > largest) {
      largest = row.share[static_cast<std::size_t>(n)];
      row.top = n;
    }
  }
  row.logit.assign(row.share.begin(), row.share.begin() + visible);
  double second = -std::numeric_limits<double>::infinity();
  for (index_t n = 0; n < visible; ++n) {
    if (n != row.top) second = std::max(second, row.share[static_cast<std::size_t>(n)]);
  }
  double others = 0;  // of exp(s_n - second), over all tokens but the top one
  for (index_t n = 0; n < visible; ++n) {
    double& share = row.share[static_cast<std::size_t>(n)];
    share = n == row.top ? 0.0 : std::exp(share - second);
    others += share;
  }
  // exp(second - largest) turns that into exp(s_n - largest).
  const double scale = visible < 2 ? 0.0 : std::max(std::exp(second - largest), least_rest / others);
  const double rest = others * scale;
  for (index_t n = 0; n < visible; ++n) row.share[static_cast<std::size_t>(n)] *= scale / (1.0 + rest);
  row.share[static_cast<std::size_t>(row.top)] = 1.0 / (1.0 + rest);
  row.top_rest = rest / (1.0 + rest);
  return row;
}

}  // namespace restkv::reference
