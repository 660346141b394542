// SPDX-License-Identifier: Apache-2.0
// The definition of ReST-KV's indicator, evaluated as it reads: delete the token, recompute the softmax of the others,
// multiply the change of the output by W_O and take its norm. Plain loops in long double over a copy of the numbers;
// shares no code and no algebra with the library: no odds formula, no Gram matrix, no running sums.
#pragma once

#include "support/arranged_layer.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace restkv_test::oracle {

using real = long double;
using reals = std::vector<real>;

/// One sequence of a layer, as numbers.
struct problem {
  index_t query_heads = 0;
  index_t kv_heads = 0;
  index_t head_dim = 0;
  index_t length = 0;
  index_t window = 0;
  index_t hidden = 0;
  reals query;       ///< [query_heads, window, head_dim]
  reals key;         ///< [kv_heads, length, head_dim]
  reals value;       ///< [kv_heads, length, head_dim]
  reals projection;  ///< [hidden, query_heads * head_dim]; empty: changes are measured where the head's output is

  [[nodiscard]] index_t past() const { return length - window; }
  [[nodiscard]] const real* query_of(index_t head, index_t i) const {
    return query.data() + (head * window + i) * head_dim;
  }
  [[nodiscard]] const real* key_of(index_t head, index_t n) const {
    return key.data() + (head / (query_heads / kv_heads) * length + n) * head_dim;
  }
  [[nodiscard]] const real* value_of(index_t head, index_t n) const {
    return value.data() + (head / (query_heads / kv_heads) * length + n) * head_dim;
  }
};

/// Copies a whole sequence of a layer without padding. `projected` false leaves W_O out.
template <restkv::element T>
[[nodiscard]] problem problem_of(const arranged_layer<T>& layer, index_t batch, index_t window, bool projected) {
  const auto number = [](T element) { return static_cast<real>(restkv::widen<double>(element)); };
  const layer_sizes& sizes = layer.sizes;
  problem p;
  p.query_heads = sizes.query_heads;
  p.kv_heads = sizes.kv_heads;
  p.head_dim = sizes.head_dim;
  p.length = sizes.tokens;
  p.window = window;
  p.hidden = projected ? sizes.hidden : 0;
  for (index_t h = 0; h < p.query_heads; ++h) {
    for (index_t i = sizes.queries - window; i < sizes.queries; ++i) {
      for (index_t c = 0; c < p.head_dim; ++c) p.query.push_back(number(layer.query(batch, h, i, c)));
    }
  }
  for (index_t h = 0; h < p.kv_heads; ++h) {
    for (index_t n = 0; n < p.length; ++n) {
      for (index_t c = 0; c < p.head_dim; ++c) p.key.push_back(number(layer.key(batch, h, n, c)));
      for (index_t c = 0; c < p.head_dim; ++c) p.value.push_back(number(layer.value(batch, h, n, c)));
    }
  }
  if (projected) {
    for (const T weight : layer.projection) p.projection.push_back(number(weight));
  }
  return p;
}

/// Logits of window query i over the tokens it sees: up to and including its own.
[[nodiscard]] inline reals logits_of(const problem& p, index_t head, index_t i) {
  reals logits;
  for (index_t n = 0; n < p.length - p.window + i + 1; ++n) {
    real dot = 0;
    for (index_t c = 0; c < p.head_dim; ++c) dot += p.query_of(head, i)[c] * p.key_of(head, n)[c];
    logits.push_back(dot / std::sqrt(static_cast<real>(p.head_dim)));
  }
  return logits;
}

/// Softmax of the logits, the token `deleted` (-1: none) taken out first.
[[nodiscard]] inline reals softmax(const reals& logits, index_t deleted = -1) {
  real largest = -std::numeric_limits<real>::infinity();
  for (std::size_t n = 0; n < logits.size(); ++n) {
    if (static_cast<index_t>(n) != deleted) largest = std::max(largest, logits[n]);
  }
  reals share(logits.size());
  real sum = 0;
  for (std::size_t n = 0; n < logits.size(); ++n) {
    if (static_cast<index_t>(n) == deleted) continue;
    share[n] = std::exp(logits[n] - largest);
    sum += share[n];
  }
  for (real& s : share) s /= sum;
  return share;
}

/// sum over n of weights[n] v_n. [head_dim]
[[nodiscard]] inline reals output(const problem& p, index_t head, const reals& weights) {
  reals sum(static_cast<std::size_t>(p.head_dim));
  for (std::size_t n = 0; n < weights.size(); ++n) {
    const real* const value = p.value_of(head, static_cast<index_t>(n));
    for (std::size_t c = 0; c < sum.size(); ++c) sum[c] += weights[n] * value[c];
  }
  return sum;
}

/// ||W[h] x||, or ||x|| without W_O.
[[nodiscard]] inline real norm(const problem& p, index_t head, const reals& x) {
  real squares = 0;
  if (p.projection.empty()) {
    for (const real entry : x) squares += entry * entry;
    return std::sqrt(squares);
  }
  for (index_t row = 0; row < p.hidden; ++row) {
    const real* const weights = p.projection.data() + row * p.query_heads * p.head_dim + head * p.head_dim;
    real sum = 0;
    for (index_t c = 0; c < p.head_dim; ++c) sum += weights[c] * x[static_cast<std::size_t>(c)];
    squares += sum * sum;
  }
  return std::sqrt(squares);
}

/// How the queries of the window become one number.
enum class reduction { mean, ema, last, maximum };

[[nodiscard]] inline real reduce(reduction how, real alpha, const reals& rows) {
  real result = rows[0];
  for (std::size_t i = 1; i < rows.size(); ++i) {
    if (how == reduction::mean) result += rows[i];
    if (how == reduction::ema) result = alpha * rows[i] + (1 - alpha) * result;
    if (how == reduction::last) result = rows[i];
    if (how == reduction::maximum) result = std::max(result, rows[i]);
  }
  return how == reduction::mean ? result / static_cast<real>(rows.size()) : result;
}

struct settings {
  real tau = 1;
  bool normalised = false;
  reduction temporal = reduction::mean;
  real alpha = 0.3f;
};

/// A head's scores with what is needed to judge others by them.
struct scores {
  reals score;  ///< [past]
  /// What relative rounding errors of 1 in o, v and W would change in a score, at most. Divided by the score it is the
  /// condition number of the last steps, large where v is nearly o. [past]
  reals sensitivity;
  reals own_error;         ///< bound on the rounding of this oracle. [past]
  real largest_share = 0;  ///< over the past tokens (and queries)
  real smallest_rest = 1;  ///< 1 less that, added up from the other tokens
};

/// Frobenius norm of W[h], or the norm of the identity's image of a unit vector: 1.
[[nodiscard]] inline real weight_norm(const problem& p, index_t head) {
  if (p.projection.empty()) return 1;
  real squares = 0;
  for (index_t row = 0; row < p.hidden; ++row) {
    for (index_t c = 0; c < p.head_dim; ++c) {
      const real w = p.projection[static_cast<std::size_t>(row * p.query_heads * p.head_dim + head * p.head_dim + c)];
      squares += w * w;
    }
  }
  return std::sqrt(squares);
}

[[nodiscard]] inline real length_of(const reals& x) {
  real squares = 0;
  for (const real entry : x) squares += entry * entry;
  return std::sqrt(squares);
}

/// See scores::sensitivity; score = odds * distance^tau / scale, distance = ||W x||, and `terms` is what cancels in it.
[[nodiscard]] inline real sensitivity_of(real score, real odds, real distance, real terms, real weighted_x, real tau) {
  // An o that consists of v_n but for a rest of 1 / (1 + odds) is handled without cancellation.
  const real lost = terms * std::min<real>(1, 1 / odds);
  if (!(distance > 0)) return odds * lost;
  // ||W x|| as the root of x^T G x loses digits once more, by ||W|| ||x|| / ||W x||.
  return tau * score * lost / distance * std::max<real>(1, weighted_x / distance);
}

/// Order `before`: for every query the change of the output that deleting each past token causes; then the reduction.
[[nodiscard]] inline scores deletion_scores(const problem& p, index_t head, const settings& how) {
  scores result;
  std::vector<reals> changes(static_cast<std::size_t>(p.past()));  // [past][window]
  reals sensitivity(changes.size());
  reals own_error(changes.size());
  const real weights = weight_norm(p, head);
  for (index_t i = 0; i < p.window; ++i) {
    const reals logits = logits_of(p, head, i);
    const reals share = softmax(logits);
    const reals whole = output(p, head, share);
    const real size = norm(p, head, whole);
    const real scale = how.normalised && size > 0 ? size : 1;
    for (index_t n = 0; n < p.past(); ++n) {
      const auto at = static_cast<std::size_t>(n);
      const reals without = output(p, head, softmax(logits, n));
      reals difference = whole;
      for (std::size_t c = 0; c < difference.size(); ++c) difference[c] -= without[c];
      const real change = norm(p, head, difference);
      real rest = 0;
      for (std::size_t m = 0; m < share.size(); ++m) rest += m == at ? 0 : share[m];
      const real odds = share[at] / rest;
      // tau is an exponent of the distance alone, and change = odds * distance.
      const real score = (how.tau == 1 ? change : odds * std::pow(change / odds, how.tau)) / scale;
      changes[at].push_back(score);
      const reals value(p.value_of(head, n), p.value_of(head, n) + p.head_dim);
      const real terms = weights * (length_of(whole) + length_of(value));
      sensitivity[at] = std::max(sensitivity[at], sensitivity_of(score, odds, change / odds, terms,
                                                                 weights * length_of(difference) / odds, how.tau));
      const real rounding = std::numeric_limits<real>::epsilon() * static_cast<real>(p.length) * terms;
      own_error[at] = std::max(own_error[at], change > 0 ? how.tau * score * rounding / change : rounding);
      if (share[at] > result.largest_share) {
        result.largest_share = share[at];
        result.smallest_rest = rest;
      }
    }
  }
  for (const reals& column : changes) result.score.push_back(reduce(how.temporal, how.alpha, column));
  result.sensitivity = sensitivity;
  result.own_error = own_error;
  return result;
}

/// Order `after`: the attention rows are reduced first, over past tokens, and o-bar = sum over the past of a-bar v is
/// not renormalised; score = a-bar / (1 - a-bar) ||W (o-bar - v)||^tau.
[[nodiscard]] inline scores smoothed_scores(const problem& p, index_t head, const settings& how) {
  scores result;
  std::vector<reals> rows;
  for (index_t i = 0; i < p.window; ++i) rows.push_back(softmax(logits_of(p, head, i)));
  reals smoothed;
  for (index_t n = 0; n < p.past(); ++n) {
    reals column;
    for (const reals& row : rows) column.push_back(row[static_cast<std::size_t>(n)]);
    smoothed.push_back(reduce(how.temporal, how.alpha, column));
  }
  const reals whole = output(p, head, smoothed);
  const real size = norm(p, head, whole);
  const real scale = how.normalised && size > 0 ? size : 1;
  const real weights = weight_norm(p, head);
  for (index_t n = 0; n < p.past(); ++n) {
    const reals value(p.value_of(head, n), p.value_of(head, n) + p.head_dim);
    reals difference = whole;
    for (std::size_t c = 0; c < difference.size(); ++c) difference[c] -= value[c];
    const real share = smoothed[static_cast<std::size_t>(n)];
    const real rest = 1 - share;
    const real odds = share / rest;
    const real distance = norm(p, head, difference);
    const real score = odds * std::pow(distance, how.tau) / scale;
    const real terms = weights * (length_of(whole) + length_of(value));
    result.score.push_back(score);
    result.sensitivity.push_back(
        sensitivity_of(score, odds, distance, terms, weights * length_of(difference), how.tau));
    const real rounding = std::numeric_limits<real>::epsilon() * static_cast<real>(p.length);
    result.own_error.push_back(score * rounding * (1 / rest + (distance > 0 ? how.tau * terms / distance : 0)));
    if (share > result.largest_share) {
      result.largest_share = share;
      result.smallest_rest = rest;
    }
  }
  return result;
}

}  // namespace restkv_test::oracle
