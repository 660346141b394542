// SPDX-License-Identifier: Apache-2.0
/// @file
/// The features of one token under one query, and its score, as plain loops in double.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/reference/window_attention.hpp>

#include <algorithm>
#include <vector>

namespace restkv::reference {

/// <x, y>, or <W[h] x, W[h] y> as x^T G[h] y.
template <element T>
[[nodiscard]] double product(const layer_view<T>& layer, metric how, index_t head, const std::vector<double>& x,
                             const std::vector<double>& y) {
  double sum = 0;
  for (index_t r = 0; r < static_cast<index_t>(x.size()); ++r) {
    const double left = x[static_cast<std::size_t>(r)];
    if (how == metric::identity) {
      sum += left * y[static_cast<std::size_t>(r)];
      continue;
    }
    for (index_t c = 0; c < static_cast<index_t>(y.size()); ++c) {
      sum += left * layer.metric.gram(head, r, c) * y[static_cast<std::size_t>(c)];
    }
  }
  return sum;
}

/// ||x||, or ||W[h] x|| as the root of x^T G[h] x. A square beyond the largest double counts as that.
template <element T>
[[nodiscard]] double norm(const layer_view<T>& layer, metric how, index_t head, const std::vector<double>& x) {
  return std::sqrt(std::clamp(product(layer, how, head, x, x), 0.0, std::numeric_limits<double>::max()));
}

/// An attention output o = sum_n w_n v_n, kept as the part without its top token so that o - v_top does not cancel.
struct output {
  std::vector<double> without_top{};  ///< [head_dim]
  std::vector<double> top_value{};    ///< [head_dim]
  double top_weight = 0;              ///< the largest w_n
  index_t top = -1;                   ///< the first token that has it; -1 where there is none

  /// o - v_n; `rest` is 1 - w_n.
  [[nodiscard]] std::vector<double> less_value(const std::vector<double>& value, index_t n, double rest) const {
    std::vector<double> difference = without_top;
    for (std::size_t c = 0; c < difference.size(); ++c) {
      difference[c] += n == top ? -rest * value[c] : top_weight * top_value[c] - value[c];
    }
    return difference;
  }
  /// o.
  [[nodiscard]] std::vector<double> whole() const {
    std::vector<double> sum = without_top;
    for (std::size_t c = 0; c < sum.size() && top >= 0; ++c) sum[c] += top_weight * top_value[c];
    return sum;
  }
};

/// One query head of one sequence, whose tokens are scored one by one.
template <class Request, element T>
struct token_scorer {
  const Request& request;            ///< what is asked for
  const layer_view<T>& layer;        ///< of the cache
  index_t batch = 0;                 ///< sequence
  index_t head = 0;                  ///< query head
  index_t begin = 0;                 ///< of the sequence's first token on the layer's token axis
  index_t length = 0;                ///< of the sequence
  std::vector<double> mean_value{};  ///< of the sequence, where the score asks for it

  /// The score of token n, whose value is `value`, under a query with this output.
  [[nodiscard]] double operator()(const output& out, const std::vector<double>& value, index_t n, double attention,
                                  double rest, double output_norm, double logit) const {
    constexpr feature needs = decltype(request.score)::needs;
    const metric how = metric_of(request.score);
    token_features<double> f;
    f.position = n;
    f.length = length;
    f.batch = batch;
    f.head = request.shape.first_query_head() + head;
    f.layer = request.shape.layer;
    f.attention = attention;
    f.odds = rest > 0 ? attention / rest : std::numeric_limits<double>::max();
    f.output_norm = output_norm;
    f.logit = logit;
    if constexpr (has(needs, value_features)) {
      if constexpr (has(needs, feature::distance)) f.distance = norm(layer, how, head, out.less_value(value, n, rest));
      if constexpr (has(needs, feature::alignment)) f.alignment = product(layer, how, head, out.whole(), value);
      if constexpr (has(needs, feature::value_norm)) f.value_norm = norm(layer, how, head, value);
      if constexpr (has(needs, feature::value_norm_l1)) {
        for (const double channel : value) f.value_norm_l1 += std::fabs(channel);
      }
      if constexpr (has(needs, feature::projected_norm_l1)) {
        const index_t head_dim = request.shape.head_dim;
        for (index_t r = 0; r < layer.projection.extent(0); ++r) {
          double image = 0;
          for (index_t c = 0; c < head_dim; ++c) {
            image += widen<double>(layer.projection(r, head * head_dim + c)) * value[static_cast<std::size_t>(c)];
          }
          f.projected_norm_l1 += std::fabs(image);
        }
      }
      if constexpr (has(needs, feature::mean_distance)) {
        std::vector<double> difference = mean_value;
        for (std::size_t c = 0; c < difference.size(); ++c) difference[c] -= value[c];
        f.mean_distance = norm(layer, how, head, difference);
      }
    }
    if constexpr (has(needs, feature::key_norm)) {
      f.key_norm =
          norm(layer, metric::identity, head, token_row(layer.key, batch, head / request.shape.group(), begin + n));
    }
    return request.score(f);
  }
};

/// Vectors of a range's tokens. [tokens][head_dim]
using token_vectors = std::vector<std::vector<double>>;

/// sum_n w_n v_n of each row of weights over a sequence, the token left_out[row] left out (-1: none). [rows][head_dim]
template <class Parts>
[[nodiscard]] std::vector<std::vector<double>> weighted_values(const token_vectors& weights,
                                                               const token_vectors& values, index_t first,
                                                               const std::vector<index_t>& left_out, index_t head_dim,
                                                               Parts& parts) {
  const auto channels = static_cast<std::size_t>(head_dim);
  std::vector<double> sums(weights.size() * channels);
  parts.fold(sums, [&] {
    for (std::size_t i = 0; i < weights.size(); ++i) {
      for (std::size_t n = 0; n < weights[i].size(); ++n) {
        if (first + static_cast<index_t>(n) == left_out[i]) continue;
        for (std::size_t c = 0; c < channels; ++c) sums[i * channels + c] += weights[i][n] * values[n][c];
      }
    }
  });
  std::vector<std::vector<double>> rows;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    rows.emplace_back(sums.begin() + static_cast<std::ptrdiff_t>(i * channels),
                      sums.begin() + static_cast<std::ptrdiff_t>((i + 1) * channels));
  }
  return rows;
}

/// The outputs of rows of weights over a sequence, their top tokens apart. `weights` are those of the tokens from
/// `first` on that are here.
template <class Parts>
[[nodiscard]] std::vector<output> outputs_of(const token_vectors& weights, const token_vectors& values, index_t first,
                                             index_t head_dim, Parts& parts) {
  std::vector<peak> peaks(weights.size());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    for (std::size_t n = 0; n < weights[i].size(); ++n) peaks[i].add(weights[i][n], first + static_cast<index_t>(n));
  }
  parts.combine(peaks);
  std::vector<index_t> tops;
  for (const peak& p : peaks) tops.push_back(p.top);
  const auto sums = weighted_values(weights, values, first, tops, head_dim, parts);
  const auto channels = static_cast<std::size_t>(head_dim);
  std::vector<double> top_values(weights.size() * channels);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const index_t n = tops[i] - first;
    if (tops[i] < 0 || n < 0 || n >= static_cast<index_t>(weights[i].size())) continue;
    std::copy(values[static_cast<std::size_t>(n)].begin(), values[static_cast<std::size_t>(n)].end(),
              top_values.begin() + static_cast<std::ptrdiff_t>(i * channels));
  }
  parts.unite(top_values);
  std::vector<output> made;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto begin = top_values.begin() + static_cast<std::ptrdiff_t>(i * channels);
    made.push_back({sums[i], {begin, begin + head_dim}, tops[i] < 0 ? 0.0 : peaks[i].largest, tops[i]});
  }
  return made;
}

/// Averages each row's shares over `width` neighbours of the past, and scales them back to their sum. Of whole
/// sequences.
inline void pool_attention(int width, index_t past, std::vector<attention_row>& rows) {
  if (width <= 1) return;
  for (attention_row& row : rows) {
    std::vector<double> pooled(static_cast<std::size_t>(past));
    double before = 0;
    double after = 0;
    for (index_t n = 0; n < past; ++n) {
      for (index_t m = std::max<index_t>(0, n - width / 2); m <= std::min(past - 1, n + width / 2); ++m) {
        pooled[static_cast<std::size_t>(n)] += row.share[static_cast<std::size_t>(m)] / width;
      }
      before += row.share[static_cast<std::size_t>(n)];
      after += pooled[static_cast<std::size_t>(n)];
    }
    const double scale = after > 0 ? before / after : 0.0;
    for (index_t n = 0; n < past; ++n) {
      row.share[static_cast<std::size_t>(n)] = pooled[static_cast<std::size_t>(n)] * scale;
    }
  }
}

/// Scores of one query head's tokens of the past that are here, before the group reduction. `parts` says what is known
/// of the tokens that are not (`whole_sequence`).
template <class Request, element T, class Parts>
[[nodiscard]] std::vector<double> scores_of_tokens(const Request& request, const layer_view<T>& layer, index_t batch,
                                                   index_t head, const token_range& tokens, Parts& parts) {
  const index_t kv_head = head / request.shape.group();
  const index_t head_dim = request.shape.head_dim;
  const index_t window = request.window_of(tokens.length);
  const std::size_t past = tokens.until(request.past_of(tokens.length));
  const metric how = metric_of(request.score);
  constexpr feature needs = decltype(request.score)::needs;

  token_vectors values;
  if constexpr (has(needs, value_features)) {
    for (index_t n = tokens.first; n < tokens.end; ++n) {
      values.push_back(token_row(layer.value, batch, kv_head, tokens.begin + n));
    }
  }
  token_scorer<Request, T> scorer{request, layer, batch, head, tokens.begin, tokens.length};
  if constexpr (has(needs, feature::mean_distance)) {
    const std::vector<double> even(values.size(), 1.0 / static_cast<double>(tokens.length));
    scorer.mean_value = weighted_values({even}, values, tokens.first, {-1}, head_dim, parts)[0];
  }
  const std::vector<double> no_value;
  const auto score_one = [&](const output& out, std::size_t at, double attention, double rest, double output_norm,
                             double logit) {
    return scorer(out, values.empty() ? no_value : values[at], tokens.first + static_cast<index_t>(at), attention, rest,
                  output_norm, logit);
  };
  const auto make_outputs = [&](const token_vectors& weights) {
    if constexpr (has(needs, output_features)) return outputs_of(weights, values, tokens.first, head_dim, parts);
    return std::vector<output>(weights.size(), output{std::vector<double>(static_cast<std::size_t>(head_dim))});
  };

  std::vector<double> result(past);
  if (request.window == 0) {  // no queries: one score per token
    const output none{std::vector<double>(static_cast<std::size_t>(head_dim))};
    for (std::size_t n = 0; n < past; ++n) result[n] = score_one(none, n, 0, 1, 0, 0);
    return result;
  }

  std::vector<attention_row> rows =
      window_attention(layer, batch, head, tokens, window, 0, window,
                       {perturbation_of(request.score), request.shape.first_query_head()}, parts);
  pool_attention(attention_pool_of(request.score), static_cast<index_t>(past), rows);
  // Query i sees the tokens before length - window + i + 1. A token is scored by those that see it.
  const auto first_observer = [&](std::size_t at) {
    const index_t n = tokens.first + static_cast<index_t>(at);
    return static_cast<std::size_t>(std::max<index_t>(0, n - (tokens.length - window)));
  };
  std::vector<double> column(static_cast<std::size_t>(window));
  const auto reduce = [&](std::size_t at, const auto& value_of) {
    const std::size_t first = first_observer(at);
    for (std::size_t i = first; i < rows.size(); ++i) column[i] = value_of(i);
    return static_cast<double>(request.temporal(std::span<const double>(column).subspan(first)));
  };

  if (order_of(request.score) == query_order::before) {
    token_vectors shares;
    for (const attention_row& row : rows) shares.push_back(row.share);
    const std::vector<output> outputs = make_outputs(shares);
    std::vector<double> norms;
    for (const output& out : outputs) norms.push_back(norm(layer, how, head, out.whole()));
    for (std::size_t n = 0; n < past; ++n) {
      result[n] = reduce(n, [&](std::size_t i) {
        return score_one(outputs[i], n, rows[i].share[n], rows[i].rest(tokens.first + static_cast<index_t>(n)),
                         norms[i], rows[i].logit[n]);
      });
    }
    return result;
  }

  // After: smooth the attention over the past. 1 - smoothed is not a subtraction: as the rows' rests r are 1 - a,
  // 1 - S(1 - r) = -S(-r) for every smoother S that does not mind a constant.
  std::vector<double> smoothed(past);
  std::vector<double> rests(past);
  for (std::size_t n = 0; n < past; ++n) {
    smoothed[n] = reduce(n, [&](std::size_t i) { return rows[i].share[n]; });
    rests[n] = -reduce(n, [&](std::size_t i) { return -rows[i].rest(tokens.first + static_cast<index_t>(n)); });
  }
  const output out = make_outputs({smoothed})[0];
  const double output_norm = norm(layer, how, head, out.whole());
  for (std::size_t n = 0; n < past; ++n) {
    result[n] = score_one(out, n, smoothed[n], rests[n], output_norm, 0);
  }
  return result;
}

}  // namespace restkv::reference
