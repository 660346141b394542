// SPDX-License-Identifier: Apache-2.0
/// @file
/// Ridge regression with fewer equations than unknowns, by the matrix of the equations' products.
#pragma once

#include <restkv/core/cholesky.hpp>

namespace restkv::detail {

/// Solves (G + ridge * trace(G) / rows * I) x = right in place, for G = A A^T [rows, rows], its lower triangle, which
/// is overwritten, and right [rows, columns]. A^T x is then the smallest correction that explains `right` up to the
/// ridge. False where G is 0 or not finite. Cost: rows^3 / 6 + rows^2 columns multiply-adds.
[[nodiscard]] inline bool solve_ridge(double* gram, index_t rows, double ridge, double* right,
                                      index_t columns) noexcept {
  double trace = 0;
  for (index_t i = 0; i < rows; ++i) trace += gram[i * rows + i];
  const double least = ridge * trace / static_cast<double>(rows);
  if (!(least > 0) || !std::isfinite(trace)) return false;
  for (index_t i = 0; i < rows; ++i) gram[i * rows + i] += least;
  cholesky_factor(gram, rows, least);
  for (index_t i = 0; i < rows; ++i) {
    double* const x = right + i * columns;
    for (index_t j = 0; j < i; ++j) {
      for (index_t c = 0; c < columns; ++c) x[c] -= gram[i * rows + j] * right[j * columns + c];
    }
    for (index_t c = 0; c < columns; ++c) x[c] /= gram[i * rows + i];
  }
  for (index_t i = rows; i-- > 0;) {
    double* const x = right + i * columns;
    for (index_t c = 0; c < columns; ++c) x[c] /= gram[i * rows + i];
    for (index_t j = 0; j < i; ++j) {
      for (index_t c = 0; c < columns; ++c) right[j * columns + c] -= gram[i * rows + j] * x[c];
    }
  }
  return true;
}

}  // namespace restkv::detail
