// SPDX-License-Identifier: Apache-2.0
/// @file
/// W_O as the verifier needs it: the heads' Gram matrices, dense, and W_O times the heads' vectors. In double, with
/// nothing but the standard library.
#pragma once

#include <restkv/verify/split_attention.hpp>

#include <vector>

namespace restkv::detail {

/// The Gram matrices G[h] = W[h]^T W[h] of a layer's heads. Memory: 16 d^2 bytes a head.
class dense_grams {
 public:
  dense_grams() = default;
  dense_grams(index_t heads, index_t channels)
      : channels_(channels),
        width_(padded_channels(channels)),
        full_(static_cast<std::size_t>(heads * channels * width_)),
        folded_(full_.size()),
        rows_(static_cast<std::size_t>(heads * block * width_)) {}

  [[nodiscard]] bool empty() const noexcept { return full_.empty(); }

  /// Copies G[h] from a prepared metric.
  void copy(const tensor_view<const double, 3>& gram, index_t h) noexcept {
    for (index_t r = 0; r < channels_; ++r) {
      for (index_t c = 0; c < channels_; ++c) row(h, r)[c] = gram(h, r, c);
    }
    fold(h);
  }

  /// Computes G[h] from W_O, [hidden, heads * channels]. Cost: hidden d^2 / 2 multiply-adds.
  template <element T>
  void compute(const tensor_view<const T, 2>& projection, index_t h) noexcept {
    double* const rows = rows_.data() + h * block * width_;  // [block, width], zero behind the channels
    double column[block] = {};
    for (index_t first = 0; first < projection.extent(0); first += block) {
      const index_t count = std::min(block, projection.extent(0) - first);
      for (index_t i = 0; i < count; ++i) {
        for (index_t c = 0; c < channels_; ++c) {
          rows[i * width_ + c] = widen<double>(projection(first + i, h * channels_ + c));
        }
      }
      for (index_t r = 0; r < channels_; ++r) {
        for (index_t i = 0; i < count; ++i) column[i] = rows[i * width_ + r];
        for (index_t c = 0; c <= r; c += verify_lanes) add_rows(column, rows + c, width_, count, row(h, r) + c);
      }
    }
    for (index_t r = 0; r < channels_; ++r) {
      for (index_t c = 0; c < r; ++c) row(h, c)[r] = row(h, r)[c];
    }
    fold(h);
  }

  [[nodiscard]] dense_gram operator[](index_t h) const noexcept {
    const index_t offset = h * channels_ * width_;
    return {full_.data() + offset, folded_.data() + offset};
  }

 private:
  static constexpr index_t block = 8;  // rows of W_O at a time

  [[nodiscard]] double* row(index_t h, index_t r) noexcept { return full_.data() + (h * channels_ + r) * width_; }

  void fold(index_t h) noexcept {
    for (index_t r = 0; r < channels_; ++r) {
      double* const folded = folded_.data() + (h * channels_ + r) * width_;
      for (index_t c = 0; c < r; ++c) folded[c] = 2 * row(h, r)[c];
      folded[r] = row(h, r)[r];
    }
  }

  index_t channels_ = 0;
  index_t width_ = 0;
  std::vector<double> full_;    // [heads, channels, width]
  std::vector<double> folded_;  // [heads, channels, width]
  std::vector<double> rows_;    // [heads, block, width]
};

/// x . y over a padded width.
[[nodiscard]] inline double padded_dot(const double* x, const double* y, index_t width) noexcept {
  double lanes[verify_lanes] = {};
  for (index_t c = 0; c < width; c += verify_lanes) {
    for (index_t j = 0; j < verify_lanes; ++j) lanes[j] += x[c + j] * y[c + j];
  }
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

/// A vector of padded_channels numbers for every head.
struct strided_vectors {
  const double* first = nullptr;
  index_t step = 0;

  [[nodiscard]] const double* operator[](index_t head) const noexcept { return first + head * step; }
};

/// What W_O makes of one query's heads.
struct projected_row {
  double change = 0;       ///< ||sum_h W[h] change_h||
  double output_norm = 0;  ///< ||sum_h W[h] output_h||
};

/// Multiplies W_O, [hidden, heads * channels], with one query's changes and outputs; the norm of W[h] change_h goes to
/// head_change[h * step]. `slice` is room for padded_channels numbers, `squares` for one
/// per head; `hidden`, unless it is null, gets the two sums themselves, [2, hidden]. Cost: 2 hidden heads d multiply-adds.
template <element T>
[[nodiscard]] projected_row project_row(const tensor_view<const T, 2>& projection, index_t heads, index_t channels,
                                        const strided_vectors& changes, const strided_vectors& outputs, double* slice,
                                        double* squares, double* head_change, index_t step,
                                        double* hidden = nullptr) noexcept {
  const index_t width = padded_channels(channels);
  for (index_t h = 0; h < heads; ++h) squares[h] = 0;
  for (index_t c = 0; c < width; ++c) slice[c] = 0;
  projected_row row;
  for (index_t r = 0; r < projection.extent(0); ++r) {
    double change = 0;
    double output = 0;
    for (index_t h = 0; h < heads; ++h) {
      const T* const weights = &projection(r, h * channels);
      for (index_t c = 0; c < channels; ++c) slice[c] = widen<double>(weights[c * projection.stride(1)]);
      const double of_head = padded_dot(slice, changes[h], width);
      squares[h] += of_head * of_head;
      change += of_head;
      output += padded_dot(slice, outputs[h], width);
    }
    row.change += change * change;
    row.output_norm += output * output;
    if (hidden != nullptr) hidden[r] = change, hidden[projection.extent(0) + r] = output;
  }
  for (index_t h = 0; h < heads; ++h) head_change[h * step] = std::sqrt(squares[h]);
  return {std::sqrt(row.change), std::sqrt(row.output_norm)};
}

}  // namespace restkv::detail
