// SPDX-License-Identifier: Apache-2.0
/// @file
/// Second half of scoring: the features of chosen tokens and their scores.
#pragma once

#include <restkv/backend/eigen/observation.hpp>

namespace restkv::eigen {

/// ||M (o - v_top)|| for a head's top token: from the other tokens' share of o and 1 - a, so that nothing cancels.
template <class Request>
[[nodiscard]] float top_distance(const head_task<Request>& task, index_t cell, const float* value, float rest_share,
                                 const metric_factors& factors, tile_buffers& buffers,
                                 const head_states& states) noexcept {
  const index_t width = states.width;
  float* const difference = buffers.vector;
  for (index_t c = 0; c < width; ++c) difference[c] = states.others[cell * width + c] - rest_share * value[c];
  // Scaled before squaring: the difference may be as small as rest_share, whose square underflows.
  float largest = 0;
  for (index_t c = 0; c < width; ++c) largest = std::max(largest, std::fabs(difference[c]));
  if (!(largest > 0.0f) || std::isinf(largest)) return std::min(largest, most_distance);
  for (index_t c = 0; c < width; ++c) difference[c] /= largest;
  const float* image = difference;
  if (needs_metric(task.request.score)) {
    factors.apply(task.head, {difference, width}, 1, buffers.vector + width);
    image = buffers.vector + width;
  }
  const float distance = std::sqrt(dot(image, image, width)) * largest;
  return distance > most_distance ? most_distance : distance;
}

/// The rows of `count` chosen tokens of one head: as they lie when the tokens follow each other, gathered otherwise.
template <element T>
[[nodiscard]] float_rows chosen_rows(const chunked_tensor_view<const T>& cache, index_t batch, index_t head,
                                     index_t begin, const index_t* tokens, index_t count, index_t width,
                                     float* staging) noexcept {
  if (tokens[count - 1] - tokens[0] == count - 1) {
    return load_tokens(cache, batch, head, begin + tokens[0], count, width, staging);
  }
  for (index_t n = 0; n < count; ++n) {
    const float_rows row = load_tokens(cache, batch, head, begin + tokens[n], 1, width, staging + n * width);
    if (row.data != staging + n * width) std::copy_n(row.data, width, staging + n * width);
  }
  return {staging, width};
}

/// Squared distances below this part of their terms' sum are recomputed as a sum of squared differences: the expanded
/// form |z|^2 - 2 z y + |y|^2 has lost two digits there. So are those whose terms overflow.
inline constexpr float expansion_limit = 1e-2f;

/// ||M (o_i - v_n)|| for the tokens of a tile and every lane i, from the products in buffers.cross [count, lanes], into
/// the same place.
template <class Request>
void distances_of_tile(const head_task<Request>& task, index_t count, const float_rows& images, tile_buffers& buffers,
                       const head_states& states) noexcept {
  using namespace Eigen::internal;
  const index_t lanes = states.lanes;
  const index_t width = states.width;
  const float* const output_norms = states.image_norm + task.state() * lanes;
  const float* const outputs = states.image + task.state() * width * lanes;  // [width, lanes]
  const packet limit = pset1<packet>(expansion_limit);
  for (index_t n = 0; n < count; ++n) {
    const float* const image = images.data + n * images.stride;
    float* const cross = buffers.cross + n * lanes;
    const packet norm = pset1<packet>(dot(image, image, width));
    packet cancelled = pset1<packet>(0.0f);  // as a mask
    for (index_t lane = 0; lane < lanes; lane += packet_size) {
      const packet terms = padd(norm, ploadu<packet>(output_norms + lane));
      const packet product = ploadu<packet>(cross + lane);
      const packet squared = psub(terms, padd(product, product));
      cancelled = por(cancelled, pcmp_lt_or_nan(psub(squared, pmul(limit, terms)), pset1<packet>(0.0f)));
      pstoreu(cross + lane, squared);
    }
    if (predux_any(cancelled)) {
      for (index_t lane = 0; lane < task.window; ++lane) {
        if (cross[lane] - expansion_limit * (pfirst(norm) + output_norms[lane]) >= 0.0f) continue;
        float sum = 0;
        for (index_t c = 0; c < width; ++c) {
          const float difference = image[c] - outputs[c * lanes + lane];
          sum += difference * difference;
        }
        cross[lane] = sum;
      }
    }
    square_roots(cross, lanes, cross);
  }
}

/// buffers.projected_norm[n] = ||W[h] v_n||_1 of the values of a tile: W_O block by block, each transposed once a tile.
template <element T>
void projected_norms(const layer_view<T>& layer, index_t head, const float_rows& values, index_t count,
                     tile_buffers& buffers) noexcept {
  const index_t head_dim = layer.value.extent(3);
  const index_t hidden = layer.projection.extent(0);
  std::fill_n(buffers.projected_norm, count, 0.0f);
  for (index_t first = 0; first < hidden; first += projection_block) {
    const index_t channels = std::min(projection_block, hidden - first);
    std::fill_n(buffers.projection, head_dim * projection_block, 0.0f);
    for (index_t r = 0; r < channels; ++r) {
      const auto row = layer.projection[first + r];
      for (index_t c = 0; c < head_dim; ++c) {
        buffers.projection[c * projection_block + r] = widen<float>(row(head * head_dim + c));
      }
    }
    multiply({values.data, values.stride, 1}, count, buffers.projection, projection_block, projection_block, head_dim,
             buffers.projected, projection_block);
    for (index_t n = 0; n < count; ++n) {
      const float* const image = buffers.projected + n * projection_block;
      float sums[8] = {};  // independent, so that they become one vector
      for (index_t r = 0; r < projection_block; r += 8) {
        for (index_t i = 0; i < 8; ++i) sums[i] += std::fabs(image[r + i]);
      }
      for (const float sum : sums) buffers.projected_norm[n] += sum;
    }
  }
}

/// Scores of `count` tokens (buffers.tokens) of one head, given M v of each (`images`): calls deliver(i, score).
template <class Request, class Deliver>
void score_tile(const head_task<Request>& task, index_t count, const float_rows& keys, const float_rows& values,
                const float_rows& images, const metric_factors& factors, tile_buffers& buffers,
                const head_states& states, const Deliver& deliver) noexcept {
  using namespace Eigen::internal;
  using needs = needs_of<Request>;
  constexpr bool distance = has(needs::set, feature::distance);
  constexpr bool alignment = has(needs::set, feature::alignment);
  constexpr bool logit = has(needs::set, feature::logit);
  constexpr bool output_norm = has(needs::set, feature::output_norm);
  const index_t lanes = states.lanes;
  const index_t width = states.width;
  const index_t head_dim = task.request.shape.head_dim;

  const auto token_norms = [&](token_features<float>& f, index_t n) {
    if constexpr (has(needs::set, feature::value_norm)) {
      const float* const image = images.data + n * images.stride;
      f.value_norm = std::sqrt(dot(image, image, width));
    }
    if constexpr (has(needs::set, feature::value_norm_l1)) {
      const float* const value = values.data + n * values.stride;
      for (index_t c = 0; c < head_dim; ++c) f.value_norm_l1 += std::fabs(value[c]);
    }
    if constexpr (has(needs::set, feature::projected_norm_l1)) f.projected_norm_l1 = buffers.projected_norm[n];
    if constexpr (has(needs::set, feature::mean_distance)) {
      f.mean_distance = root(squared_distance(images.data + n * images.stride, states.mean_image + task.state() * width,
                                              width));
    }
    if constexpr (has(needs::set, feature::key_norm)) {
      float sum = 0;
      for (index_t c = 0; c < head_dim; ++c) {
        const float key = keys.data[n * keys.stride + c];
        sum += key * key;
      }
      f.key_norm = std::sqrt(sum);
    }
  };

  if constexpr (!needs::window) {
    for (index_t n = 0; n < count; ++n) {
      auto f = task.features(buffers.tokens[n]);
      token_norms(f, n);
      deliver(n, finite_score(task.request.score(f)));
    }
    return;
  } else {
    if (order_of(task.request.score) == query_order::after) {
      const index_t cell = task.state();
      const float* const row = states.row + cell * states.tokens;
      const float whole = task.whole();
      for (index_t n = 0; n < count; ++n) {
        const index_t token = buffers.tokens[n];
        auto f = task.features(token);
        token_norms(f, n);
        f.attention = row[token];
        const bool is_top = token == states.top[cell];
        const float rest = rest_of(task, token, whole, states);
        f.odds = f.attention / rest;
        if constexpr (distance) {
          f.distance = is_top ? top_distance(task, cell, values.data + n * values.stride, rest, factors, buffers, states)
                              : root(squared_distance(images.data + n * images.stride, states.image + cell * width,
                                                      width));
        }
        if constexpr (output_norm) f.output_norm = states.norm[cell];
        if constexpr (alignment) {
          f.alignment = dot(images.data + n * images.stride, states.image + cell * width, width);
        }
        deliver(n, finite_score(task.request.score(f)));
      }
      return;
    }

    const index_t cells = task.state() * lanes;
    const float* const largest = states.largest + cells;
    const float* const rest = states.rest + cells;
    multiply({keys.data, keys.stride, 1}, count, states.queries + task.state() * head_dim * lanes, lanes, lanes,
             head_dim, buffers.shares, lanes);
    make_tile_finite(buffers.shares, count * lanes);
    if constexpr (logit) std::copy_n(buffers.shares, count * lanes, buffers.logits);
    shares_of<has(needs::set, feature::odds)>(buffers.shares, lanes, largest, states.scale + cells, lanes, count,
                                              buffers.shares, buffers.odds);
    if constexpr (distance || alignment) {
      multiply({images.data, images.stride, 1}, count, states.image + cells * width, lanes, lanes, width,
               buffers.cross, lanes);
      if constexpr (alignment) std::copy_n(buffers.cross, count * lanes, buffers.products);
    }
    if constexpr (distance) {
      distances_of_tile(task, count, images, buffers, states);
    }
    if constexpr (has(needs::set, feature::odds) || distance) {
      // Each lane's top token, where it is among these: what cancels in the expressions above, without cancelling.
      const index_t* const tokens = buffers.tokens;
      for (index_t lane = 0; lane < task.window; ++lane) {
        const index_t* const at = std::lower_bound(tokens, tokens + count, states.top[cells + lane]);
        if (at == tokens + count || *at != states.top[cells + lane]) continue;
        const index_t n = at - tokens;
        const float others = std::max(rest[lane], least_rest);
        buffers.odds[n * lanes + lane] = 1.0f / others;
        if constexpr (distance) {
          buffers.cross[n * lanes + lane] =
              top_distance(task, cells + lane, values.data + n * values.stride, others / (1.0f + others), factors,
                           buffers, states);
        }
      }
    }
    std::fill(buffers.scores, buffers.scores + lanes, 0.0f);
    const float* const norms = needs_of<Request>::output ? states.norm + cells : nullptr;
    for (index_t n = 0; n < count; ++n) {
      auto f = task.features(buffers.tokens[n]);
      token_norms(f, n);
      const lane_features features{.shares = buffers.shares + n * lanes,
                                   .odds = buffers.odds + n * lanes,
                                   .distances = buffers.cross + n * lanes,
                                   .norms = norms,
                                   .logits = logit ? buffers.logits + n * lanes : nullptr,
                                   .alignments = alignment ? buffers.products + n * lanes : nullptr};
      deliver(n, score_of_lanes(task, f, features, buffers, lanes));
    }
  }
}

/// Scores of one row of the result (a KV head, or a query head without group reduction): row[n] for the tokens n < past
/// that are marked `wanted`, which become `scored`, or for all where `marks` is null. A score does not depend on which
/// other tokens are wanted.
template <class Request, element T>
void score_row(const Request& request, const layer_view<T>& layer, index_t batch, index_t row_index,
               const sequence_span& span, token_state* marks, const metric_factors& factors,
               tile_buffers& buffers, const head_states& states, float* row) noexcept {
  using needs = needs_of<Request>;
  const index_t heads = request.shape.query_heads / request.heads();
  const head_task<Request> first(request, batch, row_index * heads, span);
  if constexpr (needs::window) first.fill_weights(buffers.weights, states.lanes);
  for (index_t next = 0; next < first.past;) {
    index_t count = 0;
    for (; next < first.past && count < tile_tokens; ++next) {
      if (marks != nullptr) {
        if (marks[next] != token_state::wanted) continue;
        marks[next] = token_state::scored;
      }
      buffers.tokens[count++] = next;
    }
    if (count == 0) break;
    float_rows keys{};
    float_rows values{};
    const bool reads_keys = has(needs::set, feature::key_norm) ||
                            (needs::window && order_of(request.score) == query_order::before);
    if (reads_keys) {
      keys = chosen_rows(layer.key, batch, first.kv_head(), span.begin, buffers.tokens, count, request.shape.head_dim,
                         buffers.keys);
    }
    if constexpr (needs::values) {
      values = chosen_rows(layer.value, batch, first.kv_head(), span.begin, buffers.tokens, count, states.width,
                           buffers.values);
    }
    for (index_t j = 0; j < heads; ++j) {
      const head_task<Request> task(request, batch, row_index * heads + j, span);
      float_rows images = values;
      if (needs_metric(request.score)) {
        factors.apply(task.head, values, count, buffers.images);
        images = {buffers.images, states.width};
      }
      if constexpr (has(needs::set, feature::projected_norm_l1)) {
        projected_norms(layer, task.head, values, count, buffers);
      }
      score_tile(task, count, keys, values, images, factors, buffers, states, [&](index_t i, float score) {
        buffers.folded[i] = group_fold(request.group, buffers.folded[i], score, j == 0);
      });
    }
    for (index_t i = 0; i < count; ++i) {
      row[buffers.tokens[i]] = finite_score(group_finish(request.group, buffers.folded[i], heads));
    }
  }
}

}  // namespace restkv::eigen
