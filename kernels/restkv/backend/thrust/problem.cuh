// SPDX-License-Identifier: Apache-2.0
/// @file
/// A layer as functors see it: views by value, where each head's tokens lie, and the logit of a query and a token.
#pragma once

#include <restkv/backend/backend.hpp>

#include <cmath>
#include <limits>
#include <type_traits>

namespace restkv::on_thrust {

/// Tokens, observation window and queries of one KV head of one sequence. Positions count from `begin`.
struct head_span {
  index_t begin = 0;      ///< first token on the token axis
  index_t length = 0;     ///< tokens
  index_t window = 0;     ///< queries that observe
  index_t past = 0;       ///< tokens that are scored
  index_t first_row = 0;  ///< row of the oldest of these queries
};

/// Channels that one functor handles together.
inline constexpr index_t channel_block = 8;

/// Blocks of channels of a head.
[[nodiscard]] RESTKV_HD constexpr index_t channel_blocks(index_t head_dim) noexcept {
  return (head_dim + channel_block - 1) / channel_block;
}

/// The largest finite logit; those that are larger or infinite count as this, so that differences stay finite.
inline constexpr float most_logit = std::numeric_limits<float>::max() / 2;

/// The root of the largest float: what a distance counts as whose square is no float.
inline constexpr double most_distance = 1.8446743e19;

/// The root of a square: 0 below 0, at most most_distance; NaN stays NaN.
[[nodiscard]] RESTKV_HD inline double root(double square) noexcept {
  const double x = std::sqrt(square < 0 ? 0.0 : square);
  return x > most_distance ? most_distance : x;
}

/// A double as a float, clamped to finite; NaN stays NaN.
[[nodiscard]] RESTKV_HD inline float finite_float(double x) noexcept {
  constexpr float most = std::numeric_limits<float>::max();
  constexpr auto limit = static_cast<double>(most);
  return x > limit ? most : x < -limit ? -most : static_cast<float>(x);
}

/// True where x is neither infinite nor NaN.
[[nodiscard]] RESTKV_HD inline bool is_finite(double x) noexcept { return x - x == 0; }

/// sum_c x(c) y(c), in double, by eight partial sums in a fixed order.
template <class X, class Y>
[[nodiscard]] RESTKV_HD double sum_of_products(const X& x, const Y& y, index_t count) noexcept {
  constexpr index_t parts = 8;
  double sums[parts] = {};
  index_t c = 0;
  for (; c + parts <= count; c += parts) {
    for (index_t j = 0; j < parts; ++j) sums[j] += x(c + j) * y(c + j);
  }
  for (index_t j = 0; j < parts; ++j) sums[j] += c + j < count ? x(c + j) * y(c + j) : 0.0;
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

/// The elements of a row, widened, at any stride.
template <element T>
struct strided_row {
  const T* data;
  index_t step;

  [[nodiscard]] RESTKV_HD double operator()(index_t c) const noexcept { return widen<double>(data[c * step]); }
};

/// The same behind each other, so that a compiler can use vectors.
template <element T>
struct dense_row {
  const T* data;

  [[nodiscard]] RESTKV_HD double operator()(index_t c) const noexcept { return widen<double>(data[c]); }
};

/// sum_c x[c] y[c] of rows with strides; the same bits for every stride.
template <element T, element U>
[[nodiscard]] RESTKV_HD double dot(const T* x, index_t x_step, const U* y, index_t y_step, index_t count) noexcept {
  if (x_step == 1 && y_step == 1) return sum_of_products(dense_row<T>{x}, dense_row<U>{y}, count);
  return sum_of_products(strided_row<T>{x, x_step}, strided_row<U>{y, y_step}, count);
}

/// A row of channels: element c at data[c * step].
template <element T>
struct channels {
  const T* data;
  index_t step;

  [[nodiscard]] RESTKV_HD double operator[](index_t c) const noexcept { return widen<double>(data[c * step]); }
};

/// A cache as functors hold it: in chunks on the host, in one piece on a device, where choosing a chunk would put the
/// whole function object on every thread's stack.
template <element T, memory_space Space>
using cache_view = std::conditional_t<Space == memory_space::device, tensor_view<const T, 4, Space>,
                                      chunked_tensor_view<const T, Space>>;

/// What a request reads of a layer. Heads are query heads, counted through the batch: head = sequence * query_heads +
/// h.
template <element T, memory_space Space>
struct problem {
  tensor_view<const T, 4, Space> query{};
  cache_view<T, Space> key{};
  cache_view<T, Space> value{};
  tensor_view<const T, 2, Space> projection{};
  tensor_view<const float, 3, Space> factor{};  ///< L[h]; without data the metric is the identity
  const head_span* spans = nullptr;             ///< [batch * kv_heads]
  index_t batch = 0;
  index_t query_heads = 0;
  index_t group = 1;
  index_t head_dim = 0;
  index_t tokens = 0;  ///< of the token axis
  index_t lanes = 0;   ///< queries of the longest window
  double root_of_channels = 1;
  logit_perturbation perturbation{};

  [[nodiscard]] RESTKV_HD index_t heads() const noexcept { return batch * query_heads; }
  /// The KV head, counted through the batch.
  [[nodiscard]] RESTKV_HD index_t kv_of(index_t head) const noexcept { return head / group; }
  [[nodiscard]] RESTKV_HD const head_span& span_of(index_t head) const noexcept { return spans[head / group]; }
  [[nodiscard]] RESTKV_HD channels<T> key_of(index_t kv, index_t n) const noexcept { return row_of(key, kv, n); }
  [[nodiscard]] RESTKV_HD channels<T> value_of(index_t kv, index_t n) const noexcept { return row_of(value, kv, n); }

  /// Tokens that a query of a head's window sees.
  [[nodiscard]] RESTKV_HD static index_t seen_by(const head_span& span, index_t lane) noexcept {
    return span.length - span.window + lane + 1;
  }

  /// z = q k / sqrt(d), perturbed where the score says so, finite: NaN counts as the lowest, so that a damaged key gets
  /// no attention and spoils nobody else's. The same bits whenever it is computed.
  [[nodiscard]] RESTKV_HD float logit(index_t head, index_t lane, index_t n) const noexcept {
    const head_span& span = span_of(head);
    const channels<T> k = key_of(kv_of(head), n);
    const index_t b = head / query_heads;
    const index_t h = head % query_heads;
    const T* const q = query.data + query.offset(b, h, span.first_row + lane, index_t{0});
    const double dot_product = dot(q, query.stride(3), k.data, k.step, head_dim) / root_of_channels;
    float z = clamped(static_cast<double>(dot_product));
    if (perturbation.gumbel || perturbation.temperature != 1.0f) {
      z = clamped(perturbation(static_cast<double>(z), b, h, span.length - span.window + lane, n));
    }
    return z;
  }

 private:
  [[nodiscard]] RESTKV_HD static float clamped(double z) noexcept {
    constexpr auto most = static_cast<double>(most_logit);
    return !(z > -most) ? -most_logit : z > most ? most_logit : static_cast<float>(z);
  }

  [[nodiscard]] RESTKV_HD channels<T> row_of(const cache_view<T, Space>& cache, index_t kv, index_t n) const noexcept {
    const index_t kv_heads = query_heads / group;
    const index_t token = spans[kv].begin + n;
    if constexpr (Space == memory_space::device) {
      return {cache.data + cache.offset(kv / kv_heads, kv % kv_heads, token, index_t{0}), cache.stride(3)};
    } else {
      const auto part = cache.from_token(token);
      return {part.data + kv / kv_heads * part.stride(0) + kv % kv_heads * part.stride(1), part.stride(3)};
    }
  }
};

/// (M x)[c] for the channels of a block, M = L[h]^T: sum over i of L(i, c) x[i], in double. L is lower triangular. An
/// image of what is not finite is NaN throughout, whatever L has zeros for.
template <class Problem, class Row>
RESTKV_HD void map_block(const Problem& p, index_t head, const Row& x, index_t block, double* out) noexcept {
  const index_t first = block * channel_block;
  const index_t count = first + channel_block < p.head_dim ? channel_block : p.head_dim - first;
  const float* const factor = p.factor.data + head % p.query_heads * p.factor.stride(0) + first * p.factor.stride(2);
  for (index_t j = 0; j < channel_block; ++j) out[j] = 0;
  if (p.factor.data == nullptr) {
    for (index_t j = 0; j < count; ++j) out[j] = x[first + j];
    return;
  }
  double probe = 0;  // 0 as long as x is finite
  for (index_t i = 0; i < first; ++i) probe += 0 * x[i];
  for (index_t i = first; i < p.head_dim; ++i) {
    const double part = x[i];
    probe += 0 * part;
    const float* const row = factor + i * p.factor.stride(1);
    for (index_t j = 0; j < count; ++j) out[j] += static_cast<double>(row[j * p.factor.stride(2)]) * part;
  }
  if (probe != 0) {
    for (index_t j = 0; j < count; ++j) out[j] = std::numeric_limits<double>::quiet_NaN();
  }
}

/// Part of a problem that is worked on together: query heads and queries of their windows.
struct lane_slab {
  index_t first_head = 0;
  index_t heads = 0;
  index_t first_lane = 0;
  index_t lanes = 0;

  [[nodiscard]] RESTKV_HD index_t rows() const noexcept { return heads * lanes; }
  [[nodiscard]] RESTKV_HD index_t head_of(index_t row) const noexcept { return first_head + row / lanes; }
  [[nodiscard]] RESTKV_HD index_t lane_of(index_t row) const noexcept { return first_lane + row % lanes; }
};

/// Calls body(slab) for slabs of at most `rows` rows that make up `heads` x `lanes`, lanes of a head in order.
template <class Body>
void for_slabs(index_t heads, index_t lanes, index_t rows, const Body& body) {
  if (heads <= 0 || lanes <= 0) return;
  const index_t lanes_at_once = lanes < rows ? lanes : rows;
  const index_t heads_at_once = lanes_at_once < lanes ? 1 : rows / lanes;
  for (index_t head = 0; head < heads; head += heads_at_once) {
    for (index_t lane = 0; lane < lanes; lane += lanes_at_once) {
      body(lane_slab{head, heads_at_once < heads - head ? heads_at_once : heads - head, lane,
                     lanes_at_once < lanes - lane ? lanes_at_once : lanes - lane});
    }
  }
}

}  // namespace restkv::on_thrust
