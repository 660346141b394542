// SPDX-License-Identifier: Apache-2.0
// What the tests of merging share: a compacted layer with its memory, and a judge that computes attention directly, in
// long double, one query and one head after the other.
#pragma once

#include "support/arranged_layer.hpp"
#include "support/catch.hpp"
#include "verify/verify_support.hpp"

#include <restkv/merge/merged_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace restkv_test {

/// A layer, a kept set, and its compaction with room for one more entry a head.
template <class T>
struct compacted_layer {
  using layout = restkv::dense_layout<T>;

  compacted_layer(const arranged_layer<T>& source, const const_kept_tokens& set)
      : layer(source.view()),
        kept(set),
        key_memory(static_cast<std::size_t>(set.batch() * set.heads() * (set.capacity() + 1) * source.sizes.head_dim)),
        value_memory(key_memory.size()),
        lengths(static_cast<std::size_t>(set.batch() * set.heads())) {
    reset();
  }
  compacted_layer(const compacted_layer&) = delete;
  compacted_layer& operator=(const compacted_layer&) = delete;

  void reset() {
    std::fill(key_memory.begin(), key_memory.end(), T{});
    std::fill(value_memory.begin(), value_memory.end(), T{});
    REQUIRE(restkv::compact(kept, layer.key, layer.value, key(), value()).ok());
    for (index_t b = 0; b < kept.batch(); ++b) {
      for (index_t h = 0; h < kept.heads(); ++h) {
        lengths[static_cast<std::size_t>(b * kept.heads() + h)] = kept.lengths(b, h);
      }
    }
  }
  [[nodiscard]] std::array<index_t, 4> shape() const {
    return {kept.batch(), kept.heads(), kept.capacity() + 1, layer.key.extent(3)};
  }
  [[nodiscard]] layout key() { return {tensor_view<T, 4>(key_memory.data(), shape())}; }
  [[nodiscard]] layout value() { return {tensor_view<T, 4>(value_memory.data(), shape())}; }
  [[nodiscard]] restkv::merged_cache<layout, layout> cache() {
    return {kept, key(), value(), {lengths.data(), {kept.batch(), kept.heads()}}};
  }

  restkv::layer_view<T> layer;
  const_kept_tokens kept;
  std::vector<T> key_memory;
  std::vector<T> value_memory;
  std::vector<position_t> lengths;
};

/// The same bytes in both.
template <class T>
bool same_memory(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// Attention of one query over some keys and values: softmax, then the weighted sum, with nothing shared or reused.
inline std::vector<long double> attend_directly(const std::vector<double>& query,
                                                const std::vector<std::vector<double>>& keys,
                                                const std::vector<std::vector<double>>& values) {
  std::vector<long double> logits;
  for (const auto& key : keys) {
    long double logit = 0;
    for (std::size_t c = 0; c < query.size(); ++c) logit += static_cast<long double>(query[c]) * key[c];
    logits.push_back(logit / std::sqrt(static_cast<long double>(query.size())));
  }
  std::vector<long double> output(query.size());
  if (logits.empty()) return output;
  const long double largest = *std::max_element(logits.begin(), logits.end());
  long double mass = 0;
  for (auto& logit : logits) mass += logit = std::exp(logit - largest);
  for (std::size_t n = 0; n < values.size(); ++n) {
    for (std::size_t c = 0; c < query.size(); ++c) output[c] += logits[n] / mass * values[n][c];
  }
  return output;
}

template <class View>
std::vector<double> row_of(const View& view) {
  std::vector<double> row;
  for (index_t c = 0; c < view.extent(0); ++c) row.push_back(restkv::widen<double>(view(c)));
  return row;
}

/// The error of a changed cache over the last `window` queries, directly. One-chunk layers.
struct direct_error {
  std::vector<double> head;                     ///< sum over the rows of ||o' - o||^2, [batch * kept heads]
  double layer = 0;                             ///< sum over the rows of ||sum_h W[h] (o'_h - o_h)||^2
  double layer_output = 0;                      ///< the same of the output
  std::vector<std::vector<double>> head_norms;  ///< ||o' - o||, [batch * query heads][rows]

  template <class Compacted>
  direct_error(Compacted& made, index_t window) {
    const auto& layer = made.layer;
    const index_t heads = layer.query.extent(1);
    const index_t d = layer.key.extent(3);
    const index_t per_kept = heads / made.kept.heads();
    head.resize(static_cast<std::size_t>(made.kept.batch() * made.kept.heads()));
    for (index_t b = 0; b < made.kept.batch(); ++b) {
      index_t rows = window;
      for (index_t kv = 0; kv < layer.key.extent(1); ++kv) rows = std::min(rows, restkv::sequence(layer, b, kv).length);
      std::vector<std::vector<long double>> change(static_cast<std::size_t>(rows)), output = change;
      for (index_t h = 0; h < heads; ++h) {
        head_norms.emplace_back();
        const auto span = restkv::sequence(layer, b, h / (heads / layer.key.extent(1)));
        for (index_t i = 0; i < rows; ++i) {
          const auto query = row_of(layer.query[b][h][layer.query.extent(2) - rows + i]);
          const index_t end = span.begin + span.length - rows + i + 1;
          std::vector<std::vector<double>> keys, values, kept_keys, kept_values;
          for (index_t n = span.begin; n < end; ++n) {
            keys.push_back(row_of(layer.key.chunk(0)[b][h / (heads / layer.key.extent(1))][n]));
            values.push_back(row_of(layer.value.chunk(0)[b][h / (heads / layer.key.extent(1))][n]));
          }
          const index_t k = h / per_kept;
          for (index_t n = 0; n < made.lengths[static_cast<std::size_t>(b * made.kept.heads() + k)]; ++n) {
            if (n < made.kept.lengths(b, k) && made.kept.positions(b, k, n) >= end) continue;
            kept_keys.push_back(row_of(made.key().row(b, k, n)));
            kept_values.push_back(row_of(made.value().row(b, k, n)));
          }
          const auto full = attend_directly(query, keys, values);
          const auto now = attend_directly(query, kept_keys, kept_values);
          long double square = 0;
          for (std::size_t c = 0; c < full.size(); ++c) {
            change[static_cast<std::size_t>(i)].push_back(now[c] - full[c]);
            output[static_cast<std::size_t>(i)].push_back(full[c]);
            square += (now[c] - full[c]) * (now[c] - full[c]);
          }
          head[static_cast<std::size_t>(b * made.kept.heads() + k)] += static_cast<double>(square);
          head_norms.back().push_back(static_cast<double>(std::sqrt(square)));
        }
      }
      for (index_t i = 0; i < rows; ++i) {
        if (layer.projection.data == nullptr) {
          for (const auto x : change[static_cast<std::size_t>(i)]) layer_square(layer_, x);
          for (const auto x : output[static_cast<std::size_t>(i)]) layer_square(output_, x);
          continue;
        }
        for (index_t r = 0; r < layer.projection.extent(0); ++r) {
          long double of_change = 0, of_output = 0;
          for (index_t c = 0; c < heads * d; ++c) {
            const auto weight = static_cast<long double>(restkv::widen<double>(layer.projection(r, c)));
            of_change += weight * change[static_cast<std::size_t>(i)][static_cast<std::size_t>(c)];
            of_output += weight * output[static_cast<std::size_t>(i)][static_cast<std::size_t>(c)];
          }
          layer_square(layer_, of_change);
          layer_square(output_, of_output);
        }
      }
    }
    this->layer = static_cast<double>(layer_);
    layer_output = static_cast<double>(output_);
  }

 private:
  static void layer_square(long double& sum, long double x) { sum += x * x; }
  long double layer_ = 0;
  long double output_ = 0;
};

/// Angles of a model with theta 10000.
inline std::vector<double> frequencies_of(index_t pairs) {
  std::vector<double> made;
  for (index_t i = 0; i < pairs; ++i) {
    made.push_back(std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(pairs)));
  }
  return made;
}

}  // namespace restkv_test
