// SPDX-License-Identifier: Apache-2.0
/// @file
/// Window attention as plain loops in double: the definition that everything faster is compared with.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/score/features.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
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

/// A sequence, or a part of it: the tokens [first, end) of `length`, token n at begin + n of the layer's token axis.
struct token_range {
  index_t length = 0;  ///< of the whole sequence
  index_t first = 0;   ///< token that is here
  index_t end = 0;     ///< one behind the last
  index_t begin = 0;   ///< of the sequence on the axis; negative where tokens before the axis are elsewhere

  constexpr token_range() = default;
  /// All of a sequence.
  explicit constexpr token_range(const sequence_span& span) noexcept
      : length(span.length), end(span.length), begin(span.begin) {}
  /// A part of one.
  constexpr token_range(index_t whole, index_t from, index_t to, index_t at) noexcept
      : length(whole), first(from), end(to), begin(at) {}

  /// How many tokens there are before token n, which may be beyond the end.
  [[nodiscard]] constexpr std::size_t until(index_t n) const noexcept {
    return static_cast<std::size_t>(std::clamp(n, first, end) - first);
  }
};

/// The largest of some numbers, the first token that has it (-1: there is none), and the largest of the others.
struct peak {
  double largest = -std::numeric_limits<double>::infinity();  ///< of all
  double second = -std::numeric_limits<double>::infinity();   ///< of those but `top`
  index_t top = -1;                                           ///< token

  /// Takes in a number of a token behind those before.
  void add(double number, index_t token) noexcept { add({number, -std::numeric_limits<double>::infinity(), token}); }
  /// Takes in tokens behind those before.
  void add(const peak& other) noexcept {
    if (other.top < 0) return;
    const bool higher = top < 0 || other.largest > largest;
    second = std::max({second, other.second, higher ? largest : other.largest});
    if (higher) largest = other.largest, top = other.top;
  }
};

/// What is known of a whole sequence from parts of it, where all of it is here: nothing is to be done. Elsewhere
/// `fold` lets each part in order add its terms to `running` by add(); `combine` makes the parts' peaks one; `unite`
/// adds up numbers that are 0 in all parts but one.
struct whole_sequence {
  ///@{
  /// See there.
  template <class Add>
  void fold(std::span<double>, const Add& add) const {
    add();
  }
  void combine(std::span<peak>) const noexcept {}
  void unite(std::span<double>) const noexcept {}
  ///@}
};

/// One query's attention over a sequence: a[n] = exp(s_n - max) / sum, s_n = q k_n / sqrt(d), over the tokens up to and
/// including the query's own; 0 beyond. See also `least_rest`.
struct attention_row {
  std::vector<double> share;  ///< a[n], [tokens of the range]
  std::vector<double> logit;  ///< s_n, [tokens of the range that the query sees]
  index_t first = 0;          ///< of the range: share[0] is that of this token
  index_t top = 0;            ///< the first token of the sequence with the largest share
  double top_rest = 0;        ///< 1 - a[top], added up from the other shares

  /// 1 - a[n]. Only the top token can hold more than half, so only there would the subtraction lose digits.
  [[nodiscard]] double rest(index_t n) const {
    return n == top ? top_rest : 1.0 - share[static_cast<std::size_t>(n - first)];
  }
};

/// Attention of the queries [first_query, first_query + queries) of a window (0 the oldest of `window`) over a range of
/// tokens of a sequence, of one query head. [queries]
template <element T, class Parts>
[[nodiscard]] std::vector<attention_row> window_attention(const layer_view<T>& layer, index_t batch, index_t query_head,
                                                          const token_range& tokens, index_t window,
                                                          index_t first_query, index_t queries,
                                                          const head_perturbation& perturbation, Parts& parts) {
  const index_t kv_head = query_head / (layer.query.extent(1) / layer.key.extent(1));
  const index_t head_dim = layer.query.extent(3);
  std::vector<attention_row> rows(static_cast<std::size_t>(queries));
  std::vector<peak> peaks(rows.size());
  const auto visible_to = [&](std::size_t i) {
    return tokens.length - window + first_query + static_cast<index_t>(i) + 1;
  };
  for (index_t n = tokens.first; n < tokens.end; ++n) {
    const auto key = token_row(layer.key, batch, kv_head, tokens.begin + n);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (n >= visible_to(i)) continue;
      const auto query = window_queries(layer, batch, query_head, window)[first_query + static_cast<index_t>(i)];
      double dot = 0;
      for (index_t c = 0; c < head_dim; ++c) dot += widen<double>(query(c)) * key[static_cast<std::size_t>(c)];
      // A logit that is not a number counts as the lowest: a damaged key gets no attention and spoils nobody else's.
      constexpr double most = std::numeric_limits<double>::max();
      double logit = std::isnan(dot) ? -most : std::clamp(dot / std::sqrt(static_cast<double>(head_dim)), -most, most);
      if (perturbation.active()) {
        logit = std::clamp(perturbation(logit, batch, query_head, visible_to(i) - 1, n), -most, most);
      }
      peaks[i].add(logit, n);
      rows[i].logit.push_back(logit);
    }
  }
  parts.combine(peaks);
  std::vector<double> others(rows.size());  // sum of exp(s_n - second), over all tokens but the top one
  for (std::size_t i = 0; i < rows.size(); ++i) {
    attention_row& row = rows[i];
    row.first = tokens.first;
    row.top = peaks[i].top;
    row.share.assign(tokens.until(tokens.end), 0.0);
    for (std::size_t n = 0; n < row.logit.size(); ++n) {
      const bool is_top = tokens.first + static_cast<index_t>(n) == row.top;
      row.share[n] = is_top ? 0.0 : std::exp(row.logit[n] - peaks[i].second);
    }
  }
  parts.fold(others, [&] {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (std::size_t n = 0; n < rows[i].logit.size(); ++n) others[i] += rows[i].share[n];
    }
  });
  for (std::size_t i = 0; i < rows.size(); ++i) {
    attention_row& row = rows[i];
    // exp(second - largest) turns that into exp(s_n - largest).
    const double scale =
        visible_to(i) < 2 ? 0.0 : std::max(std::exp(peaks[i].second - peaks[i].largest), least_rest / others[i]);
    const double rest = others[i] * scale;
    for (std::size_t n = 0; n < row.logit.size(); ++n) row.share[n] *= scale / (1.0 + rest);
    if (row.top >= tokens.first && row.top < tokens.end) {
      row.share[static_cast<std::size_t>(row.top - tokens.first)] = 1.0 / (1.0 + rest);
    }
    row.top_rest = rest / (1.0 + rest);
  }
  return rows;
}

/// Attention of window query `i` (0 the oldest of `window`) of one sequence and query head.
template <element T>
[[nodiscard]] attention_row window_attention(const layer_view<T>& layer, index_t batch, index_t query_head,
                                             index_t window, index_t i, const head_perturbation& perturbation = {}) {
  const index_t kv_head = query_head / (layer.query.extent(1) / layer.key.extent(1));
  whole_sequence parts;
  return window_attention(layer, batch, query_head, token_range(sequence(layer, batch, kv_head)), window, i, 1,
                          perturbation, parts)[0];
}

}  // namespace restkv::reference
