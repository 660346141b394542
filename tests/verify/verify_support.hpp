// SPDX-License-Identifier: Apache-2.0
// What the verifier's tests share: kept sets, and an oracle that deletes tokens and computes attention once more, in
// long double, with the whole of W_O.
#pragma once

#include "support/arranged_layer.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/verify/future_error.hpp>

#include <cmath>
#include <functional>
#include <vector>

namespace restkv_test {

using restkv::const_kept_tokens;
using restkv::layer_view;
using restkv::output_errors;
using restkv::owned_kept_tokens;
using restkv::position_t;

/// Keeps the positions that `keep(batch, head, position)` names.
template <class Keep>
owned_kept_tokens keep_where(index_t batch, index_t heads, index_t tokens, const Keep& keep) {
  owned_kept_tokens made(batch, heads, tokens);
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      position_t& length = made.kept().lengths(b, h);
      for (index_t n = 0; n < tokens; ++n) {
        if (keep(b, h, n)) made.kept().positions(b, h, length++) = static_cast<position_t>(n);
      }
    }
  }
  return made;
}

/// Keeps every token inside its sequence with the given chance.
template <class T>
owned_kept_tokens keep_some(random_engine& random, const layer_view<T>& layer, index_t heads, int percent) {
  return keep_where(layer.key.extent(0), heads, layer.key.extent(2), [&](index_t b, index_t, index_t n) {
    const auto span = restkv::sequence(layer, b, 0);
    const bool wanted = chance(random, percent);  // asked for padding too: the draw does not depend on the lengths
    return wanted && n >= span.begin && n < span.begin + span.length;
  });
}

inline bool keeps(const const_kept_tokens& kept, index_t b, index_t h, index_t n) {
  for (index_t i = 0; i < kept.lengths(b, h); ++i) {
    if (kept.positions(b, h, i) == n) return true;
  }
  return false;
}

/// One row of every table, by deleting tokens and attending again.
struct oracle_row {
  using real = long double;
  using vector = std::vector<real>;

  std::vector<double> head, output_norm, predicted, mass, projected, projected_predicted;  // [query_heads]
  double layer = 0;
  double layer_norm = 0;
  double layer_predicted = 0;

  /// `row` counts from the newest query, 0, back. One-chunk layers without lengths.
  oracle_row(const layer_view<float>& view, const const_kept_tokens& kept, index_t b, index_t row) {
    const index_t heads = view.query.extent(1);
    const index_t d = view.query.extent(3);
    const index_t tokens = view.key.extent(2) - row;  // visible
    const auto& key = view.key.chunk(0);
    const auto& value = view.value.chunk(0);
    const bool through = view.projection.data != nullptr;
    vector change_of_all(static_cast<std::size_t>(heads * d));
    vector output_of_all = change_of_all;
    for (index_t h = 0; h < heads; ++h) {
      const index_t kv_head = h / (heads / view.key.extent(1));
      const index_t kept_head = h / (heads / kept.heads());
      vector logit;
      for (index_t n = 0; n < tokens; ++n) {
        real dot = 0;
        for (index_t c = 0; c < d; ++c) {
          dot += real(view.query(b, h, view.query.extent(2) - 1 - row, c)) * real(key(b, kv_head, n, c));
        }
        logit.push_back(dot / std::sqrt(real(d)));
      }
      // The output of a softmax over the tokens that `present` names.
      const auto attend = [&](const std::function<bool(index_t)>& present) {
        real largest = -INFINITY;
        for (index_t n = 0; n < tokens; ++n) {
          if (present(n)) largest = std::max(largest, logit[static_cast<std::size_t>(n)]);
        }
        vector output(static_cast<std::size_t>(d));
        real sum = 0;
        for (index_t n = 0; n < tokens; ++n) {
          if (!present(n)) continue;
          const real weight = std::exp(logit[static_cast<std::size_t>(n)] - largest);
          sum += weight;
          for (index_t c = 0; c < d; ++c) output[static_cast<std::size_t>(c)] += weight * real(value(b, kv_head, n, c));
        }
        for (real& x : output) x = sum > 0 ? x / sum : 0;
        return output;
      };
      // W_O times a vector that is 0 outside head h.
      const auto project = [&](const vector& x) {
        vector y(static_cast<std::size_t>(view.projection.extent(0)));
        for (index_t r = 0; r < view.projection.extent(0); ++r) {
          for (index_t c = 0; c < d; ++c) {
            y[static_cast<std::size_t>(r)] += real(view.projection(r, h * d + c)) * x[static_cast<std::size_t>(c)];
          }
        }
        return y;
      };
      const auto is_kept = [&](index_t n) { return keeps(kept, b, kept_head, n); };
      const vector full = attend([](index_t) { return true; });
      const vector change = minus(attend(is_kept), full);
      real all = 0;
      real evicted = 0;
      const real top = *std::max_element(logit.begin(), logit.end());
      for (index_t n = 0; n < tokens; ++n) {
        const real weight = std::exp(logit[static_cast<std::size_t>(n)] - top);
        all += weight;
        if (!is_kept(n)) evicted += weight;
      }
      real sum = 0;
      real projected_sum = 0;
      for (index_t n = 0; n < tokens; ++n) {
        if (is_kept(n)) continue;
        const vector deletion = minus(attend([n](index_t other) { return other != n; }), full);
        sum += norm(deletion);
        if (through) projected_sum += norm(project(deletion));
      }
      head.push_back(double(norm(change)));
      output_norm.push_back(double(norm(full)));
      predicted.push_back(double(sum));
      mass.push_back(double(evicted / all));
      projected.push_back(through ? double(norm(project(change))) : 0);
      projected_predicted.push_back(double(projected_sum));
      layer_predicted += through ? projected_predicted.back() : predicted.back();
      std::copy(change.begin(), change.end(), change_of_all.begin() + h * d);
      std::copy(full.begin(), full.end(), output_of_all.begin() + h * d);
    }
    layer = double(through ? norm(whole(view, change_of_all)) : norm(change_of_all));
    layer_norm = double(through ? norm(whole(view, output_of_all)) : norm(output_of_all));
  }

  [[nodiscard]] static vector minus(vector a, const vector& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
    return a;
  }
  [[nodiscard]] static real norm(const vector& x) {
    real sum = 0;
    for (const real c : x) sum += c * c;
    return std::sqrt(sum);
  }
  /// The whole W_O times the concatenated heads.
  [[nodiscard]] static vector whole(const layer_view<float>& view, const vector& x) {
    vector y(static_cast<std::size_t>(view.projection.extent(0)));
    for (index_t r = 0; r < view.projection.extent(0); ++r) {
      for (std::size_t c = 0; c < x.size(); ++c) {
        y[static_cast<std::size_t>(r)] += real(view.projection(r, c)) * x[c];
      }
    }
    return y;
  }
};

/// Checks every number of sequence b's row that counts from the newest, against the oracle.
inline void check_row(const output_errors& errors, const oracle_row& expected, index_t b, index_t row) {
  const index_t i = errors.queries() - 1 - row;
  CAPTURE(b, row);
  // Subtracting outputs costs the oracle digits where the change is small; 1e-17 is what long double has left.
  const auto near_to = [](double x) { return Approx(x).epsilon(1e-9).margin(1e-17); };
  const auto near_to_gram = [](double x) { return Approx(x).epsilon(1e-7).margin(1e-17); };  // as exact as its products
  for (index_t h = 0; h < errors.query_heads(); ++h) {
    CAPTURE(h);
    const auto at = static_cast<std::size_t>(h);
    CHECK(errors.head()(b, h, i) == near_to(expected.head[at]));
    CHECK(errors.head_output_norm()(b, h, i) == near_to(expected.output_norm[at]));
    CHECK(errors.head_predicted()(b, h, i) == near_to(expected.predicted[at]));
    CHECK(errors.evicted_mass()(b, h, i) == near_to(expected.mass[at]));
    if (errors.projected()) {
      CHECK(errors.head_projected()(b, h, i) == near_to(expected.projected[at]));
      CHECK(errors.head_projected_predicted()(b, h, i) == near_to_gram(expected.projected_predicted[at]));
    }
  }
  CHECK(errors.layer()(b, i) == near_to(expected.layer));
  CHECK(errors.layer_output_norm()(b, i) == near_to(expected.layer_norm));
  CHECK(errors.layer_predicted()(b, i) == near_to_gram(expected.layer_predicted));
}

/// True when sequence b of one result holds the same bits as sequence `other_b` of another, row by row from the newest.
inline bool same_bits(const output_errors& errors, index_t b, const output_errors& other, index_t other_b) {
  if (errors.rows(b) != other.rows(other_b) || errors.query_heads() != other.query_heads()) return false;
  for (index_t row = 0; row < errors.rows(b); ++row) {
    const index_t i = errors.queries() - 1 - row;
    const index_t j = other.queries() - 1 - row;
    for (const auto table :
         {&output_errors::head, &output_errors::head_output_norm, &output_errors::head_predicted,
          &output_errors::evicted_mass, &output_errors::head_projected, &output_errors::head_projected_predicted}) {
      const auto left = (errors.*table)();
      const auto right = (other.*table)();
      if (left.empty() != right.empty()) return false;
      for (index_t h = 0; h < errors.query_heads() && !left.empty(); ++h) {
        if (left(b, h, i) != right(other_b, h, j)) return false;
      }
    }
    for (const auto table :
         {&output_errors::layer, &output_errors::layer_output_norm, &output_errors::layer_predicted}) {
      if ((errors.*table)()(b, i) != (other.*table)()(other_b, j)) return false;
    }
  }
  return true;
}

}  // namespace restkv_test
