// SPDX-License-Identifier: Apache-2.0
/// @file
/// Scores of a whole head at once, from its cache: the `head_score` concept, and the view such a score reads.
///
/// A `token_score` sees one token under one query. What compares the tokens of a head with each other, the mean key or the
/// channel's range in a chunk, is a head score: one call for each head of each sequence, which fills a row.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/score/features.hpp>

#include <concepts>
#include <span>

namespace restkv {

/// What a head score reads of a layer.
enum class cache_part : unsigned {
  none = 0,
  keys = 1u << 0,
  values = 1u << 1,
};

/// Both parts together.
[[nodiscard]] constexpr cache_part operator|(cache_part a, cache_part b) noexcept {
  return static_cast<cache_part>(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}

/// True when `set` holds at least one of the parts in `wanted`.
[[nodiscard]] constexpr bool has(cache_part set, cache_part wanted) noexcept {
  return (static_cast<unsigned>(set) & static_cast<unsigned>(wanted)) != 0;
}

/// One head of one sequence's cache. Tokens are counted from the beginning of the sequence.
template <element T>
class head_view {
 public:
  /// The cache of `query_head`'s KV head.
  constexpr head_view(const layer_view<T>& layer, const problem_shape& shape, index_t batch, index_t query_head) noexcept
      : layer_(&layer), shape_(&shape), batch_(batch), query_head_(query_head), kv_head_(query_head / shape.group()),
        span_(sequence(layer, batch, kv_head_)) {}

  [[nodiscard]] constexpr const layer_view<T>& layer() const noexcept { return *layer_; }      ///< the whole layer
  [[nodiscard]] constexpr const problem_shape& shape() const noexcept { return *shape_; }      ///< the plan's
  [[nodiscard]] constexpr index_t batch() const noexcept { return batch_; }                    ///< sequence
  [[nodiscard]] constexpr index_t query_head() const noexcept { return query_head_; }          ///< or the group's first
  [[nodiscard]] constexpr index_t kv_head() const noexcept { return kv_head_; }                ///< of the cache
  [[nodiscard]] constexpr index_t length() const noexcept { return span_.length; }             ///< tokens
  [[nodiscard]] constexpr index_t head_dim() const noexcept { return layer_->key.extent(3); }  ///< channels

  /// Token n's key, widened into `out` [head_dim].
  template <std::floating_point Real>
  void key(index_t n, std::span<Real> out) const noexcept {
    read(layer_->key, n, out);
  }
  /// Token n's value, widened into `out` [head_dim].
  template <std::floating_point Real>
  void value(index_t n, std::span<Real> out) const noexcept {
    read(layer_->value, n, out);
  }

 private:
  template <std::floating_point Real>
  void read(const chunked_tensor_view<const T>& cache, index_t n, std::span<Real> out) const noexcept {
    const auto part = cache.from_token(span_.begin + n);
    widen_row(part[batch_][kv_head_][0], out.data());
  }

  const layer_view<T>* layer_;
  const problem_shape* shape_;
  index_t batch_;
  index_t query_head_;
  index_t kv_head_;
  sequence_span span_;
};

namespace detail {

template <class S>
concept has_constant_reads = requires { typename std::integral_constant<cache_part, S::reads>; };

template <class S, class Real>
concept scores_heads = requires(const S& score, const head_view<float>& head, std::span<Real> row) {
  score.score_head(head, row, row);
};

}  // namespace detail

/// A score of whole heads: `static constexpr cache_part reads`, and
///
///     template <restkv::element T, std::floating_point Real>
///     void score_head(const restkv::head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept;
///
/// which fills scores[n] for every token n of the head, for float and double. Larger is kept, NaN last. Every token is a
/// candidate: protect recent ones with `protection`. A policy's window and temporal smoother do not act.
///
/// Optional members: `index_t scratch_size(const problem_shape&) const`, the elements of `scratch` (default 0, not
/// initialised); `static constexpr bool per_query_head = true` for a score that differs between the query heads of a
/// KV head (one call for each, then the group reduction); `status check() const`; `status check(const problem_shape&)
/// const` for what must fit the model.
template <class S>
concept head_score = detail::has_constant_reads<S> && detail::scores_heads<S, float> && detail::scores_heads<S, double>;

/// What `eviction_policy::score` may be.
template <class S>
concept any_score = token_score<S> || head_score<S>;

/// True for a head score with a row of its own for each query head.
template <class S>
[[nodiscard]] constexpr bool scores_query_heads() noexcept {
  if constexpr (requires { { S::per_query_head } -> std::convertible_to<bool>; }) return S::per_query_head;
  return false;
}

/// Elements of scratch memory that one call of a head score needs.
template <class S>
[[nodiscard]] constexpr index_t scratch_size_of(const S& score, const problem_shape& shape) noexcept {
  if constexpr (requires { { score.scratch_size(shape) } -> std::convertible_to<index_t>; }) {
    return score.scratch_size(shape);
  }
  return 0;
}

/// True when the score needs W_O itself.
template <class S>
[[nodiscard]] constexpr bool needs_projection() noexcept {
  return has(features_of<S>(), feature::projected_norm_l1);
}

/// True when the score needs values.
template <class S>
[[nodiscard]] constexpr bool needs_values() noexcept {
  if constexpr (head_score<S>) return has(S::reads, cache_part::values);
  return has(features_of<S>(), value_features);
}

}  // namespace restkv
