// SPDX-License-Identifier: Apache-2.0
/// @file
/// `bound_scores`: how far rounding may move each token's score, for any score of tokens.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/verify/parity/propagation.hpp>

#include <limits>
#include <span>
#include <vector>

namespace restkv::parity {

namespace detail {

/// A weighted sum of values, whole and without its top token, with the magnitudes and errors of its channels.
struct bounded_output {
  using vector = std::vector<double>;
  vector whole, without_top;        ///< sum a v
  vector size, size_without_top;    ///< sum a |v|
  vector delta, delta_without_top;  ///< sum da |v|
  double top_weight = 0;
  index_t top = -1;

  bounded_output(const std::vector<vector>& values, std::span<const double> share, std::span<const double> share_error,
                 index_t head_dim) {
    for (vector* sum : {&whole, &without_top, &size, &size_without_top, &delta, &delta_without_top}) {
      sum->assign(static_cast<std::size_t>(head_dim), 0.0);
    }
    for (std::size_t n = 0; n < share.size(); ++n) {
      if (top < 0 || share[n] > top_weight) {
        top = static_cast<index_t>(n);
        top_weight = share[n];
      }
    }
    for (std::size_t n = 0; n < share.size(); ++n) {
      for (std::size_t c = 0; c < whole.size(); ++c) {
        const double v = values[n][c];
        whole[c] += share[n] * v;
        size[c] += share[n] * std::fabs(v);
        delta[c] += share_error[n] * std::fabs(v);
        if (static_cast<index_t>(n) == top) continue;
        without_top[c] += share[n] * v;
        size_without_top[c] += share[n] * std::fabs(v);
        delta_without_top[c] += share_error[n] * std::fabs(v);
      }
    }
  }
};

/// The errors of one query head's token scores.
template <class Request, element T>
class head_bounds {
  using vector = std::vector<double>;
  using score_t = std::remove_cvref_t<decltype(Request::score)>;
  static constexpr feature needs = features_of<score_t>();
  static constexpr double infinite = std::numeric_limits<double>::infinity();

  /// What is known of one token under one query, or under the smoothed attention.
  struct attention_facts {
    double share = 0, share_error = 0;
    double rest = 1, rest_error = 0;
    double odds_error = 0;  // relative
    double logit = 0, logit_error = 0;
  };
  struct bounded {
    double value = 0, error = 0;
  };

 public:
  head_bounds(const Request& request, const layer_view<T>& layer, index_t b, index_t head, const arithmetic& unit)
      : request_(request),
        layer_(layer),
        batch_(b),
        head_(head),
        kv_head_(head / request.shape.group()),
        span_(sequence(layer, b, kv_head_)),
        unit_(unit),
        factor_(metric_of(request.score) == metric::projection && has(needs, metric_features)
                    ? layer.metric.factor[head]
                    : tensor_view<const float, 2>()),
        in_metric_(unit, request.shape.head_dim, factor_),
        plain_(unit, request.shape.head_dim, {}) {}

  /// Scores and their errors. [past], [past]
  void fill(vector& scores, vector& errors) {
    const index_t window = request_.window_of(span_.length);
    const index_t past = request_.past_of(span_.length);
    scores.assign(static_cast<std::size_t>(past), 0.0);
    errors.assign(scores.size(), 0.0);
    read_values();
    const auto note = [&](index_t n, const bounded& score) {
      scores[static_cast<std::size_t>(n)] = score.value;
      errors[static_cast<std::size_t>(n)] = score.error;
    };
    if (request_.window == 0) {
      const bounded_output nothing({}, {}, {}, request_.shape.head_dim);
      for (index_t n = 0; n < past; ++n) note(n, score(nothing, n, {}));
      return;
    }
    std::vector<bounded_attention> rows;
    for (index_t i = 0; i < window; ++i) {
      rows.push_back(bound_attention(layer_, batch_, head_, window, i, perturbation_of(request_.score), unit_));
      if (rows.back().unbounded) {
        errors.assign(scores.size(), infinite);
        return;
      }
      pool_shares(rows.back(), attention_pool_of(request_.score), past, unit_);
    }
    vector column(rows.size());
    vector column_errors(rows.size());
    const auto reduce = [&](index_t n, const auto& value_of) {
      const auto first = static_cast<std::size_t>(std::max<index_t>(0, n - (span_.length - window)));  // that sees n
      for (std::size_t i = first; i < rows.size(); ++i) {
        const bounded value = value_of(i);
        column[i] = value.value;
        column_errors[i] = value.error;
      }
      const auto values = std::span<const double>(column).subspan(first);
      return bounded{
          static_cast<double>(request_.temporal(values)),
          reduced_error(request_.temporal, values, std::span<const double>(column_errors).subspan(first), unit_)};
    };
    constexpr bool uses_output = has(needs, output_features);
    const auto output_of = [&](const vector& share, const vector& error) {
      return uses_output ? bounded_output(values_, share, error, request_.shape.head_dim)
                         : bounded_output({}, {}, {}, request_.shape.head_dim);
    };
    if (order_of(request_.score) == query_order::before) {
      std::vector<bounded_output> outputs;
      for (const bounded_attention& row : rows) outputs.push_back(output_of(row.row.share, row.share_error));
      for (index_t n = 0; n < past; ++n) {
        const auto at = static_cast<std::size_t>(n);
        note(n, reduce(n, [&](std::size_t i) {
               const bounded_attention& row = rows[i];
               return score(
                   outputs[i], n,
                   {row.row.share[at], row.share_error[at], row.row.rest(n), row.rest_error(n), row.odds_error[at],
                    at < row.row.logit.size() ? row.row.logit[at] : 0.0, row.logit_error[at]});
             }));
      }
      return;
    }
    vector share(scores.size());
    vector share_error(scores.size());
    std::vector<attention_facts> facts(scores.size());
    for (index_t n = 0; n < past; ++n) {
      const auto at = static_cast<std::size_t>(n);
      const bounded a = reduce(n, [&](std::size_t i) {
        return bounded{rows[i].row.share[at], rows[i].share_error[at]};
      });
      const bounded r = reduce(n, [&](std::size_t i) { return bounded{-rows[i].row.rest(n), rows[i].rest_error(n)}; });
      share[at] = a.value;
      share_error[at] = a.error;
      const double rest = -r.value;
      const double odds_error = a.value <= 0         ? 0.0
                                : rest > 2 * r.error ? a.error / a.value + 2 * r.error / rest
                                                     : infinite;
      facts[at] = {a.value, a.error, rest, r.error, odds_error + 2 * unit_.unit, 0, 0};
    }
    const bounded_output output = output_of(share, share_error);
    for (index_t n = 0; n < past; ++n) note(n, score(output, n, facts[static_cast<std::size_t>(n)]));
  }

 private:
  void read_values() {
    values_.clear();
    for (index_t n = 0; n < span_.length && has(needs, value_features); ++n) {
      values_.push_back(reference::token_row(layer_.value, batch_, kv_head_, span_.begin + n));
    }
    if constexpr (has(needs, feature::mean_distance)) {
      mean_.assign(static_cast<std::size_t>(request_.shape.head_dim), 0.0);
      mean_size_ = mean_;
      for (const vector& value : values_) {
        for (std::size_t c = 0; c < mean_.size(); ++c) {
          mean_[c] += value[c] / static_cast<double>(span_.length);
          mean_size_[c] += std::fabs(value[c]) / static_cast<double>(span_.length);
        }
      }
    }
  }

  [[nodiscard]] static vector magnitudes(const vector& x) {
    vector result;
    for (const double part : x) result.push_back(std::fabs(part));
    return result;
  }
  /// delta + gamma(n) size.
  [[nodiscard]] vector rounded(const vector& delta, const vector& size, index_t n) const {
    vector result = delta;
    for (std::size_t c = 0; c < result.size(); ++c) result[c] += unit_.gamma(n) * size[c];
    return result;
  }
  /// L^T x, or x.
  [[nodiscard]] vector image(const vector& x) const {
    if (factor_.data == nullptr) return x;
    vector result(x.size());
    for (index_t c = 0; c < request_.shape.head_dim; ++c) {
      for (index_t r = 0; r <= c; ++r) {
        result[static_cast<std::size_t>(r)] += static_cast<double>(factor_(c, r)) * x[static_cast<std::size_t>(c)];
      }
    }
    return result;
  }
  [[nodiscard]] static double product(const vector& x, const vector& y) {
    double sum = 0;
    for (std::size_t c = 0; c < x.size(); ++c) sum += x[c] * y[c];
    return sum;
  }
  [[nodiscard]] double length_of(const vector& x) const {
    const vector y = image(x);
    return std::sqrt(product(y, y));
  }

  [[nodiscard]] bounded score(const bounded_output& out, index_t n, const attention_facts& facts) const {
    const index_t terms = span_.length + 8;
    token_features<double> f;
    token_features<double> error;
    f.position = n;
    f.length = span_.length;
    f.batch = batch_;
    f.head = head_;
    f.layer = request_.shape.layer;
    const bool has_queries = request_.window > 0;
    if constexpr (has(needs, feature::attention)) {
      f.attention = facts.share;
      error.attention = facts.share_error;
    }
    if constexpr (has(needs, feature::odds)) {
      f.odds = facts.rest > 0 ? facts.share / facts.rest : std::numeric_limits<double>::max();
      if (has_queries) error.odds = f.odds > 0 ? f.odds * facts.odds_error + unit_.least : unit_.least;
    }
    if constexpr (has(needs, feature::logit)) {
      f.logit = facts.logit;
      error.logit = facts.logit_error;
    }
    if constexpr (has(needs, feature::output_norm)) {
      f.output_norm = length_of(out.whole);
      error.output_norm = in_metric_.norm_error(rounded(out.delta, out.size, terms), out.size, f.output_norm);
    }
    if constexpr (has(needs, value_features)) {
      const vector& value = values_[static_cast<std::size_t>(n)];
      const vector value_size = magnitudes(value);
      const vector none(value.size());
      if constexpr (has(needs, feature::distance)) {
        const bool is_top = n == out.top;
        vector x = out.without_top;
        // With most of the weight, o - v is added up from what the others pull: no difference of nearly equal vectors.
        const bool others_alone = is_top && facts.rest < 0.25;
        vector delta = others_alone ? out.delta_without_top : out.delta;
        vector size = others_alone ? out.size_without_top : out.size;
        for (std::size_t c = 0; c < x.size(); ++c) {
          x[c] += is_top         ? -facts.rest * value[c]
                  : out.top >= 0 ? out.top_weight * values_[static_cast<std::size_t>(out.top)][c] - value[c]
                                 : -value[c];
          size[c] += others_alone ? facts.rest * value_size[c] : value_size[c];
          if (is_top) delta[c] += facts.rest_error * value_size[c];
        }
        f.distance = length_of(x);
        error.distance = in_metric_.norm_error(rounded(delta, size, terms), size, f.distance);
      }
      if constexpr (has(needs, feature::alignment)) {
        f.alignment = product(image(out.whole), image(value));
        error.alignment = in_metric_.product_error(rounded(out.delta, out.size, terms), out.size, value_size);
      }
      if constexpr (has(needs, feature::value_norm)) {
        f.value_norm = length_of(value);
        error.value_norm = in_metric_.norm_error(none, value_size, f.value_norm);
      }
      if constexpr (has(needs, feature::value_norm_l1)) {
        for (const double part : value_size) f.value_norm_l1 += part;
        error.value_norm_l1 = f.value_norm_l1 * unit_.gamma(request_.shape.head_dim);
      }
      if constexpr (has(needs, feature::mean_distance)) {
        vector x = mean_;
        vector size = mean_size_;
        for (std::size_t c = 0; c < x.size(); ++c) {
          x[c] -= value[c];
          size[c] += value_size[c];
        }
        f.mean_distance = length_of(x);
        error.mean_distance = in_metric_.norm_error(rounded(none, size, terms), size, f.mean_distance);
      }
      if constexpr (has(needs, feature::projected_norm_l1)) {
        const index_t d = request_.shape.head_dim;
        double sizes = 0;
        for (index_t r = 0; r < layer_.projection.extent(0); ++r) {
          double sum = 0;
          for (index_t c = 0; c < d; ++c) {
            const double term = widen<double>(layer_.projection(r, head_ * d + c)) * value[static_cast<std::size_t>(c)];
            sum += term;
            sizes += std::fabs(term);
          }
          f.projected_norm_l1 += std::fabs(sum);
        }
        error.projected_norm_l1 = sizes * unit_.gamma(d + layer_.projection.extent(0));
      }
    }
    if constexpr (has(needs, feature::key_norm)) {
      const vector key = reference::token_row(layer_.key, batch_, kv_head_, span_.begin + n);
      f.key_norm = std::sqrt(product(key, key));
      error.key_norm = plain_.norm_error(vector(key.size()), magnitudes(key), f.key_norm);
    }
    return {static_cast<double>(request_.score(f)), propagate(request_.score, f, error, unit_)};
  }

  const Request& request_;
  const layer_view<T>& layer_;
  index_t batch_;
  index_t head_;
  index_t kv_head_;
  sequence_span span_;
  arithmetic unit_;
  tensor_view<const float, 2> factor_;
  value_bounds in_metric_;
  value_bounds plain_;
  std::vector<vector> values_;
  vector mean_;
  vector mean_size_;
};

}  // namespace detail

/// The scores of a request, as `tensor_backend::token_scores` defines them, with the error that rounding may give each.
struct bounded_scores {
  std::vector<double> score;  ///< [batch, heads, tokens]; defined below `past`
  std::vector<double> error;  ///< likewise; infinite where nothing can be said
};

/// Scores of a `token_score` with their bounds; features as in `bound_attention` and `value_bounds`, then `propagate`,
/// then the temporal reduction, then the reduction over a group: errors are reduced as scores are, because all of mean,
/// maximum, sum and root of the sum of squares move no more than the same of their arguments' errors.
template <class Request, element T>
requires token_score<std::remove_cvref_t<decltype(Request::score)>>
[[nodiscard]] bounded_scores bound_scores(const Request& request, const layer_view<T>& layer, const arithmetic& unit) {
  const problem_shape& shape = request.shape;
  bounded_scores result;
  result.score.assign(static_cast<std::size_t>(shape.batch * request.heads() * shape.tokens), 0.0);
  result.error = result.score;
  const index_t group = shape.query_heads / request.heads();
  std::vector<double> scores, errors;
  for (index_t b = 0; b < shape.batch; ++b) {
    for (index_t row = 0; row < request.heads(); ++row) {
      const auto first = static_cast<std::size_t>((b * request.heads() + row) * shape.tokens);
      for (index_t j = 0; j < group; ++j) {
        detail::head_bounds<Request, T>(request, layer, b, row * group + j, unit).fill(scores, errors);
        for (std::size_t n = 0; n < scores.size(); ++n) {
          result.score[first + n] = group_fold(request.group, result.score[first + n], scores[n], j == 0);
          result.error[first + n] = group_fold(request.group, result.error[first + n],
                                               errors[n] + unit.gamma(group + 2) * std::fabs(scores[n]), j == 0);
        }
      }
      for (std::size_t n = 0; n < scores.size(); ++n) {
        result.score[first + n] = group_finish(request.group, result.score[first + n], group);
        result.error[first + n] = group_finish(request.group, result.error[first + n], group);
      }
    }
  }
  return result;
}

/// Scores of a `head_score`, of which nothing is known but its code, with a bound that is measured rather than derived:
///
///     gamma(2 tokens + head_dim + 64) max |score| + 16 max |score in float - score in double|
///
/// both over the row. The second part is what rounding does to the code itself where the numbers are not well
/// conditioned (the direction of a mean that is nearly 0). `scores` are the reference's, [batch, heads, tokens].
template <class Request, element T>
requires head_score<std::remove_cvref_t<decltype(Request::score)>>
[[nodiscard]] bounded_scores bound_scores(const Request& request, const layer_view<T>& layer, const arithmetic& unit,
                                          const tensor_view<const double, 3>& scores) {
  using score_t = std::remove_cvref_t<decltype(request.score)>;
  const problem_shape& shape = request.shape;
  bounded_scores result;
  result.score.assign(scores.data, scores.data + scores.size());
  result.error.assign(result.score.size(), 0.0);
  const index_t group = shape.query_heads / request.heads();
  std::vector<float> scratch(static_cast<std::size_t>(scratch_size_of(request.score, shape)));
  for (index_t b = 0; b < shape.batch; ++b) {
    for (index_t row = 0; row < request.heads(); ++row) {
      const index_t past = request.past_of(sequence(layer, b, row * shape.kv_heads / request.heads()).length);
      std::vector<float> folded(static_cast<std::size_t>(past));
      const index_t members = scores_query_heads<score_t>() ? group : 1;
      for (index_t j = 0; j < members; ++j) {
        const head_view<T> head(layer, shape, b, row * group + j);
        std::vector<float> own(static_cast<std::size_t>(head.length()));
        request.score.score_head(head, std::span<float>(own), std::span<float>(scratch));
        for (std::size_t n = 0; n < folded.size(); ++n)
          folded[n] = group_fold(request.group, folded[n], own[n], j == 0);
      }
      double largest = 0, moved = 0;
      for (index_t n = 0; n < past; ++n) {
        const double score = scores(b, row, n);
        if (!std::isfinite(score)) continue;
        float& in_float = folded[static_cast<std::size_t>(n)];
        if (scores_query_heads<score_t>()) in_float = group_finish(request.group, in_float, group);
        largest = std::max(largest, std::fabs(score));
        const double difference = std::fabs(static_cast<double>(in_float) - score);
        moved = difference <= moved ? moved : difference;  // a NaN stays
      }
      for (index_t n = 0; n < past; ++n) {
        result.error[static_cast<std::size_t>(scores.offset(b, row, n))] =
            unit.gamma(2 * shape.tokens + shape.head_dim + 64) * largest + unit.unit * 0x1p24 * 16 * moved + unit.least;
      }
    }
  }
  return result;
}

}  // namespace restkv::parity
