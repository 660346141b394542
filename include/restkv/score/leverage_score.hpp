// SPDX-License-Identifier: Apache-2.0
/// @file
/// `leverage_score`: tokens whose key the other keys cannot explain.
#pragma once

#include <restkv/core/cholesky.hpp>
#include <restkv/core/counter_random.hpp>
#include <restkv/core/scratch.hpp>
#include <restkv/core/status.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv {

namespace detail {

/// Subtracts the mean of what is not NaN and divides by its standard deviation (by n - 1), which is taken to be at
/// least 1e-6.
template <std::floating_point Real>
void standardise(std::span<Real> scores) noexcept {
  double sum = 0;
  double count = 0;
  for (const Real score : scores) {
    if (score != score) continue;
    sum += static_cast<double>(score);
    ++count;
  }
  if (count == 0) return;
  const double mean = sum / count;
  double squares = 0;
  for (const Real score : scores) {
    const double part = static_cast<double>(score) - mean;
    if (score == score) squares += part * part;
  }
  const double deviation = std::max(std::sqrt(squares / std::max(count - 1, 1.0)), 1e-6);
  for (Real& score : scores) score = static_cast<Real>((static_cast<double>(score) - mean) / deviation);
}

}  // namespace detail

/// score = x^T (X^T X + ridge I)^-1 x, in [0, 1), with the rows x of X the head's keys less their mean (Compactor,
/// arXiv 2507.08143). With `sketch` > 0 every x is first multiplied by a random matrix [d, sketch] of entries
/// +-1 / sqrt(sketch), drawn by a counter from `seed`, layer, sequence and head: the same bits on every machine, where
/// the release draws normal numbers. sketch = 0 takes the keys as they are, which costs no more for d <= 128.
///
/// The release standardises the scores of all heads of a layer together, which no choice by rank notices;
/// `standardised` does it for each head, so that competing heads weigh alike. It scores keys before RoPE: for those
/// numbers plan on a layer_view of unrotated keys. A key that is not finite scores NaN and takes no part in mean and
/// matrix. Ties go to the smaller index.
///
/// Cost: three passes over the keys. With k = sketch: 2 d k + k^2 multiply-adds a token in double; exact: d^2.
/// Scratch of about 2 k (k + d) elements, exact 2 d^2.
struct leverage_score {
  index_t sketch = 48;        ///< columns of the random matrix; 0: exact
  double ridge = 0.01;        ///< added to the matrix's diagonal
  std::uint64_t seed = 0;     ///< another seed draws another matrix
  bool standardised = false;  ///< scores of a head less their mean, divided by their standard deviation

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys;

  [[nodiscard]] status check() const noexcept {
    constexpr index_t most = 4096;
    if (sketch < 0 || sketch > most) {
      return status::error(errc::invalid_argument, "sketch of leverage_score is %lld, must be within [0, %lld]",
                           static_cast<long long>(sketch), static_cast<long long>(most));
    }
    if (ridge > 0 && std::isfinite(ridge)) return {};
    return status::error(errc::invalid_argument, "ridge of leverage_score is %g, must be above 0 and finite", ridge);
  }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept {
    const index_t size = width(shape.head_dim);
    return shape.head_dim + 2 * scratch_of_doubles(shape.head_dim) + scratch_of_doubles(size * size) +
           scratch_of_doubles(outer_product_sum::row_elements(size)) + scratch_of_doubles(sketch * shape.head_dim);
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    score_tokens(head, 0, head.length(), scores, scratch);
  }
  ///@}

  /// The scores of tokens [begin, end) as if there were no others; scores[n] of the rest stay as they are. `scores` and
  /// `scratch` are those of `score_head`.
  template <element T, std::floating_point Real>
  void score_tokens(const head_view<T>& head, index_t begin, index_t end, std::span<Real> scores,
                    std::span<Real> scratch) const noexcept {
    const index_t channels = head.head_dim();
    const index_t size = width(channels);
    scratch_rows<Real> memory(scratch);
    rows<Real> room{};
    room.mean = memory.take_doubles(channels);
    room.centred = memory.take_doubles(channels);
    room.matrix = memory.take_doubles(size * size);
    room.gathered = memory.take_doubles(outer_product_sum::row_elements(size));
    room.random = memory.take_doubles(sketch * channels);
    room.key = memory.take(channels);
    const std::span<Real> key(room.key, static_cast<std::size_t>(channels));
    draw(head, room.random);

    std::fill(room.mean, room.mean + channels, 0.0);
    index_t finite = 0;
    for (index_t n = begin; n < end; ++n) {
      head.key(n, key);
      const bool counts = all_finite(room.key, channels);
      scores[static_cast<std::size_t>(n)] = counts ? Real(0) : std::numeric_limits<Real>::quiet_NaN();
      if (!counts) continue;
      ++finite;
      for (index_t c = 0; c < channels; ++c) room.mean[c] += static_cast<double>(room.key[c]);
    }
    if (finite == 0) return;
    for (index_t c = 0; c < channels; ++c) room.mean[c] /= static_cast<double>(finite);

    std::fill(room.matrix, room.matrix + size * size, 0.0);
    for (index_t i = 0; i < size; ++i) room.matrix[i * size + i] = ridge;
    outer_product_sum sum(room.matrix, room.gathered, size);
    for (index_t n = begin; n < end; ++n) {
      if (scores[static_cast<std::size_t>(n)] != 0) continue;  // NaN
      head.key(n, key);
      project(room, channels, sum.next());
      sum.add();
    }
    sum.finish();
    cholesky_factor(room.matrix, size, ridge);
    invert_lower(room.matrix, size, room.gathered);

    for (index_t n = begin; n < end; ++n) {
      Real& score = scores[static_cast<std::size_t>(n)];
      if (score != 0) continue;
      head.key(n, key);
      project(room, channels, room.gathered);
      score = static_cast<Real>(inverse_quadratic(room.matrix, room.gathered, size));
    }
    if (standardised) {
      detail::standardise(scores.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)));
    }
  }

 private:
  template <std::floating_point Real>
  struct rows {
    double* mean;      // [head_dim]
    double* centred;   // [head_dim]
    double* matrix;    // [width, width]
    double* gathered;  // [rows_at_once, width]
    double* random;    // [head_dim, sketch]
    Real* key;         // [head_dim]
  };

  [[nodiscard]] constexpr index_t width(index_t channels) const noexcept { return sketch == 0 ? channels : sketch; }

  /// The key that was read, less the mean, times the random matrix.
  template <std::floating_point Real>
  void project(const rows<Real>& room, index_t channels, double* out) const noexcept {
    double* const centred = sketch == 0 ? out : room.centred;
    for (index_t c = 0; c < channels; ++c) centred[c] = static_cast<double>(room.key[c]) - room.mean[c];
    if (sketch == 0) return;
    std::fill(out, out + sketch, 0.0);
    for (index_t c = 0; c < channels; ++c) {
      const double* const row = room.random + c * sketch;
      for (index_t j = 0; j < sketch; ++j) out[j] += centred[c] * row[j];
    }
  }

  /// The random matrix, 64 signs at a time.
  template <element T>
  void draw(const head_view<T>& head, double* random) const noexcept {
    if (sketch == 0) return;
    const double size = 1 / std::sqrt(static_cast<double>(sketch));
    const index_t head_of_layer = head.shape().first_kv_head + head.kv_head();
    std::uint64_t bits = 0;
    for (index_t i = 0; i < sketch * head.head_dim(); ++i) {
      if (i % 64 == 0) bits = counter_bits(seed, head.shape().layer, head.batch(), head_of_layer, i / 64);
      random[i] = ((bits >> (i % 64)) & 1u) != 0 ? size : -size;
    }
  }
};

}  // namespace restkv
