// SPDX-License-Identifier: Apache-2.0
/// @file
/// What the attention kernels are handed: a layer in the executor's memory, and where each head's sequence lies in it.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/kernel/bulk_loops.hpp>
#include <restkv/kernel/group.hpp>

#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

namespace restkv::kernel {

/// What may be tuned without changing a kept set: sums are split at these places, always alike for one plan, so a
/// change moves scores by rounding only.
struct attention_tuning {
  index_t split_tokens = 1024;  ///< tokens that one block observes at least, a multiple of `token_tile`
  index_t most_splits = 32;     ///< of a sequence: longer sequences have longer splits
};

/// Tokens of a tile, the unit in which every kernel reads a cache.
inline constexpr int token_tile = 64;

/// f(integral_constant<int, 0>) .. f(integral_constant<int, N - 1>): a loop that is certainly unrolled, so that what it
/// indexes may lie in registers.
template <int N, int Index = 0, class F>
RESTKV_HD constexpr void unrolled(const F& f) {
  if constexpr (Index < N) {
    f(std::integral_constant<int, Index>{});
    unrolled<N, Index + 1>(f);
  }
}

/// The tokens of a tile: `token_tile` that follow each other, or those of a list.
struct tile_tokens {
  static constexpr index_t none = std::numeric_limits<position_t>::max();  ///< behind every token there is

  index_t first = 0;                   ///< where there is no list
  const position_t* listed = nullptr;  ///< [count]
  index_t count = 0;                   ///< of the list

  RESTKV_HD constexpr tile_tokens(index_t first_token) noexcept
      : first(first_token) {}  // NOLINT(google-explicit-constructor)
  RESTKV_HD constexpr tile_tokens(const position_t* list, index_t tokens) noexcept : listed(list), count(tokens) {}

  /// Token t of the tile, t in [0, token_tile).
  [[nodiscard]] RESTKV_HD constexpr index_t operator[](index_t t) const noexcept {
    if (listed == nullptr) return first + t;
    return t < count ? listed[t] : none;
  }
};

/// In place of an element type: numbers T that lie in a cache as codes, with parameters of type Scale; see
/// coded_rows.hpp.
template <element T, element Scale>
struct coded {};

/// The type that `number_of` names.
template <class T>
struct number_trait {
  using type = T;
};
template <class T, class Scale>
struct number_trait<coded<T, Scale>> {
  using type = T;
};

/// What a kernel computes with where keys and values are of type T: T, or the numbers that codes stand for.
template <class T>
using number_of = typename number_trait<T>::type;

/// The type that `cached_as` names.
template <class T, class Caches>
struct cached_trait {
  using type = T;
};

/// The type of keys and values of a layer of T that lie in `Caches`.
template <class T, class Caches>
using cached_as = typename cached_trait<T, Caches>::type;

/// The types that a cache may be of.
template <class T>
concept cached = element<number_of<T>>;

/// One token's channels.
template <cached T>
struct token_row {
  const T* data = nullptr;
  index_t stride = 1;

  /// False of a row that stands for zeros.
  [[nodiscard]] RESTKV_HD bool exists() const noexcept { return data != nullptr; }
  /// Channel c as it is stored.
  [[nodiscard]] RESTKV_HD T number(index_t c) const noexcept { return data[c * stride]; }
  [[nodiscard]] RESTKV_HD float operator[](index_t c) const noexcept { return widen<float>(number(c)); }
  /// The channels from c on, of a row that exists.
  [[nodiscard]] RESTKV_HD token_row from(index_t c) const noexcept { return {data + c * stride, stride}; }
  /// True where its first 16 bytes may be read at once.
  [[nodiscard]] RESTKV_HD bool whole() const noexcept {
    return stride == 1 && std::bit_cast<std::uintptr_t>(data) % 16 == 0;
  }
};

/// A cache tensor, [batch, kv_heads, tokens, head_dim], in one piece or a few.
template <cached T>
struct token_chunks {
  static constexpr int most = 8;

  const T* data[most] = {};
  index_t end[most] = {};         ///< token behind the chunk
  index_t strides[most][4] = {};  ///< of batch, head, token, channel
  int count = 0;

  /// The row of a token that exists.
  [[nodiscard]] RESTKV_HD token_row<T> row(index_t batch, index_t head, index_t token) const noexcept {
    int i = 0;
    index_t begin = 0;
    while (i + 1 < count && token >= end[i]) begin = end[i++];
    const index_t* const step = strides[i];
    return {data[i] + batch * step[0] + head * step[1] + (token - begin) * step[2], step[3]};
  }

  /// Refuses tensors in more than `most` pieces that are not empty.
  template <memory_space Space>
  [[nodiscard]] status assign(const char* name, const chunked_tensor_view<const T, Space>& cache) noexcept {
    index_t tokens = 0;
    count = 0;
    for (index_t i = 0; i < cache.chunks(); ++i) {
      const auto& part = cache.chunk(i);
      if (part.extents[2] == 0) continue;
      if (count == most) {
        return status::error(errc::unsupported, "%s lies in %lld chunks, the kernels read at most %d", name,
                             static_cast<long long>(cache.chunks()), most);
      }
      tokens += part.extents[2];
      data[count] = part.data;
      end[count] = tokens;
      for (std::size_t axis = 0; axis < 4; ++axis) strides[count][axis] = part.strides[axis];
      ++count;
    }
    return {};
  }
};

/// Where one KV head's sequence lies.
struct head_span {
  position_t begin = 0;      ///< first token on the token axis
  position_t length = 0;     ///< tokens
  position_t first_row = 0;  ///< row of the query tensor with the oldest query of the window
};

/// The logit of a token that a query does not see.
inline constexpr float masked_logit = std::numeric_limits<float>::lowest();
/// The largest logit, and the smallest less its sign: that of a product that is not a number.
inline constexpr float most_logit = std::numeric_limits<float>::max() / 2;
/// restkv::least_rest in float.
inline constexpr auto least_rest = static_cast<float>(restkv::least_rest);
/// The root of the largest float: what a distance counts as whose square is infinite.
inline constexpr float most_distance = 1.8446743e19f;

/// A distance, at most most_distance; NaN stays NaN.
[[nodiscard]] RESTKV_HD constexpr float finite_distance(float x) noexcept {
  if (x > most_distance) return most_distance;
  return x;
}

/// The root of a square: at most most_distance; NaN stays NaN.
[[nodiscard]] RESTKV_HD inline float root(float square) noexcept { return finite_distance(std::sqrt(square)); }

/// A layer and the queries that observe it. A *lane* is one query of one query head; the lanes of a KV head are those
/// of its query heads, one head behind the other: lane j * queries + i is query i of head j.
template <cached T>
struct attention_problem {
  const number_of<T>* query = nullptr;  ///< [batch, query_heads, rows, head_dim]
  index_t query_strides[4] = {};
  token_chunks<T> key;
  token_chunks<T> value;
  const head_span* spans = nullptr;  ///< [batch, kv_heads]
  logit_perturbation perturbation{};
  bool perturbed = false;  ///< whether `perturbation` is active
  float logit_scale = 1;   ///< 1 / sqrt(head_dim)
  index_t batch = 0;
  index_t query_heads = 0;
  index_t kv_heads = 0;
  index_t head_dim = 0;
  index_t layer = 0;
  index_t window = 0;       ///< of the request
  index_t first_query = 0;  ///< first query of the window that is a lane
  index_t queries = 0;      ///< lanes of a head
  index_t split_tokens = 0;
  index_t splits = 0;
  bool past_only = true;  ///< whether scores end where the window begins

  [[nodiscard]] RESTKV_HD index_t group() const noexcept { return query_heads / kv_heads; }
  [[nodiscard]] RESTKV_HD index_t lanes() const noexcept { return group() * queries; }
  [[nodiscard]] RESTKV_HD const head_span& span(index_t b, index_t kv_head) const noexcept {
    return spans[b * kv_heads + kv_head];
  }
  [[nodiscard]] RESTKV_HD index_t window_of(const head_span& span) const noexcept {
    return span.length < window ? span.length : window;
  }
  /// Tokens that have a score.
  [[nodiscard]] RESTKV_HD index_t past_of(const head_span& span) const noexcept {
    return past_only ? span.length - window_of(span) : span.length;
  }
  /// Tokens that query `i` of the lanes sees; 0 where the window has no such query.
  [[nodiscard]] RESTKV_HD index_t visible(const head_span& span, index_t i) const noexcept {
    const index_t observed = window_of(span);
    return first_query + i < observed ? span.length - observed + first_query + i + 1 : 0;
  }
  /// Tokens that the newest of the lanes sees, and so all that any of them does.
  [[nodiscard]] RESTKV_HD index_t seen_by_any(const head_span& span) const noexcept {
    const index_t observed = window_of(span);
    const index_t last = first_query + queries < observed ? first_query + queries : observed;
    return last > first_query ? span.length - observed + last : 0;
  }
  /// Where the state of a KV head's lanes begins.
  [[nodiscard]] RESTKV_HD index_t first_lane(index_t b, index_t kv_head) const noexcept {
    return (b * kv_heads + kv_head) * lanes();
  }
  /// A logit that is not a number counts as the lowest, so that a damaged key gets no attention and spoils nobody
  /// else's.
  [[nodiscard]] RESTKV_HD static float finite_logit(float x) noexcept {
    if (x != x) return -most_logit;
    if (x > most_logit) return most_logit;
    if (x < -most_logit) return -most_logit;
    return x;
  }
  /// What a score is told of a token of a query head before any feature.
  [[nodiscard]] RESTKV_HD token_features<float> features(const head_span& span, index_t b, index_t head,
                                                         index_t n) const noexcept {
    token_features<float> f;
    f.position = n;
    f.length = span.length;
    f.batch = b;
    f.head = head;
    f.layer = layer;
    return f;
  }
  /// The logit of a product of a query and a key.
  [[nodiscard]] RESTKV_HD float logit(float product, index_t b, index_t kv_head, int lane, index_t position,
                                      index_t token) const noexcept {
    const float x = finite_logit(product * logit_scale);
    if (!perturbed) return x;
    return finite_logit(perturbation(x, b, kv_head * group() + lane / static_cast<int>(queries), position, token));
  }
};

/// Where a block works that takes one query head and a part of its tokens. Blocks: [batch, query_heads, parts].
template <cached T>
struct head_block {
  index_t part;  ///< a tile, or a split, of the tokens
  index_t row;   ///< [batch, query_heads]
  index_t b;
  index_t head;
  index_t kv_head;
  index_t head_lane;  ///< the head's first lane among the KV head's
  index_t past;
  head_span span;

  RESTKV_HD head_block(const attention_problem<T>& problem, index_t block, index_t parts) noexcept {
    part = block % parts;
    row = block / parts;
    b = row / problem.query_heads;
    head = row % problem.query_heads;
    kv_head = head / problem.group();
    head_lane = head % problem.group() * problem.queries;
    span = problem.span(b, kv_head);
    past = problem.past_of(span);
  }
};

/// What the lanes know after the softmax.
struct lane_softmax {
  float largest = 0;       ///< largest logit; the largest of the others where the rest would fall below least_rest
  float scale = 0;         ///< a = min(exp(logit - largest) scale, 1)
  float rest = 0;          ///< sum over the other tokens of exp(logit - largest): a[top] = 1 / (1 + rest)
  float second = 0;        ///< largest logit of the others
  float second_scale = 0;  ///< the others' a = exp(logit - second) second_scale
  position_t top = -1;     ///< the token with the largest logit, the first of equals; -1: the query sees nothing

  [[nodiscard]] RESTKV_HD float share(float logit) const noexcept {
    const float a = std::exp(logit - largest) * scale;
    return a < 1.0f ? a : 1.0f;
  }
  /// rest, but never so small that odds are infinite.
  [[nodiscard]] RESTKV_HD float bounded_rest() const noexcept { return rest > least_rest ? rest : least_rest; }
};

/// Fills in everything of a problem but its lanes and tables. `caches` has `key` and `value`: the layer itself, or what
/// they lie in as codes.
template <class Request, element T, memory_space S, class Caches>
[[nodiscard]] status make_problem(const Request& request, const layer_view<T, S>& layer, const Caches& caches,
                                  attention_problem<cached_as<T, Caches>>& problem) noexcept {
  problem = {};
  problem.query = layer.query.data;
  for (std::size_t axis = 0; axis < 4; ++axis) problem.query_strides[axis] = layer.query.strides[axis];
  RESTKV_RETURN_IF_FAILED(problem.key.assign("key", caches.key));
  RESTKV_RETURN_IF_FAILED(problem.value.assign("value", caches.value));
  problem.perturbation = perturbation_of(request.score);
  problem.perturbed = problem.perturbation.active();
  problem.logit_scale = 1.0f / std::sqrt(static_cast<float>(request.shape.head_dim));
  problem.batch = request.shape.batch;
  problem.query_heads = request.shape.query_heads;
  problem.kv_heads = request.shape.kv_heads;
  problem.head_dim = request.shape.head_dim;
  problem.layer = request.shape.layer;
  problem.window = request.window;
  problem.past_only = !scores_window<std::remove_cvref_t<decltype(request.score)>>();
  return {};
}

/// Uploads where the heads' sequences lie, [batch, kv_heads].
template <class Executor, class Request, element T, memory_space S>
void upload_spans(Executor& executor, const Request& request, const layer_view<T, S>& layer, head_span* to) {
  upload_table(executor, to, request.shape.batch * request.shape.kv_heads, [&](index_t i) {
    const index_t b = i / request.shape.kv_heads;
    const sequence_span span = sequence(layer, b, i % request.shape.kv_heads);
    const index_t row = request.window > 0 ? first_window_row(layer, b, request.window_of(span.length)) : 0;
    return head_span{static_cast<position_t>(span.begin), static_cast<position_t>(span.length),
                     static_cast<position_t>(row)};
  });
}

}  // namespace restkv::kernel
