// SPDX-License-Identifier: Apache-2.0
/// @file
/// `reference_backend`: every primitive as plain loops in double, in the order of the method's description.
///
/// It is slow, allocates, and exists to be read and compared with. Throws std::bad_alloc where memory runs out.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/reference/window_attention.hpp>

#include <algorithm>
#include <numeric>
#include <vector>

namespace restkv {

/// The reference: double precision, one thread, no blocking, no pruning.
class reference_backend {
 public:
  using score_type = double;  ///< all arithmetic is double

  /// body(0) .. body(n - 1), in order.
  template <class Body>
  void parallel_for(index_t n, const Body& body) const {
    for (index_t i = 0; i < n; ++i) body(i);
  }

  /// Working memory of a request; see `tensor_backend`.
  template <class Request>
  class scratch {
   public:
    /// Counts where the workspace counts.
    scratch(const reference_backend&, const Request& request, workspace& space)
        : drift_(space.take<double>(request.shape.batch * request.shape.query_heads),
                 {request.shape.batch, request.shape.query_heads}) {}
    /// Room for the drift of every query head. [batch, query_heads]
    [[nodiscard]] tensor_view<double, 2> drift() const noexcept { return drift_; }

   private:
    tensor_view<double, 2> drift_;
  };

  /// See `tensor_backend`.
  template <class Request, element T>
  status token_scores(const Request& request, const layer_view<T>& layer, scratch<Request>&,
                      tensor_view<double, 3> out) const {
    using score_t = std::remove_cvref_t<decltype(request.score)>;
    const index_t group = request.shape.query_heads / request.heads();
    for (index_t b = 0; b < request.shape.batch; ++b) {
      for (index_t row = 0; row < request.heads(); ++row) {
        const index_t past = request.past_of(sequence(layer, b, row * group / request.shape.group()).length);
        if constexpr (head_score<score_t> && !scores_query_heads<score_t>()) {  // the group's: nothing to reduce
          const std::vector<double> scores = head_scores(request, layer, b, row * group);
          std::copy_n(scores.begin(), past, out.data + out.offset(b, row, 0));
          continue;
        }
        for (index_t j = 0; j < group; ++j) {
          const std::vector<double> scores = head_scores(request, layer, b, row * group + j);
          for (index_t n = 0; n < past; ++n) {
            out(b, row, n) = group_fold(request.group, out(b, row, n), scores[static_cast<std::size_t>(n)], j == 0);
          }
        }
        for (index_t n = 0; n < past; ++n) out(b, row, n) = group_finish(request.group, out(b, row, n), group);
      }
    }
    return {};
  }

  /// t = mean over pairs of (mean index in the front half's row - mean index in the rear half's row), each over the
  /// most attended tokens of the row.
  template <class Request, element T>
  status window_drift(const Request& request, const layer_view<T>& layer, std::span<const index_t> most_attended,
                      scratch<Request>&, tensor_view<double, 2> out) const {
    for (index_t b = 0; b < request.shape.batch; ++b) {
      for (index_t h = 0; h < request.shape.query_heads; ++h) {
        const index_t length = sequence(layer, b, h / request.shape.group()).length;
        const index_t window = request.window_of(length);
        const index_t pairs = window / 2;
        const index_t chosen = std::min(most_attended[static_cast<std::size_t>(b)], length);
        double drift = 0;
        for (index_t pair = 0; pair < pairs && chosen > 0; ++pair) {
          drift += mean_index(reference::window_attention(layer, b, h, window, pair), chosen) -
                   mean_index(reference::window_attention(layer, b, h, window, pairs + pair), chosen);
        }
        out(b, h) = pairs > 0 ? drift / static_cast<double>(pairs) : 0.0;
      }
    }
    return {};
  }

 private:
  /// Mean index of the `count` largest shares; among equal ones the smaller index counts.
  [[nodiscard]] static double mean_index(const reference::attention_row& row, index_t count) {
    std::vector<index_t> order(row.share.size());
    std::iota(order.begin(), order.end(), index_t{0});
    std::sort(order.begin(), order.end(), [&](index_t a, index_t b) {
      const double left = row.share[static_cast<std::size_t>(a)];
      const double right = row.share[static_cast<std::size_t>(b)];
      return left != right ? left > right : a < b;
    });
    double sum = 0;
    for (index_t i = 0; i < count; ++i) sum += static_cast<double>(order[static_cast<std::size_t>(i)]);
    return sum / static_cast<double>(count);
  }

  /// <x, y>, or <W[h] x, W[h] y> as x^T G[h] y.
  template <element T>
  [[nodiscard]] static double product(const layer_view<T>& layer, metric how, index_t head,
                                      const std::vector<double>& x, const std::vector<double>& y) {
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
  [[nodiscard]] static double norm(const layer_view<T>& layer, metric how, index_t head, const std::vector<double>& x) {
    return std::sqrt(std::clamp(product(layer, how, head, x, x), 0.0, std::numeric_limits<double>::max()));
  }

  using vectors = std::vector<std::vector<double>>;

  /// sum_n w_n v_n, with the token `left_out` left out (-1: none). [head_dim]
  [[nodiscard]] static std::vector<double> weighted_values(const std::vector<double>& weights, const vectors& values,
                                                           index_t head_dim, index_t left_out) {
    std::vector<double> sum(static_cast<std::size_t>(head_dim));
    for (std::size_t n = 0; n < weights.size(); ++n) {
      if (static_cast<index_t>(n) == left_out) continue;
      for (std::size_t c = 0; c < sum.size(); ++c) sum[c] += weights[n] * values[n][c];
    }
    return sum;
  }

  /// An attention output o = sum_n w_n v_n, kept as the part without its top token so that o - v_top does not cancel.
  struct output {
    std::vector<double> without_top;
    double top_weight = 0;
    index_t top = -1;

    output(const std::vector<double>& weights, const vectors& values, index_t head_dim) {
      for (std::size_t n = 0; n < weights.size(); ++n) {
        if (top < 0 || weights[n] > top_weight) {
          top = static_cast<index_t>(n);
          top_weight = weights[n];
        }
      }
      without_top = weighted_values(weights, values, head_dim, top);
    }

    /// o - v_n; `rest` is 1 - w_n.
    [[nodiscard]] std::vector<double> less_value(const vectors& values, index_t n, double rest) const {
      std::vector<double> difference = without_top;
      for (std::size_t c = 0; c < difference.size(); ++c) {
        const double value = values[static_cast<std::size_t>(n)][c];
        difference[c] += n == top ? -rest * value : top_weight * values[static_cast<std::size_t>(top)][c] - value;
      }
      return difference;
    }

    [[nodiscard]] std::vector<double> whole(const vectors& values) const {
      std::vector<double> sum = without_top;
      for (std::size_t c = 0; c < sum.size() && top >= 0; ++c) {
        sum[c] += top_weight * values[static_cast<std::size_t>(top)][c];
      }
      return sum;
    }
  };

  /// Scores of one query head over the past, before the group reduction. [past]
  template <class Request, element T>
  [[nodiscard]] static std::vector<double> head_scores(const Request& request, const layer_view<T>& layer, index_t b,
                                                       index_t head) {
    using score_t = std::remove_cvref_t<decltype(request.score)>;
    if constexpr (head_score<score_t>) {
      const head_view<T> view(layer, request.shape, b, head);
      std::vector<double> scores(static_cast<std::size_t>(view.length()));
      std::vector<double> scratch(static_cast<std::size_t>(scratch_size_of(request.score, request.shape)));
      request.score.score_head(view, std::span<double>(scores), std::span<double>(scratch));
      return scores;
    } else {
      return scores_of_tokens(request, layer, b, head);
    }
  }

  /// Averages each row's shares over `width` neighbours of the past, and scales them back to their sum.
  static void pool_attention(int width, index_t past, std::vector<reference::attention_row>& rows) {
    if (width <= 1) return;
    for (reference::attention_row& row : rows) {
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

  template <class Request, element T>
  [[nodiscard]] static std::vector<double> scores_of_tokens(const Request& request, const layer_view<T>& layer,
                                                            index_t b, index_t head) {
    const index_t kv_head = head / request.shape.group();
    const sequence_span span = sequence(layer, b, kv_head);
    const index_t window = request.window_of(span.length);
    const index_t past = request.past_of(span.length);
    const metric how = metric_of(request.score);
    constexpr feature needs = decltype(request.score)::needs;
    constexpr bool uses_output = has(needs, output_features);

    vectors values;  // [length][head_dim]
    if constexpr (has(needs, value_features)) {
      for (index_t n = 0; n < span.length; ++n) {
        values.push_back(reference::token_row(layer.value, b, kv_head, span.begin + n));
      }
    }
    std::vector<double> mean_value(static_cast<std::size_t>(request.shape.head_dim));
    if constexpr (has(needs, feature::mean_distance)) {
      mean_value = weighted_values(std::vector<double>(values.size(), 1.0 / static_cast<double>(span.length)), values,
                                   request.shape.head_dim, -1);
    }
    const auto score_one = [&](const output& out, index_t n, double attention, double rest, double output_norm,
                               double logit) {
      token_features<double> f;
      f.position = n;
      f.length = span.length;
      f.batch = b;
      f.head = head;
      f.layer = request.shape.layer;
      f.attention = attention;
      f.odds = rest > 0 ? attention / rest : std::numeric_limits<double>::max();
      f.output_norm = output_norm;
      f.logit = logit;
      if constexpr (has(needs, value_features)) {
        const std::vector<double>& value = values[static_cast<std::size_t>(n)];
        if constexpr (has(needs, feature::distance)) {
          f.distance = norm(layer, how, head, out.less_value(values, n, rest));
        }
        if constexpr (has(needs, feature::alignment)) f.alignment = product(layer, how, head, out.whole(values), value);
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
            norm(layer, metric::identity, head, reference::token_row(layer.key, b, kv_head, span.begin + n));
      }
      return request.score(f);
    };
    const auto output_of = [&](const std::vector<double>& weights) {
      return output(uses_output ? weights : std::vector<double>{}, values, request.shape.head_dim);
    };

    std::vector<double> result(static_cast<std::size_t>(past));
    if (request.window == 0) {  // no queries: one score per token
      for (index_t n = 0; n < past; ++n) result[static_cast<std::size_t>(n)] = score_one(output_of({}), n, 0, 1, 0, 0);
      return result;
    }

    std::vector<reference::attention_row> rows;  // [window]
    for (index_t i = 0; i < window; ++i) {
      rows.push_back(reference::window_attention(layer, b, head, window, i, perturbation_of(request.score)));
    }
    pool_attention(attention_pool_of(request.score), past, rows);
    // Query i sees the tokens before length - window + i + 1. A token is scored by those that see it.
    const auto first_observer = [&](index_t n) {
      return static_cast<std::size_t>(std::max<index_t>(0, n - (span.length - window)));
    };
    std::vector<double> column(static_cast<std::size_t>(window));
    const auto reduce = [&](index_t n, const auto& value_of) {
      const std::size_t first = first_observer(n);
      for (std::size_t i = first; i < rows.size(); ++i) column[i] = value_of(i);
      return static_cast<double>(request.temporal(std::span<const double>(column).subspan(first)));
    };

    if (order_of(request.score) == query_order::before) {
      std::vector<output> outputs;
      std::vector<double> norms;
      for (const auto& row : rows) {
        outputs.push_back(output_of(row.share));
        norms.push_back(norm(layer, how, head, outputs.back().whole(values)));
      }
      for (index_t n = 0; n < past; ++n) {
        const auto at = static_cast<std::size_t>(n);
        result[at] = reduce(n, [&](std::size_t i) {
          return score_one(outputs[i], n, rows[i].share[at], rows[i].rest(n), norms[i], rows[i].logit[at]);
        });
      }
      return result;
    }

    // After: smooth the attention over the past. 1 - smoothed is not a subtraction: as the rows' rests r are 1 - a,
    // 1 - S(1 - r) = -S(-r) for every smoother S that does not mind a constant.
    std::vector<double> smoothed(static_cast<std::size_t>(past));
    std::vector<double> rests(static_cast<std::size_t>(past));
    for (index_t n = 0; n < past; ++n) {
      const auto at = static_cast<std::size_t>(n);
      smoothed[at] = reduce(n, [&](std::size_t i) { return rows[i].share[at]; });
      rests[at] = -reduce(n, [&](std::size_t i) { return -rows[i].rest(n); });
    }
    const output out = output_of(smoothed);
    const double output_norm = norm(layer, how, head, out.whole(values));
    for (index_t n = 0; n < past; ++n) {
      const auto at = static_cast<std::size_t>(n);
      result[at] = score_one(out, n, smoothed[at], rests[at], output_norm, 0);
    }
    return result;
  }
};

static_assert(tensor_backend<reference_backend>);

}  // namespace restkv
