// SPDX-License-Identifier: Apache-2.0
/// @file
/// Attention outputs: o = sum_n a_n v_n of each query, or of each head's smoothed attention, and their images in the
/// metric.
#pragma once

#include <restkv/backend/thrust/softmax.cuh>

namespace restkv::on_thrust {

/// What is kept of outputs; one a query (`before`), or one a head (`after`). `width` is head_dim.
struct output_states {
  double* whole = nullptr;        ///< o, [outputs, width]
  double* less_top = nullptr;     ///< o - v_top, from the other tokens' share and 1 - a_top, so that nothing cancels
  double* image = nullptr;        ///< M o; `whole` itself in the identity metric
  double* less_image = nullptr;   ///< M (o - v_top); likewise
  float* norm = nullptr;          ///< ||M o||, [outputs]
  float* top_distance = nullptr;  ///< ||M (o - v_top)||, [outputs]

  output_states() = default;
  output_states(index_t outputs, index_t width, bool metric, workspace& space) noexcept
      : whole(space.take<double>(outputs * width)),
        less_top(space.take<double>(outputs * width)),
        image(metric ? space.take<double>(outputs * width) : whole),
        less_image(metric ? space.take<double>(outputs * width) : less_top),
        norm(space.take<float>(outputs)),
        top_distance(space.take<float>(outputs)) {}
};

/// logits[row][n] become shares, 0 where the query does not see the token. For each (row, n).
template <class Problem>
struct logits_to_shares {
  Problem p;
  lane_slab slab;
  const lane_state* states;  ///< of the slab's first head and lane
  index_t stride;            ///< from one head's states to the next
  float* logits;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / p.tokens;
    const index_t n = item % p.tokens;
    const head_span& span = p.span_of(slab.head_of(row));
    const index_t lane = slab.lane_of(row);
    const bool seen = lane < span.window && n < Problem::seen_by(span, lane);
    const lane_state& state = states[row / slab.lanes * stride + row % slab.lanes];
    logits[item] = seen ? static_cast<float>(state.share(logits[item], n)) : 0.0f;
  }
};

/// o and o - v_top of rows of weights, over tokens in order, in double. For each (row, block of channels).
template <class Problem>
struct weigh_values {
  Problem p;
  lane_slab slab;
  const float* weights;      ///< [rows, tokens]
  const lane_state* states;  ///< of queries; null for smoothed rows
  const peak* tops;          ///< of smoothed rows, [rows]
  const float* rests;        ///< 1 - a of smoothed rows, [rows, tokens]
  index_t stride;            ///< from one head's outputs to the next
  double* whole;             ///< [outputs, head_dim], of the slab's first head and lane
  double* less_top;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t blocks = channel_blocks(p.head_dim);
    const index_t row = item / blocks;
    const index_t first = item % blocks * channel_block;
    const index_t count = first + channel_block < p.head_dim ? channel_block : p.head_dim - first;
    const index_t head = slab.head_of(row);
    const head_span& span = p.span_of(head);
    const index_t output = row / slab.lanes * stride + row % slab.lanes;
    index_t end = span.length;
    index_t top = -1;
    double top_share = 0;
    double top_rest = 1;
    if (states != nullptr) {
      if (slab.lane_of(row) >= span.window) return;
      const lane_state& state = states[output];
      top = state.top;
      top_share = state.share(0, top);
      top_rest = state.rest_of(top_share, top);
    } else {
      end = span.past;
      top = tops[row].top;
      if (top < 0) return;
      top_share = static_cast<double>(weights[row * p.tokens + top]);
      top_rest = static_cast<double>(rests[row * p.tokens + top]);
    }
    const index_t kv = p.kv_of(head);
    double others[channel_block] = {};
    for (index_t n = 0; n < end; ++n) {
      if (n == top) continue;
      const auto weight = static_cast<double>(weights[row * p.tokens + n]);
      const auto value = p.value_of(kv, n);
      for (index_t j = 0; j < count; ++j) others[j] += weight * value[first + j];
    }
    const auto value = p.value_of(kv, top);
    for (index_t j = 0; j < count; ++j) {
      whole[output * p.head_dim + first + j] = others[j] + top_share * value[first + j];
      less_top[output * p.head_dim + first + j] = others[j] - top_rest * value[first + j];
    }
  }
};

/// out[output] = M x[output]. For each (output, block of channels).
template <class Problem>
struct map_rows {
  Problem p;
  index_t outputs_per_head;
  const double* x;  ///< [outputs, head_dim]
  double* out;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t blocks = channel_blocks(p.head_dim);
    const index_t output = item / blocks;
    const index_t first = item % blocks * channel_block;
    double image[channel_block];
    map_block(p, output / outputs_per_head, channels<double>{x + output * p.head_dim, 1}, item % blocks, image);
    for (index_t j = 0; j < channel_block && first + j < p.head_dim; ++j)
      out[output * p.head_dim + first + j] = image[j];
  }
};

/// ||M o|| and ||M (o - v_top)||. For each output.
struct measure_outputs {
  output_states states;
  index_t head_dim;

  RESTKV_HD void operator()(index_t output) const noexcept {
    const double* const image = states.image + output * head_dim;
    const double* const less = states.less_image + output * head_dim;
    states.norm[output] = static_cast<float>(root(dot(image, 1, image, 1, head_dim)));
    states.top_distance[output] = static_cast<float>(root(dot(less, 1, less, 1, head_dim)));
  }
};

/// Maps and measures all outputs.
template <class System, class Problem>
void map_outputs(const instance<System>& system, const Problem& p, index_t outputs_per_head,
                 const output_states& states) {
  const auto& policy = system.policy();
  const index_t outputs = p.heads() * outputs_per_head;
  if (p.factor.data != nullptr) {
    const index_t items = outputs * channel_blocks(p.head_dim);
    loop(policy, items, map_rows<Problem>{p, outputs_per_head, states.whole, states.image});
    loop(policy, items, map_rows<Problem>{p, outputs_per_head, states.less_top, states.less_image});
  }
  loop(policy, outputs, measure_outputs{states, p.head_dim});
}

/// The mean of a KV head's values, in double. For each (kv, block of channels).
template <class Problem>
struct mean_values {
  Problem p;
  double* mean;  ///< [batch * kv_heads, head_dim]

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t blocks = channel_blocks(p.head_dim);
    const index_t kv = item / blocks;
    const index_t first = item % blocks * channel_block;
    const index_t count = first + channel_block < p.head_dim ? channel_block : p.head_dim - first;
    const index_t length = p.spans[kv].length;
    double sums[channel_block] = {};
    for (index_t n = 0; n < length; ++n) {
      const auto value = p.value_of(kv, n);
      for (index_t j = 0; j < count; ++j) sums[j] += value[first + j];
    }
    for (index_t j = 0; j < count; ++j) {
      mean[kv * p.head_dim + first + j] = length > 0 ? sums[j] / static_cast<double>(length) : 0.0;
    }
  }
};

/// M times the mean value of each query head's cache. For each (head, block of channels).
template <class Problem>
struct map_means {
  Problem p;
  const double* mean;  ///< [batch * kv_heads, head_dim]
  double* out;         ///< [heads, head_dim]

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t blocks = channel_blocks(p.head_dim);
    const index_t head = item / blocks;
    const index_t first = item % blocks * channel_block;
    double image[channel_block];
    map_block(p, head, channels<double>{mean + p.kv_of(head) * p.head_dim, 1}, item % blocks, image);
    for (index_t j = 0; j < channel_block && first + j < p.head_dim; ++j) out[head * p.head_dim + first + j] = image[j];
  }
};

}  // namespace restkv::on_thrust
