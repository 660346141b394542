// SPDX-License-Identifier: Apache-2.0
/// @file
/// One sequence's exchange of tokens for `refine_set_error`: the error of a set, and what single tokens would change.
#pragma once

#include <restkv/selection/set_error/memory.hpp>

#include <algorithm>
#include <limits>
#include <span>

namespace restkv::detail {

/// The steps of an exchange. Every step's result is independent of the number of threads.
template <class Backend, element T>
class exchange {
 public:
  exchange(Backend& backend, const layer_view<T>& layer, const group_metric_view& metric, const exchange_sizes& sizes,
           exchange_memory& memory, double attention_noise) noexcept
      : backend_(backend),
        layer_(layer),
        metric_(metric),
        sizes_(sizes),
        m_(memory),
        noise_factor_(attention_noise),
        lanes_(sizes.observed.lanes),
        width_(sizes.width()),
        channels_(sizes.shape.head_dim),
        group_(sizes.group()),
        pairs_(sizes.pairs()),
        projected_(layer.projection.data != nullptr) {}

  /// Reads what does not depend on the set: attention, full outputs, and the noise of each token. False where the
  /// full output is 0 or not finite: then there is no relative error to lower.
  [[nodiscard]] bool observe(index_t batch) {
    backend_.parallel_for(sizes_.shape.query_heads, [&](index_t h) {
      const index_t row = h / group_;
      set_window<T>(layer_, sizes_.observed, batch, h, kv_head_of(row), m_.buffers[h])
          .run({m_.tokens + row * sizes_.capacity, static_cast<std::size_t>(m_.counts[row])},
               m_.shares + h * sizes_.capacity * lanes_, m_.full + h * width_ * lanes_);
      float* const output = m_.now.output + h * width_ * lanes_;
      for (index_t i = 0; i < width_ * lanes_; ++i) {
        output[i] = static_cast<float>(m_.full[h * width_ * lanes_ + i]);
        m_.now.change[h * width_ * lanes_ + i] = output[i];
      }
    });
    norm_ = project(m_.now);
    if (!(norm_ > 0 && norm_ <= std::numeric_limits<double>::max())) return false;
    prepare_pairs(m_.now);
    backend_.parallel_for(sizes_.kept_heads, [&](index_t row) {
      read_values(batch, row);
      score_noise(row);
    });
    return true;
  }

  /// Objective and outputs of a set.
  void evaluate(const exchange_state* states, set_outputs& out) {
    backend_.parallel_for(sizes_.shape.query_heads, [&](index_t h) { attend(states, h, out); });
    out.window = project(out) / norm_;
    double evicted = 0;
    for (index_t row = 0; row < sizes_.kept_heads; ++row) {
      for (index_t n = 0; n < m_.counts[row]; ++n) {
        const index_t at = row * sizes_.capacity + n;
        if (states[at] == exchange_state::out) evicted += m_.noise[at];
      }
    }
    out.total = out.window + (noise_factor_ > 0 ? noise_factor_ * evicted : 0.0);
  }

  /// gains: what leaving (a kept token) or entering (an evicted one) alone adds to the objective of the set of `now`.
  void compute_gains() {
    prepare_pairs(m_.now);
    backend_.parallel_for(sizes_.shape.query_heads, [&](index_t h) {
      pull_back(m_.now, h);
      const float* const pull = m_.pulls + h * width_ * lanes_;
      const float* const output = m_.now.output + h * width_ * lanes_;
      float* const product = m_.pull_products + h * lanes_;
      std::fill_n(product, lanes_, 0.0f);
      for (index_t c = 0; c < channels_; ++c) {
        for (index_t r = 0; r < lanes_; ++r) product[r] += pull[c * lanes_ + r] * output[c * lanes_ + r];
      }
    });
    backend_.parallel_for(sizes_.kept_heads, [&](index_t row) { gains_of(row); });
  }

 private:
  [[nodiscard]] index_t kv_head_of(index_t row) const noexcept {
    return row * sizes_.shape.kv_heads / sizes_.kept_heads;
  }

  [[nodiscard]] const float* gram(index_t row, index_t pair) const noexcept {
    return &metric_.gram(row, pair, 0, 0);
  }
  [[nodiscard]] const float* shares(index_t h) const noexcept { return m_.shares + h * sizes_.capacity * lanes_; }
  [[nodiscard]] const float* pair_pull(index_t row, index_t pair) const noexcept {
    return m_.pair_pulls + (row * pairs_ + pair) * width_ * lanes_;
  }
  [[nodiscard]] const float* pair_square(index_t row, index_t pair) const noexcept {
    return m_.pair_squares + (row * pairs_ + pair) * lanes_;
  }
  [[nodiscard]] float* products_of(index_t row) const noexcept {
    return m_.products + row * (group_ + pairs_) * set_tile * std::max(lanes_, width_);
  }

  /// v_n . b[:, r] for a tile of the tokens of a head, [set_tile, lanes]; how many there are.
  index_t multiply_values(index_t row, index_t first, const float* b, float* product) const noexcept {
    const index_t count = std::min(set_tile, m_.counts[row] - first);
    lane_product({m_.values + (row * sizes_.capacity + first) * width_, width_, 1}, count, b, lanes_, lanes_, channels_,
                 product, lanes_);
    return count;
  }

  void read_values(index_t batch, index_t row) noexcept {
    float* const values = m_.values + row * sizes_.capacity * width_;
    for (index_t n = 0; n < m_.counts[row]; ++n) {
      widen_padded(
          layer_.value.from_token(m_.tokens[row * sizes_.capacity + n])[batch][kv_head_of(row)][0], width_,
          values + n * width_);
    }
    float* const product = products_of(row);
    for (index_t pair = 0; pair < pairs_; ++pair) {
      for (index_t first = 0; first < m_.counts[row]; first += set_tile) {
        const index_t count = std::min(set_tile, m_.counts[row] - first);
        lane_product({values + first * width_, width_, 1}, count, gram(row, pair), width_, width_, channels_, product,
                     width_);
        for (index_t t = 0; t < count; ++t) {
          m_.squares[(row * pairs_ + pair) * sizes_.capacity + first + t] =
              dot(product + t * width_, values + (first + t) * width_, width_);
        }
      }
    }
  }

  /// noise[n] = sum_r u_r sum_i (a / (1 - a) ||W[i] (o_i - v_n)||)^2 / norm: the variance that a relative error of 1 of
  /// each query's attention to a token would give the output without that token, over all heads of the group.
  void score_noise(index_t row) noexcept {
    float* const product = products_of(row);
    for (index_t n = 0; n < m_.counts[row]; ++n) m_.noise[row * sizes_.capacity + n] = 0.0;
    index_t pair = 0;
    for (index_t i = 0; i < group_; pair += group_ - i, ++i) {
      for (index_t first = 0; first < m_.counts[row]; first += set_tile) {
        const index_t count = multiply_values(row, first, pair_pull(row, pair), product);
        for (index_t t = 0; t < count; ++t) {
          const float* const share = shares(row * group_ + i) + (first + t) * lanes_;
          const float square = m_.squares[(row * pairs_ + pair) * sizes_.capacity + first + t];
          float sum = 0;
          for (index_t r = 0; r < lanes_; ++r) {
            const float odds = share[r] / std::max(1.0f - share[r], 1e-6f);
            const float distance = pair_square(row, pair)[r] - product[t * lanes_ + r] + square;
            sum += m_.noise_weights[r] * odds * odds * std::max(distance, 0.0f);
          }
          m_.noise[row * sizes_.capacity + first + t] += static_cast<double>(sum) / norm_;
        }
      }
    }
  }

  /// o' and o' - o of one query head for a set. Sums over tokens in double: the error is a small difference.
  void attend(const exchange_state* states, index_t h, set_outputs& out) noexcept {
    const index_t row = h / group_;
    const window_buffers& buffers = m_.buffers[h];
    double* const sums = m_.head_sums + h * width_ * lanes_;
    double* const mass = out.mass + h * lanes_;
    std::fill_n(sums, width_ * lanes_, 0.0);
    std::fill_n(mass, lanes_, 0.0);
    const auto flush = [&](index_t count) {
      lane_product({buffers.rows, 1, width_}, width_, buffers.shares, lanes_, lanes_, count, buffers.sums, lanes_);
      for (index_t i = 0; i < width_ * lanes_; ++i) sums[i] += static_cast<double>(buffers.sums[i]);
    };
    index_t filled = 0;
    for (index_t n = 0; n < m_.counts[row]; ++n) {
      if (states[row * sizes_.capacity + n] == exchange_state::out) continue;
      const float* const share = shares(h) + n * lanes_;
      for (index_t r = 0; r < lanes_; ++r) mass[r] += static_cast<double>(share[r]);
      std::copy_n(share, lanes_, buffers.shares + filled * lanes_);
      std::copy_n(m_.values + (row * sizes_.capacity + n) * width_, width_, buffers.rows + filled * width_);
      if (++filled < set_tile) continue;
      flush(filled);
      filled = 0;
    }
    if (filled > 0) flush(filled);
    const index_t begin = h * width_ * lanes_;
    for (index_t c = 0; c < width_; ++c) {
      for (index_t r = 0; r < lanes_; ++r) {
        const index_t at = c * lanes_ + r;
        const double output = mass[r] > 0 ? sums[at] / mass[r] : 0.0;
        out.output[begin + at] = static_cast<float>(output);
        out.change[begin + at] = static_cast<float>(output - m_.full[begin + at]);
      }
    }
  }

  /// error = sum_h W[h] change_h, and sum_r w_r ||error_r||^2.
  [[nodiscard]] double project(set_outputs& out) {
    const index_t columns = sizes_.shape.query_heads * channels_;
    const index_t blocks = (sizes_.hidden + set_tile - 1) / set_tile;
    backend_.parallel_for(blocks, [&](index_t block) {
      for (index_t c = block * set_tile; c < std::min(sizes_.hidden, (block + 1) * set_tile); ++c) {
        float* const error = out.error + c * lanes_;
        if (projected_) {
          float* const weights = m_.projection_rows + block * columns;
          widen_padded(layer_.projection[c], columns, weights);
          for (index_t h = 0; h < sizes_.shape.query_heads; ++h) {
            lane_product({weights + h * channels_, columns, 1}, 1, out.change + h * width_ * lanes_, lanes_, lanes_,
                         channels_, error, lanes_, h > 0);
          }
        } else {
          std::copy_n(out.change + (c / channels_ * width_ + c % channels_) * lanes_, lanes_, error);
        }
        double sum = 0;
        for (index_t r = 0; r < lanes_; ++r) {
          sum += static_cast<double>(m_.weights[r]) * static_cast<double>(error[r]) * static_cast<double>(error[r]);
        }
        m_.squares_of_rows[c] = sum;
      }
    });
    double sum = 0;
    for (index_t c = 0; c < sizes_.hidden; ++c) sum += m_.squares_of_rows[c];
    return sum;
  }

  /// pulls[h] = W[h]^T error.
  void pull_back(const set_outputs& from, index_t h) noexcept {
    float* const pull = m_.pulls + h * width_ * lanes_;
    if (!projected_) {
      std::copy_n(from.change + h * width_ * lanes_, width_ * lanes_, pull);
      return;
    }
    const index_t blocks = (sizes_.hidden + set_tile - 1) / set_tile;
    float* const weights = m_.projection_rows + blocks * sizes_.shape.query_heads * channels_ + h * set_tile * width_;
    std::fill_n(pull, width_ * lanes_, 0.0f);
    for (index_t first = 0; first < sizes_.hidden; first += set_tile) {
      const index_t count = std::min(set_tile, sizes_.hidden - first);
      for (index_t t = 0; t < count; ++t) {
        widen_padded(layer_.projection[first + t].slice(0, h * channels_, channels_), width_, weights + t * width_);
      }
      lane_product({weights, 1, width_}, width_, from.error + first * lanes_, lanes_, lanes_, count, pull, lanes_,
                   true);
    }
  }

  /// The parts of (o'_i - v)^T G[i, k] (o'_k - v) that do not depend on v, for every pair of a group.
  void prepare_pairs(const set_outputs& from) {
    backend_.parallel_for(sizes_.kept_heads, [&](index_t row) {
      float* const product = m_.buffers[row * group_].sums;
      index_t pair = 0;
      for (index_t i = 0; i < group_; ++i) {
        for (index_t k = i; k < group_; ++k, ++pair) {
          const float* const left = from.output + (row * group_ + i) * width_ * lanes_;
          const float* const right = from.output + (row * group_ + k) * width_ * lanes_;
          float* const pull = m_.pair_pulls + (row * pairs_ + pair) * width_ * lanes_;
          std::fill_n(pull, width_ * lanes_, 0.0f);
          std::fill_n(product, width_ * lanes_, 0.0f);
          lane_product({gram(row, pair), width_, 1}, channels_, right, lanes_, lanes_, channels_, product, lanes_);
          float* const square = m_.pair_squares + (row * pairs_ + pair) * lanes_;
          std::fill_n(square, lanes_, 0.0f);
          for (index_t c = 0; c < channels_; ++c) {
            for (index_t r = 0; r < lanes_; ++r) square[r] += left[c * lanes_ + r] * product[c * lanes_ + r];
          }
          lane_product({gram(row, pair), 1, width_}, channels_, left, lanes_, lanes_, channels_, pull, lanes_);
          for (index_t j = 0; j < width_ * lanes_; ++j) pull[j] += product[j];
        }
      }
    });
  }

  /// A token that leaves (s = -1) or enters (s = +1) changes o'_i by c_i (o'_i - v), c_i = -s a_i / (S_i + s a_i), and
  /// ||error||^2 by sum_i 2 c_i pull_i . (o'_i - v) + sum_{i, k} c_i c_k (o'_i - v)^T G[i, k] (o'_k - v).
  void gains_of(index_t row) noexcept {
    float* const products = products_of(row);
    const index_t piece = set_tile * lanes_;
    for (index_t first = 0; first < m_.counts[row]; first += set_tile) {
      index_t count = 0;
      for (index_t i = 0; i < group_; ++i) {
        count = multiply_values(row, first, m_.pulls + (row * group_ + i) * width_ * lanes_, products + i * piece);
      }
      for (index_t pair = 0; pair < pairs_; ++pair) {
        multiply_values(row, first, pair_pull(row, pair), products + (group_ + pair) * piece);
      }
      for (index_t t = 0; t < count; ++t) {
        const index_t at = row * sizes_.capacity + first + t;
        m_.gains[at] =
            m_.states[at] == exchange_state::fixed ? 0.0 : gain_of(row, first + t, products + t * lanes_);
      }
    }
  }

  [[nodiscard]] double gain_of(index_t row, index_t n, const float* products) noexcept {
    const index_t piece = set_tile * lanes_;
    const float sign = m_.states[row * sizes_.capacity + n] == exchange_state::out ? 1.0f : -1.0f;
    float* const coefficients = m_.coefficients + row * group_ * lanes_;
    double sum = 0;
    for (index_t i = 0; i < group_; ++i) {
      const index_t h = row * group_ + i;
      const float* const share = shares(h) + n * lanes_;
      const double* const mass = m_.now.mass + h * lanes_;
      float* const c = coefficients + i * lanes_;
      for (index_t r = 0; r < lanes_; ++r) {
        const auto rest = static_cast<float>(mass[r] + static_cast<double>(sign * share[r]));
        // Nothing would be left for a query: not to be considered.
        if (sign < 0 && m_.weights[r] > 0 && share[r] > 0 && rest < 1e-6f) {
          return std::numeric_limits<double>::infinity();
        }
        c[r] = rest > 0 ? -sign * share[r] / rest : 0.0f;
      }
      float part = 0;
      for (index_t r = 0; r < lanes_; ++r) {
        part += m_.weights[r] * c[r] * (m_.pull_products[h * lanes_ + r] - products[i * piece + r]);
      }
      sum += static_cast<double>(2 * part);
    }
    index_t pair = 0;
    for (index_t i = 0; i < group_; ++i) {
      for (index_t k = i; k < group_; ++k, ++pair) {
        const float square = m_.squares[(row * pairs_ + pair) * sizes_.capacity + n];
        const float* const product = products + (group_ + pair) * piece;
        float part = 0;
        for (index_t r = 0; r < lanes_; ++r) {
          part += m_.weights[r] * coefficients[i * lanes_ + r] * coefficients[k * lanes_ + r] *
                  (pair_square(row, pair)[r] - product[r] + square);
        }
        sum += static_cast<double>(i == k ? part : 2 * part);
      }
    }
    const double noise = noise_factor_ > 0 ? noise_factor_ * m_.noise[row * sizes_.capacity + n] : 0.0;
    return sum / norm_ - static_cast<double>(sign) * noise;
  }

  Backend& backend_;
  const layer_view<T>& layer_;
  group_metric_view metric_;
  exchange_sizes sizes_;
  exchange_memory& m_;
  double noise_factor_;
  index_t lanes_;
  index_t width_;
  index_t channels_;
  index_t group_;
  index_t pairs_;
  bool projected_;
  double norm_ = 0;
};

}  // namespace restkv::detail
