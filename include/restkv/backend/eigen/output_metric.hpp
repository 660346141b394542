// SPDX-License-Identifier: Apache-2.0
/// @file
/// `output_metric`: what a layer's W_O does to distances, prepared once when the model is loaded.
#pragma once

#include <restkv/core/layer.hpp>

#include <Eigen/Dense>

#include <algorithm>
#include <cmath>
#include <vector>

namespace restkv {

/// Owns G[h] = W[h]^T W[h], its extreme eigenvalues and the Cholesky factor L[h], lower triangular with L L^T = G, so
/// that ||W x|| = ||L^T x||, for every query head. W[h] is the [hidden, head_dim] slice of W_O that reads head h. L comes
/// from the QR decomposition of sqrt(Lambda) U^T, so it exists for a singular G too (hidden < head_dim, dead channels).
/// Memory: 12 d^2 bytes a head, 6 MB for 32 heads of 128.
class output_metric {
 public:
  output_metric() = default;

  /// From W_O, [hidden, query_heads * head_dim], row-major as in checkpoints but with any strides, of any element type.
  /// G is accumulated in double. Errors: shapes that do not fit; an element that is not finite; nothing changes then.
  /// Cost: hidden * d^2 multiply-adds and one d x d eigendecomposition a head.
  template <element T>
  [[nodiscard]] status build(const tensor_view<const T, 2>& projection, index_t query_heads, index_t head_dim) {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    if (projection.data == nullptr) return status::error(errc::missing_input, "the layer has no projection (W_O)");
    if (query_heads < 1 || query_heads > 65536 || head_dim < 1 || head_dim > 4096) {  // the limits of a plan
      return status::error(errc::invalid_argument,
                           "%lld query heads of %lld channels: 1 to 65536 of 1 to 4096 are possible",
                           ll(query_heads), ll(head_dim));
    }
    RESTKV_RETURN_IF_FAILED(check_projection_width(projection, query_heads, head_dim));
    const index_t hidden = projection.extent(0);
    output_metric made;
    made.heads_ = query_heads;
    made.head_dim_ = head_dim;
    made.gram_.resize(static_cast<std::size_t>(query_heads * head_dim * head_dim));
    made.factor_.resize(made.gram_.size());
    made.spectrum_.resize(static_cast<std::size_t>(query_heads * head_dim));
    using row_major = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    constexpr index_t block = 256;  // rows of W_O widened at a time
    row_major slice(std::min(block, hidden), head_dim);
    for (index_t h = 0; h < query_heads; ++h) {
      Eigen::Map<row_major> gram(made.gram_.data() + h * head_dim * head_dim, head_dim, head_dim);
      gram.setZero();
      for (index_t begin = 0; begin < hidden; begin += block) {
        const index_t rows = std::min(block, hidden - begin);
        for (index_t r = 0; r < rows; ++r) {
          for (index_t c = 0; c < head_dim; ++c) {
            const double weight = widen<double>(projection(begin + r, h * head_dim + c));
            if (!std::isfinite(weight)) {
              return status::error(errc::invalid_argument, "W_O holds %g at row %lld, column %lld", weight,
                                   ll(begin + r), ll(h * head_dim + c));
            }
            slice(r, c) = weight;
          }
        }
        gram.noalias() += slice.topRows(rows).transpose() * slice.topRows(rows);  // [head_dim, head_dim]
      }
      const Eigen::SelfAdjointEigenSolver<row_major> solver(gram);
      if (solver.info() != Eigen::Success) {
        return status::error(errc::invalid_argument, "the Gram matrix of W_O's head %lld has no eigendecomposition",
                             ll(h));
      }
      const Eigen::VectorXd eigenvalues = solver.eigenvalues().cwiseMax(0.0);  // [head_dim], ascending
      const row_major root = eigenvalues.cwiseSqrt().asDiagonal() * solver.eigenvectors().transpose();
      const Eigen::HouseholderQR<row_major> qr(root);
      for (index_t r = 0; r < head_dim; ++r) {
        made.spectrum_[static_cast<std::size_t>(h * head_dim + r)] =
            static_cast<float>(eigenvalues(head_dim - 1 - r));
        for (index_t c = 0; c < head_dim; ++c) {
          made.factor_[static_cast<std::size_t>((h * head_dim + c) * head_dim + r)] =
              c < r ? 0.0f : static_cast<float>(qr.matrixQR()(r, c));
        }
      }
    }
    *this = std::move(made);
    return {};
  }

  /// Valid as long as this object lives and is not rebuilt.
  [[nodiscard]] output_metric_view view() const noexcept {
    if (gram_.empty()) return {};
    return {{gram_.data(), {heads_, head_dim_, head_dim_}},
            {factor_.data(), {heads_, head_dim_, head_dim_}},
            {spectrum_.data(), {heads_, head_dim_}}};
  }

 private:
  index_t heads_ = 0;
  index_t head_dim_ = 0;
  std::vector<double> gram_;
  std::vector<float> factor_;
  std::vector<float> spectrum_;
};

}  // namespace restkv
