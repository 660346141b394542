// SPDX-License-Identifier: Apache-2.0
/// @file
/// Running a `head_score` on a host system: one call for each head, and the reduction over the group.
#pragma once

#include <restkv/backend/thrust/problem.cuh>
#include <restkv/backend/thrust/systems.cuh>

#include <span>

namespace restkv::on_thrust {

/// Elements that the call for one row of the result works on.
template <class Request>
[[nodiscard]] constexpr index_t scratch_of_row(const Request& request) noexcept {
  using score = std::remove_cvref_t<decltype(request.score)>;
  return scratch_size_of(request.score, request.shape) + (scores_query_heads<score>() ? request.shape.tokens : 0);
}

/// One row of the result: of a KV head, or of a query head without group reduction. For each row of a slab.
template <class Request, element T>
struct score_heads {
  const Request* request;
  const layer_view<T>* layer;
  index_t first_row;
  float* scratch;  ///< [rows of the slab, scratch_of_row]
  tensor_view<float, 3> out;

  void operator()(index_t index) const noexcept {
    using score = std::remove_cvref_t<decltype(request->score)>;
    const index_t rows = request->heads();
    const index_t heads = request->shape.query_heads / rows;
    const index_t b = (first_row + index) / rows;
    const index_t row_index = (first_row + index) % rows;
    const index_t size = scratch_size_of(request->score, request->shape);
    float* const memory = scratch + index * scratch_of_row(*request);
    const head_view<T> first(*layer, request->shape, b, row_index * heads);
    const auto length = static_cast<std::size_t>(first.length());
    float* const row = out.data + out.offset(b, row_index, index_t{0});
    const auto run = [&](index_t j, float* scores) {
      const head_view<T> head(*layer, request->shape, b, row_index * heads + j);
      request->score.score_head(head, std::span<float>(scores, length),
                                std::span<float>(memory, static_cast<std::size_t>(size)));
    };
    if constexpr (scores_query_heads<score>()) {
      float* const scores = memory + size;
      for (index_t j = 0; j < heads; ++j) {
        run(j, scores);
        for (std::size_t n = 0; n < length; ++n) row[n] = group_fold(request->group, row[n], scores[n], j == 0);
      }
      for (std::size_t n = 0; n < length; ++n) row[n] = finite_score(group_finish(request->group, row[n], heads));
    } else {
      run(0, row);  // the group's: there is nothing to reduce
      for (std::size_t n = 0; n < length; ++n) row[n] = finite_score(row[n]);
    }
  }
};

}  // namespace restkv::on_thrust
