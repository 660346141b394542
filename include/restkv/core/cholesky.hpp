// SPDX-License-Identifier: Apache-2.0
/// @file
/// Small symmetric matrices in double: sums of outer products, their Cholesky factor, and quadratic forms of the
/// inverse. Rows are dense; only the lower triangle, diagonal included, holds the matrix: what stands above it is not
/// defined, but for the inverse of a factor, where it is 0.
#pragma once

#include <restkv/core/vector_math.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv {

namespace detail {

/// One behind the last entry of row i of a lower triangle that loops go to: whole vectors instead of single numbers.
[[nodiscard]] constexpr index_t lower_row_end(index_t i, index_t size) noexcept {
  return std::min(size, (i / row_lanes + 1) * row_lanes);
}

}  // namespace detail

/// Adds outer products x x^T to the lower triangle of a matrix [size, size], four at a time, which saves three of four
/// passes over the matrix.
class outer_product_sum {
 public:
  static constexpr index_t rows_at_once = 4;  ///< rows that are gathered before they are added

  /// Of doubles: the memory for `rows`.
  [[nodiscard]] static constexpr index_t row_elements(index_t size) noexcept { return rows_at_once * size; }

  /// Adds to what `matrix` [size, size] holds. `rows` has room for row_elements(size) numbers.
  outer_product_sum(double* matrix, double* rows, index_t size) noexcept : matrix_(matrix), rows_(rows), size_(size) {}

  /// Where the next x [size] goes.
  [[nodiscard]] double* next() const noexcept { return rows_ + filled_ * size_; }
  /// Adds the x that was written to `next()`.
  void add() noexcept {
    if (++filled_ == rows_at_once) finish();
  }
  /// Adds what has been gathered. Call it once behind the last row.
  void finish() noexcept {
    if (filled_ == 0) return;
    std::fill(rows_ + filled_ * size_, rows_ + rows_at_once * size_, 0.0);
    filled_ = 0;
    const double* const a = rows_;
    const double* const b = a + size_;
    const double* const c = b + size_;
    const double* const d = c + size_;
    for (index_t i = 0; i < size_; ++i) {
      double* const row = matrix_ + i * size_;
      const double ai = a[i];
      const double bi = b[i];
      const double ci = c[i];
      const double di = d[i];
      const index_t end = detail::lower_row_end(i, size_);
      for (index_t j = 0; j < end; ++j) row[j] += (ai * a[j] + bi * b[j]) + (ci * c[j] + di * d[j]);
    }
  }

 private:
  double* matrix_;
  double* rows_;
  index_t size_;
  index_t filled_ = 0;
};

/// Replaces a positive definite matrix [size, size] by its factor L, lower triangular with L L^T = matrix.
/// `least_pivot` is a positive lower bound of the matrix's eigenvalues. No pivot falls below it, nor below the rounding
/// of its diagonal entry, so that a factor exists for every finite matrix. Cost: size^3 / 6 multiply-adds.
inline void cholesky_factor(double* matrix, index_t size, double least_pivot) noexcept {
  for (index_t i = 0; i < size; ++i) {
    double* const row = matrix + i * size;
    const double noise = 8 * static_cast<double>(size) * std::numeric_limits<double>::epsilon() * row[i];
    for (index_t j = 0; j < i; ++j) {
      const double* const other = matrix + j * size;
      row[j] = (row[j] - dot(row, other, j)) / other[j];
    }
    const double pivot = row[i] - squared_norm(row, i);
    row[i] = std::sqrt(std::max({pivot, least_pivot, noise}));
  }
}

/// Replaces a lower triangular factor [size, size] by its inverse. `room` has `size` doubles.
/// Cost: size^3 / 6 multiply-adds.
inline void invert_lower(double* factor, index_t size, double* room) noexcept {
  for (index_t i = 0; i < size; ++i) {
    double* const row = factor + i * size;
    std::fill(room, room + i, 0.0);
    for (index_t k = 0; k < i; ++k) {
      const double* const above = factor + k * size;
      for (index_t j = 0; j <= k; ++j) room[j] += row[k] * above[j];
    }
    const double inverse = 1 / row[i];
    for (index_t j = 0; j < i; ++j) row[j] = -inverse * room[j];
    row[i] = inverse;
    std::fill(row + i + 1, row + size, 0.0);
  }
}

/// x^T (L L^T)^-1 x, from the inverse of L [size, size]. Never negative. Cost: size^2 / 2 multiply-adds.
[[nodiscard]] inline double inverse_quadratic(const double* inverse_factor, const double* x, index_t size) noexcept {
  double sum = 0;
  for (index_t i = 0; i < size; ++i) {
    const double part = dot(inverse_factor + i * size, x, detail::lower_row_end(i, size));
    sum += part * part;
  }
  return sum;
}

}  // namespace restkv
