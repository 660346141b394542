// SPDX-License-Identifier: Apache-2.0
/// @file
/// `group_metric`: what W_O does to the joint change of query heads that share a kept set, prepared once.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/selection/set_error/lanes.hpp>

#include <cmath>
#include <vector>

namespace restkv {

/// A `group_metric` as `refine_set_error` reads it.
struct group_metric_view {
  /// G[i, k] = W[i]^T W[k] of the query heads i <= k of each group, pairs ordered by i, then by k. Rows are padded.
  /// [kept_heads, pairs, head_dim, padded head_dim]
  tensor_view<const float, 4> gram{};

  /// True where no metric was prepared.
  [[nodiscard]] constexpr bool missing() const noexcept { return gram.data == nullptr; }
};

/// Pairs of query heads of a group, each head with itself included.
[[nodiscard]] constexpr index_t pairs_of_group(index_t group) noexcept { return group * (group + 1) / 2; }

/// The Gram matrices G[i, k] = W[i]^T W[k] of the slices of W_O of all pairs of query heads that share one kept set, so
/// that ||sum_i W[i] x_i||^2 of a group is a sum of x_i^T G[i, k] x_k. Owns its memory, 4 d^2 g (g + 1) / 2 bytes a
/// kept head: 5 MB for 8 heads of 128 channels and groups of 4. Movable.
class group_metric {
 public:
  group_metric() = default;

  /// From W_O, [hidden, query_heads * head_dim] of any element type and strides; `kept_heads` is the number of kept
  /// sets of a layer (KV heads, or query heads where each has its own). Without W_O (a null view) G is the identity for
  /// a head and 0 between heads, as for outputs that stay apart.
  ///
  /// Errors: shapes that do not fit; an element that is not finite. Nothing changes then. Allocates. Cost: hidden d^2
  /// multiply-adds a pair; prepare it when the model is loaded.
  template <element T>
  [[nodiscard]] status build(const tensor_view<const T, 2>& projection, index_t query_heads, index_t head_dim,
                             index_t kept_heads) {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    if (head_dim < 1 || head_dim > 4096 || query_heads < 1 || query_heads > 65536) {
      return status::error(errc::invalid_argument,
                           "%lld query heads of %lld channels: 1 to 65536 of 1 to 4096 are possible", ll(query_heads),
                           ll(head_dim));
    }
    if (kept_heads < 1 || query_heads % kept_heads != 0) {
      return status::error(errc::shape_mismatch,
                           "%lld query heads, %lld kept sets: query heads must be a multiple of them", ll(query_heads),
                           ll(kept_heads));
    }
    const bool projected = projection.data != nullptr;
    if (projected) RESTKV_RETURN_IF_FAILED(check_projection_width(projection, query_heads, head_dim));
    const index_t group = query_heads / kept_heads;
    const index_t width = detail::padded_set_lanes(head_dim);
    const index_t matrix = head_dim * width;
    std::vector<float> made(static_cast<std::size_t>(kept_heads * pairs_of_group(group) * matrix), 0.0f);
    constexpr index_t block = 32;  // rows of W_O widened at a time
    std::vector<float> rows(static_cast<std::size_t>(block * group * width), 0.0f);
    for (index_t h = 0; h < kept_heads; ++h) {
      float* const of_head = made.data() + h * pairs_of_group(group) * matrix;
      for (index_t begin = 0; projected && begin < projection.extent(0); begin += block) {
        const index_t count = std::min(block, projection.extent(0) - begin);
        for (index_t r = 0; r < count; ++r) {
          for (index_t c = 0; c < group * head_dim; ++c) {
            const auto weight = widen<float>(projection(begin + r, h * group * head_dim + c));
            if (!std::isfinite(weight)) {
              return status::error(errc::invalid_argument, "W_O holds %g at row %lld, column %lld",
                                   static_cast<double>(weight), ll(begin + r), ll(h * group * head_dim + c));
            }
            rows[static_cast<std::size_t>((r * group + c / head_dim) * width + c % head_dim)] = weight;
          }
        }
        index_t pair = 0;
        for (index_t i = 0; i < group; ++i) {
          for (index_t k = i; k < group; ++k, ++pair) {
            detail::lane_product({rows.data() + i * width, 1, group * width}, head_dim, rows.data() + k * width,
                                 group * width, width, count, of_head + pair * matrix, width, true);
          }
        }
      }
      if (projected) continue;
      index_t pair = 0;
      for (index_t i = 0; i < group; pair += group - i, ++i) {
        for (index_t c = 0; c < head_dim; ++c) of_head[pair * matrix + c * width + c] = 1.0f;
      }
    }
    gram_ = std::move(made);
    kept_heads_ = kept_heads;
    group_ = group;
    head_dim_ = head_dim;
    return {};
  }

  /// Valid as long as this object lives and is not rebuilt.
  [[nodiscard]] group_metric_view view() const noexcept {
    if (gram_.empty()) return {};
    return {
        {gram_.data(), {kept_heads_, pairs_of_group(group_), head_dim_, detail::padded_set_lanes(head_dim_)}}};
  }

 private:
  index_t kept_heads_ = 0;
  index_t group_ = 0;
  index_t head_dim_ = 0;
  std::vector<float> gram_;
};

}  // namespace restkv
