// SPDX-License-Identifier: Apache-2.0
/// @file
/// How far rounding may move what attention is made of: logits, softmax, odds, outputs, distances and norms.
///
/// Every bound is of the form n u sum |x|, computed in double beside the number it is for. u is the unit roundoff of
/// the arithmetic, 2^-24 for float; gamma(n) = n u / (1 - n u) bounds the relative error of n roundings in a row, and
/// so that of a sum of n terms in any order, relative to the sum of the terms' magnitudes (Higham, Accuracy and
/// Stability of Numerical Algorithms, chapter 3). An implementation may therefore sum in any order, with or without
/// fused multiply-adds, and rescale a running softmax as often as it likes.
#pragma once

#include <restkv/reference/window_attention.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace restkv::parity {

/// The arithmetic whose results are bounded.
struct arithmetic {
  double unit = 0x1p-24;     ///< unit roundoff
  double least = 0x1p-126;   ///< the smallest normal number: what lies below may be flushed to 0
  double largest = 0x1p127;  ///< beyond it sums overflow, and nothing is promised
  double exponential = 4;    ///< roundings that an exponential is worth
  /// Where all tokens but one get less than `least_rest` of the attention together: whether they must get that in their
  /// true proportions, as backends promise, or may also get 0, as a plain softmax gives them.
  bool keeps_least_rest = true;

  /// The relative error of n roundings.
  [[nodiscard]] double gamma(index_t n) const noexcept {
    const double all = static_cast<double>(n) * unit;
    return all < 0.5 ? all / (1 - all) : std::numeric_limits<double>::infinity();
  }
  /// Float or double.
  template <std::floating_point Real>
  [[nodiscard]] static arithmetic of() noexcept {
    using limits = std::numeric_limits<Real>;
    return {static_cast<double>(limits::epsilon()) / 2, static_cast<double>(limits::min()),
            static_cast<double>(limits::max()) / 4, 4, true};
  }
};

/// One query's attention with bounds. Vectors are [length].
struct bounded_attention {
  reference::attention_row row;     ///< in double
  std::vector<double> logit_error;  ///< |error of s_n|
  std::vector<double> share_error;  ///< |error of a_n|
  std::vector<double> odds_error;   ///< relative, of a_n / (1 - a_n)
  double top_rest_error = 0;        ///< |error of 1 - a[top]|, added up from the other shares
  bool unbounded = false;           ///< a product left the range of the arithmetic

  /// |error of 1 - a_n|.
  [[nodiscard]] double rest_error(index_t n) const noexcept {
    return n == row.top ? top_rest_error : share_error[static_cast<std::size_t>(n)];
  }
};

/// Attention of window query `i` as `reference::window_attention`, with its bounds:
///
/// * logit s = q k / sqrt(d): gamma(d + 4) sum_c |q_c k_c| / sqrt(d), d products and sums, the scaling by 1 / sqrt(d)
/// and by
///   log2 e included, and d times the smallest normal number where products underflow;
/// * exp(s - M): the error of s, 2 u (|s| + |M|) for the difference, 4 u for the exponential: e_n, as the logarithm of
/// the
///   relative error. An error of M itself cancels;
/// * share a = exp(s_n - M) / sum: e_n, the mean of the e_m weighted by a_m, gamma(length + 8) for the sum;
/// * odds a / (1 - a) = exp(s_n) / sum of the others: e_n, the mean of the others' e_m, gamma(length + 8). Relative,
/// also
///   where a is nearly 1: a subtraction 1 - a does not keep this bound;
/// * what is smaller than the smallest normal number may be 0; see also `arithmetic::keeps_least_rest`.
template <element T>
[[nodiscard]] bounded_attention bound_attention(const layer_view<T>& layer, index_t batch, index_t head, index_t window,
                                                index_t i, const logit_perturbation& noise, const arithmetic& unit) {
  bounded_attention result;
  result.row = reference::window_attention(layer, batch, head, window, i, noise);
  const reference::attention_row& row = result.row;
  const std::size_t length = row.share.size();
  const std::size_t visible = row.logit.size();
  result.logit_error.assign(length, 0.0);
  result.share_error.assign(length, 0.0);
  result.odds_error.assign(length, 0.0);
  const index_t kv_head = head / (layer.query.extent(1) / layer.key.extent(1));
  const index_t d = layer.query.extent(3);
  const sequence_span span = sequence(layer, batch, kv_head);
  const auto query = window_queries(layer, batch, head, window)[i];
  const double root = std::sqrt(static_cast<double>(d));
  const double most = row.logit[static_cast<std::size_t>(row.top)];
  std::vector<double> e(visible);  // errors of the exponents
  for (std::size_t n = 0; n < visible; ++n) {
    const auto part = layer.key.from_token(span.begin + static_cast<index_t>(n));
    double sum = 0, size = 0;
    for (index_t c = 0; c < d; ++c) {
      const double product = widen<double>(query(c)) * widen<double>(part(batch, kv_head, 0, c));
      sum += product;
      size += std::fabs(product);
    }
    // Whatever the arithmetic, a logit that is not a number or -inf is the lowest there is.
    if (std::isnan(sum) || sum == -std::numeric_limits<double>::infinity()) continue;
    if (!(size < unit.largest)) {
      result.unbounded = true;
      return result;
    }
    double error = (unit.gamma(d + 4) * size + static_cast<double>(d) * unit.least) / root;
    if (noise.active()) {
      // -log(-log(uniform)) is at most 18 in magnitude, and each logarithm good to 4 roundings.
      error =
          (error + unit.unit * 8 * 20) / static_cast<double>(noise.temperature) + unit.unit * std::fabs(row.logit[n]);
    }
    result.logit_error[n] = error;
    e[n] = error + 2 * unit.unit * (std::fabs(row.logit[n]) + std::fabs(most)) + unit.exponential * unit.unit;
  }
  const double sum_error = unit.gamma(static_cast<index_t>(visible) + 8);
  double others = 0, all = 0;  // of a_m e_m
  for (std::size_t m = 0; m < visible; ++m) {
    // Without weight, the error of an exponent does not matter, as long as the weight stays small.
    const double weighted = row.share[m] > 0 ? row.share[m] * std::expm1(std::min(e[m], 700.0)) : 0.0;
    all += weighted;
    if (static_cast<index_t>(m) != row.top) others += weighted;
  }
  for (std::size_t n = 0; n < visible; ++n) {
    const double a = row.share[n];
    const double own = std::expm1(std::min(e[n], 700.0));
    const bool is_top = static_cast<index_t>(n) == row.top;
    result.share_error[n] = (a > 0 ? a * std::expm1(std::min(e[n] + all + sum_error, 700.0)) : 0.0) + unit.least;
    if (!unit.keeps_least_rest && !is_top && row.top_rest < 2 * least_rest) {
      result.share_error[n] = std::max(result.share_error[n], 16 * a);  // of 1e-30 or less
      result.odds_error[n] = 1;
      continue;
    }
    const double rest = row.rest(static_cast<index_t>(n));
    const double of_rest = rest <= 0 ? std::numeric_limits<double>::infinity()
                           : is_top  ? others / rest
                                     : std::max(0.0, all - a * own) / rest;
    result.odds_error[n] = of_rest < 0.5 ? std::expm1(std::min(e[n], 700.0) + 2 * of_rest + sum_error)
                                         : std::numeric_limits<double>::infinity();
    if (is_top) {
      // 1 - a_top = rest: its own relative error is that of the others' sum and of the whole.
      result.top_rest_error = rest * std::expm1(std::min(2 * of_rest + all + sum_error, 700.0)) + unit.least;
    }
  }
  return result;
}

/// Bounds of sums over values and of norms behind a metric, for one query head.
class value_bounds {
 public:
  using vector = std::vector<double>;  ///< one number a channel

  /// `factor` is L[h] of the metric, [head_dim, head_dim]; without memory the metric is the identity.
  value_bounds(const arithmetic& unit, index_t head_dim, const tensor_view<const float, 2>& factor)
      : unit_(unit), head_dim_(head_dim), factor_(factor) {}

  /// The error of ||W x||, ||L^T x||: || |L|^T (delta + gamma(d + 8) size) || for an x with errors `delta` whose
  /// channels come from terms of magnitude `size`, and what squares lose that underflow: sqrt(d least), or d least /
  /// `norm` where that is less.
  [[nodiscard]] double norm_error(const vector& delta, const vector& size, double norm) const {
    vector error = delta;
    for (std::size_t c = 0; c < error.size(); ++c) error[c] += unit_.gamma(head_dim_ + 8) * size[c];
    const double underflow = static_cast<double>(head_dim_) * unit_.least;
    const double lost = norm > 0 ? std::min(std::sqrt(underflow), underflow / norm) : std::sqrt(underflow);
    const double own = std::isfinite(norm) ? norm * unit_.gamma(head_dim_ / 2 + 4) : norm;
    double squares = 0;
    for (const double part : spread(error)) squares += part * part;
    double sizes = 0;
    for (const double part : spread(size)) sizes += part * part;
    // The sum of squares must stay in range, too.
    if (!(sizes < unit_.largest)) return std::numeric_limits<double>::infinity();
    return std::sqrt(squares) + own + lost;
  }
  /// The error of <W x, W y>.
  [[nodiscard]] double product_error(const vector& x_delta, const vector& x_size, const vector& y_size) const {
    vector error = x_delta;
    for (std::size_t c = 0; c < error.size(); ++c) error[c] += 2 * unit_.gamma(head_dim_ + 8) * x_size[c];
    const vector left = spread(error);
    const vector whole = spread(x_size);
    const vector right = spread(y_size);
    double sum = 0;
    for (std::size_t c = 0; c < left.size(); ++c) {
      sum += (left[c] + unit_.gamma(head_dim_ + 8) * whole[c]) * right[c];
    }
    return sum + static_cast<double>(head_dim_) * unit_.least;
  }

 private:
  /// |L|^T x, for an x that is not negative.
  [[nodiscard]] vector spread(const vector& x) const {
    if (factor_.data == nullptr) return x;
    vector image(x.size());
    for (index_t c = 0; c < head_dim_; ++c) {
      for (index_t r = 0; r <= c; ++r) {
        image[static_cast<std::size_t>(r)] +=
            std::fabs(static_cast<double>(factor_(c, r))) * x[static_cast<std::size_t>(c)];
      }
    }
    return image;
  }

  arithmetic unit_;
  index_t head_dim_;
  tensor_view<const float, 2> factor_;
};

}  // namespace restkv::parity
