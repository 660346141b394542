// SPDX-License-Identifier: Apache-2.0
/// @file
/// Running a `head_score`: one call for each head, and the reduction over the group.
#pragma once

#include <restkv/backend/eigen/head_state.hpp>

namespace restkv::eigen {

/// One row of the result: of a KV head, or of a query head without group reduction.
template <class Request, element T>
void score_heads(const Request& request, const layer_view<T>& layer, index_t batch, index_t row_index,
                 tile_buffers& buffers, const tensor_view<float, 3>& out) noexcept {
  using score = typename needs_of<Request>::score;
  const index_t heads = request.shape.query_heads / request.heads();
  const std::span<float> scratch(buffers.scratch,
                                 static_cast<std::size_t>(scratch_size_of(request.score, request.shape)));
  float* const row = &out(batch, row_index, 0);
  const head_view<T> first(layer, request.shape, batch, row_index * heads);
  const index_t length = first.length();
  const auto run = [&](index_t j, float* scores) {
    const head_view<T> head(layer, request.shape, batch, row_index * heads + j);
    request.score.score_head(head, std::span<float>(scores, static_cast<std::size_t>(length)), scratch);
  };
  if constexpr (scores_query_heads<score>()) {
    for (index_t j = 0; j < heads; ++j) {
      run(j, buffers.head_row);
      for (index_t n = 0; n < length; ++n) row[n] = group_fold(request.group, row[n], buffers.head_row[n], j == 0);
    }
    for (index_t n = 0; n < length; ++n) row[n] = finite_score(group_finish(request.group, row[n], heads));
  } else {
    run(0, row);  // the group's: there is nothing to reduce
    for (index_t n = 0; n < length; ++n) row[n] = finite_score(row[n]);
  }
}

}  // namespace restkv::eigen
