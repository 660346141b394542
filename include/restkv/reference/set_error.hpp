// SPDX-License-Identifier: Apache-2.0
/// @file
/// The objective of `set_error` by its definition, in plain loops of doubles.
#pragma once

#include <restkv/reference/window_attention.hpp>
#include <restkv/selection/set_error.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

namespace restkv::reference {

/// The two parts of the objective of one sequence.
struct set_objective {
  double window = 0;  ///< sum_r w_r ||error_r||^2 / sum_r w_r ||y_r||^2
  double noise = 0;   ///< sum of s_n over the evicted candidates
};

/// Objective of one sequence of a layer, attention held in memory. For small problems: allocates, and costs
/// queries * heads * tokens * hidden * head_dim a set.
template <element T>
class set_error_oracle {
 public:
  /// Attention and full outputs of sequence `batch`; options must fit the layer.
  set_error_oracle(const layer_view<T>& layer, const set_error& options, index_t batch, index_t kept_heads)
      : layer_(layer), batch_(batch), kept_heads_(kept_heads) {
    const index_t rows = options.window == 0 ? layer.query.extent(2) : options.window;
    const index_t horizon = options.horizon == 0 ? rows : options.horizon;
    weights_ = normalised(options.weights, rows);
    noise_weights_ = normalised(options.noise_weights.empty() ? options.weights : options.noise_weights, rows);
    for (index_t h = 0; h < layer.query.extent(1); ++h) {
      const index_t kv_head = h / (layer.query.extent(1) / layer.key.extent(1));
      const sequence_span span = sequence(layer, batch, kv_head);
      for (index_t r = 0; r < rows; ++r) {
        const index_t visible = span.length - horizon + r % horizon + 1;
        shares_.push_back(attention_of(h, kv_head, first_window_row(layer, batch, rows) + r, span, visible));
      }
    }
  }

  /// Observed queries.
  [[nodiscard]] index_t rows() const { return static_cast<index_t>(weights_.size()); }

  /// `kept[row][n]`: whether token n of the sequence is kept; `candidate` likewise, the tokens whose noise counts.
  [[nodiscard]] set_objective operator()(const std::vector<std::vector<bool>>& kept,
                                         const std::vector<std::vector<bool>>& candidate) const {
    const index_t heads = layer_.query.extent(1);
    set_objective made;
    double norm = 0;
    for (index_t r = 0; r < rows(); ++r) {
      std::vector<double> change;
      std::vector<double> output;
      for (index_t h = 0; h < heads; ++h) {
        const auto full = output_of(h, r, nullptr);
        const auto left = output_of(h, r, &kept[static_cast<std::size_t>(h * kept_heads_ / heads)]);
        for (std::size_t c = 0; c < full.size(); ++c) {
          output.push_back(full[c]);
          change.push_back(left[c] - full[c]);
        }
      }
      const double weight = weights_[static_cast<std::size_t>(r)];
      made.window += weight * projected_square(change);
      norm += weight * projected_square(output);
      for (index_t h = 0; h < heads; ++h) {
        const auto row = static_cast<std::size_t>(h * kept_heads_ / heads);
        const auto full = output_of(h, r, nullptr);
        const auto& share = shares_[static_cast<std::size_t>(h * rows() + r)];
        for (std::size_t n = 0; n < share.size(); ++n) {
          if (kept[row][n] || !candidate[row][n]) continue;
          std::vector<double> distance(static_cast<std::size_t>(heads * layer_.key.extent(3)), 0.0);
          const auto value = value_of(h, static_cast<index_t>(n));
          for (std::size_t c = 0; c < value.size(); ++c) {
            distance[static_cast<std::size_t>(h) * value.size() + c] = full[c] - value[c];
          }
          const double odds = share[n] / std::max(1 - share[n], 1e-6);
          made.noise += noise_weights_[static_cast<std::size_t>(r)] * odds * odds * projected_square(distance);
        }
      }
    }
    made.window /= norm;
    made.noise /= norm;
    return made;
  }

 private:
  [[nodiscard]] static std::vector<double> normalised(std::span<const float> given, index_t rows) {
    std::vector<double> weights(given.begin(), given.end());
    if (weights.empty()) weights.assign(static_cast<std::size_t>(rows), 1.0);
    double sum = 0;
    for (const double weight : weights) sum += weight;
    for (double& weight : weights) weight /= sum;
    return weights;
  }

  [[nodiscard]] std::vector<double> attention_of(index_t h, index_t kv_head, index_t query_row,
                                                 const sequence_span& span, index_t visible) const {
    std::vector<double> share(static_cast<std::size_t>(span.length), 0.0);
    const index_t channels = layer_.key.extent(3);
    double largest = -std::numeric_limits<double>::infinity();
    for (index_t n = 0; n < visible; ++n) {
      const auto key = token_row(layer_.key, batch_, kv_head, span.begin + n);
      double sum = 0;
      for (index_t c = 0; c < channels; ++c) {
        sum += widen<double>(layer_.query(batch_, h, query_row, c)) * key[static_cast<std::size_t>(c)];
      }
      share[static_cast<std::size_t>(n)] = sum / std::sqrt(static_cast<double>(channels));
      largest = std::max(largest, share[static_cast<std::size_t>(n)]);
    }
    double total = 0;
    for (index_t n = 0; n < visible; ++n) {
      double& x = share[static_cast<std::size_t>(n)];
      x = std::exp(x - largest);
      total += x;
    }
    for (double& x : share) x /= total;
    return share;
  }

  [[nodiscard]] std::vector<double> value_of(index_t h, index_t n) const {
    const index_t kv_head = h / (layer_.query.extent(1) / layer_.key.extent(1));
    return token_row(layer_.value, batch_, kv_head, sequence(layer_, batch_, kv_head).begin + n);
  }

  /// Output of the attention renormalised over the kept tokens; over all without `kept`.
  [[nodiscard]] std::vector<double> output_of(index_t h, index_t r, const std::vector<bool>* kept) const {
    const auto& share = shares_[static_cast<std::size_t>(h * rows() + r)];
    std::vector<double> output(static_cast<std::size_t>(layer_.key.extent(3)), 0.0);
    double mass = 0;
    for (std::size_t n = 0; n < share.size(); ++n) {
      if (kept != nullptr && !(*kept)[n]) continue;
      const auto value = value_of(h, static_cast<index_t>(n));
      for (std::size_t c = 0; c < output.size(); ++c) output[c] += share[n] * value[c];
      mass += share[n];
    }
    for (double& x : output) x = mass > 0 ? x / mass : 0.0;
    return output;
  }

  [[nodiscard]] double projected_square(const std::vector<double>& x) const {
    double sum = 0;
    if (layer_.projection.data == nullptr) {
      for (const double element : x) sum += element * element;
      return sum;
    }
    for (index_t c = 0; c < layer_.projection.extent(0); ++c) {
      double element = 0;
      for (index_t i = 0; i < layer_.projection.extent(1); ++i) {
        element += widen<double>(layer_.projection(c, i)) * x[static_cast<std::size_t>(i)];
      }
      sum += element * element;
    }
    return sum;
  }

  const layer_view<T>& layer_;
  index_t batch_;
  index_t kept_heads_;
  std::vector<double> weights_;
  std::vector<double> noise_weights_;
  std::vector<std::vector<double>> shares_;  // [query_heads * rows][length]
};

}  // namespace restkv::reference
