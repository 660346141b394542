// SPDX-License-Identifier: Apache-2.0
/// @file
/// The working memory of a request on a Thrust system.
#pragma once

#include <restkv/backend/thrust/drift.cuh>
#include <restkv/backend/thrust/heads.cuh>
#include <restkv/backend/thrust/tokens.cuh>

#include <algorithm>

namespace restkv::on_thrust {

/// What a request asks of the backend.
template <class Request>
struct needs_of {
  using score = std::remove_cvref_t<decltype(Request::score)>;
  using temporal = std::remove_cvref_t<decltype(Request::temporal)>;
  static constexpr bool whole_heads = head_score<score>;
  static constexpr feature set = features_of<score>();
  static constexpr bool window = needs_window<score>();
  static constexpr bool output = has(set, output_features);
  static constexpr bool values = has(set, value_features);
  /// Features that M v takes part in.
  static constexpr bool images =
      has(set, feature::distance | feature::alignment | feature::value_norm | feature::mean_distance);
  static constexpr bool local = needs_attention_alone<score>();
};

/// Queries that a request's window has at most.
template <class Request>
[[nodiscard]] constexpr index_t lanes_of(const Request& request) noexcept {
  return needs_of<Request>::window ? std::min(request.window, request.shape.tokens) : 0;
}

/// Neighbours to each side that a query's attention is averaged over.
template <class Request>
[[nodiscard]] constexpr index_t reach_of(const Request& request) noexcept {
  if constexpr (needs_of<Request>::window && pools_attention<typename needs_of<Request>::score>()) {
    return attention_pool_of(request.score) / 2;
  }
  return 0;
}

/// True where queries are taken slab by slab and folded: see `stream_queries`.
template <class Request>
[[nodiscard]] constexpr bool streams(const Request& request) noexcept {
  if constexpr (needs_of<Request>::local) {
    if (scores_window<typename needs_of<Request>::score>() || request.window > most_window) return true;
    return is_linear(request.temporal) && order_of(request.score) == query_order::before && reach_of(request) == 0;
  }
  return false;
}

/// The arrays of a request, and a slab that its stages share.
template <class Request, memory_space Space>
class scratch {
  using needs = needs_of<Request>;

 public:
  /// `slab_floats`: the slab's size, in floats, unless the smallest part of a stage is larger.
  scratch(const Request& request, index_t slab_floats, workspace& space)
      : drift_(space.take<double>(request.shape.batch * request.shape.query_heads),
               {request.shape.batch, request.shape.query_heads}) {
    const index_t heads = request.shape.batch * request.shape.query_heads;
    const index_t tokens = request.shape.tokens;
    const index_t width = request.shape.head_dim;
    const index_t lanes = lanes_of(request);
    const index_t reach = reach_of(request);
    const bool after = order_of(request.score) == query_order::after;
    index_t most = 0;   // bytes that a stage could use
    index_t least = 0;  // bytes of its smallest part
    const auto stage = [&](index_t bytes, index_t parts) {
      const index_t of_slab = slab_floats * static_cast<index_t>(sizeof(float));
      most = std::max(most, bytes > of_slab / std::max<index_t>(parts, 1) ? of_slab : bytes * parts);
      least = std::max(least, bytes);
    };
    if constexpr (needs::whole_heads) {
      stage(scratch_of_row(request) * static_cast<index_t>(sizeof(float)), request.shape.batch * request.heads());
    } else {
      spans = space.take<head_span>(request.shape.batch * request.shape.kv_heads);
      scores = space.take<double>(heads * tokens);
      if constexpr (has(needs::set, feature::mean_distance)) {
        mean = space.take<double>(request.shape.batch * request.shape.kv_heads * width);
        mean_image = space.take<double>(heads * width);
      }
      if constexpr (needs::window) {
        weights = space.take<double>(request.shape.batch * request.shape.kv_heads * lanes);
        most_attended = space.take<index_t>(request.shape.batch);
        balance = space.take<index_t>(heads);
        stage(bytes_of_streamed_row(tokens), heads * lanes);
        stage(drift_memory::bytes_of_row(tokens), heads * lanes);
        if (!streams(request)) {
          states = space.take<lane_state>(heads * lanes);
          if (reach > 0) pool_scale = space.take<float>(heads * lanes);
          if (after) {
            smoothed = space.take<float>(heads * tokens);
            rests = space.take<float>(heads * tokens);
            tops = space.take<peak>(heads);
            partial_tops = space.take<peak>(heads * parts_of(tokens));
          }
          if constexpr (needs::output) {
            outputs = output_states(after ? heads : heads * lanes, width, needs_metric(request.score), space);
          }
        }
      }
      if (!streams(request)) {
        stage(token_memory::bytes_of_token(lanes, reach, needs::images ? width : 0), heads * tokens);
      }
    }
    slab_bytes_ = most == 0 ? 0 : std::max(least, std::min(most, slab_floats * index_t(sizeof(float)))) + slack;
    slab_ = space.take<std::byte>(slab_bytes_);
  }

  /// Room for the drift of every query head. [batch, query_heads]
  [[nodiscard]] tensor_view<double, 2, Space> drift() const noexcept { return drift_; }
  /// The slab, to be carved anew by each part of a stage.
  [[nodiscard]] workspace slab() const noexcept { return {slab_, static_cast<std::size_t>(slab_bytes_)}; }
  /// Parts of a stage that fit into the slab together.
  [[nodiscard]] index_t parts_at_once(index_t bytes) const noexcept {
    if (bytes <= 0) return std::numeric_limits<index_t>::max();
    return std::max<index_t>(1, (slab_bytes_ - slack) / bytes);
  }

  head_span* spans = nullptr;        ///< [batch * kv_heads]
  double* scores = nullptr;          ///< before the group reduction, [heads, tokens]
  double* mean = nullptr;            ///< mean values, [batch * kv_heads, head_dim]
  double* mean_image = nullptr;      ///< M times them, [heads, head_dim]
  double* weights = nullptr;         ///< of a linear smoother, [batch * kv_heads, lanes]
  index_t* most_attended = nullptr;  ///< [batch]
  index_t* balance = nullptr;        ///< see `measure_drift`, [heads]
  lane_state* states = nullptr;      ///< [heads, lanes]
  float* pool_scale = nullptr;       ///< [heads, lanes]
  float* smoothed = nullptr;         ///< smoothed attention, [heads, tokens]
  float* rests = nullptr;            ///< 1 - smoothed, [heads, tokens]
  peak* tops = nullptr;              ///< of the smoothed rows, [heads]
  peak* partial_tops = nullptr;      ///< [heads, parts_of(tokens)]
  output_states outputs;

 private:
  static constexpr index_t slack = 1024;  // alignment of a slab's pieces

  tensor_view<double, 2, Space> drift_;
  std::byte* slab_ = nullptr;
  index_t slab_bytes_ = 0;
};

}  // namespace restkv::on_thrust
