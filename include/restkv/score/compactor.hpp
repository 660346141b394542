// SPDX-License-Identifier: Apache-2.0
/// @file
/// `non_causal_attention`, the attention within chunks of a prompt regardless of order, and `compactor`, which blends
/// it with leverage.
#pragma once

#include <restkv/core/check_view.hpp>
#include <restkv/core/scratch.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>
#include <restkv/score/leverage_score.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv {

/// Non-causal attention (Compactor, arXiv 2507.08143). The prompt is cut into chunks; within a chunk every query sees
/// every key, later ones too: A[t, n] = softmax over the chunk's n of q[t] k[n], not divided by sqrt(d), as the release
/// has it. score = ||v|| times the sum of A[t, n] over the chunk's t, mean over the KV head's query heads. The release
/// averages over 3 neighbours afterwards: spatial `average_pool` of width 3.
///
/// The first `sink` and the last `recent` tokens are left out; they get the largest score of the others: protect them.
/// Tokens whose key or value is not finite score NaN and are left out of every softmax; queries that are not finite
/// count 0. Ties go to the smaller index. Cost: chunk d multiply-adds a token and query head; scratch of chunk (d + 3)
/// elements.
template <element Query = float>
struct non_causal_attention {
  tensor_view<const Query, 4> query{};  ///< every query, after RoPE. [batch, query_heads, tokens, head_dim]
  index_t chunk = 256;                  ///< tokens that see each other
  index_t sink = 0;                     ///< first tokens, left out
  index_t recent = 0;                   ///< last tokens, left out

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys | cache_part::values;

  [[nodiscard]] status check() const noexcept {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    if (chunk < 1 || chunk > std::numeric_limits<position_t>::max()) {
      return status::error(errc::invalid_argument, "chunk of non_causal_attention is %lld, must be within [1, %lld]",
                           ll(chunk), ll(std::numeric_limits<position_t>::max()));
    }
    if (sink >= 0 && recent >= 0) return {};
    return status::error(errc::invalid_argument,
                         "non_causal_attention leaves out %lld sinks and %lld recent tokens: neither may be negative",
                         ll(sink), ll(recent));
  }

  [[nodiscard]] status check(const problem_shape& shape) const noexcept {
    if (query.data == nullptr) return status::error(errc::missing_input, "non_causal_attention has no queries");
    const index_t wanted[] = {shape.batch, shape.query_heads, shape.tokens, shape.head_dim};
    const char* const axes[] = {"sequences", "heads", "rows", "channels"};
    for (std::size_t axis = 0; axis < 4; ++axis) {
      // A layer may have fewer tokens than its plan.
      if (query.extent(axis) == wanted[axis] || (axis == 2 && query.extent(axis) > wanted[axis])) continue;
      return status::error(errc::shape_mismatch, "query of non_causal_attention has %lld %s, the plan has %lld",
                           static_cast<long long>(query.extent(axis)), axes[axis],
                           static_cast<long long>(wanted[axis]));
    }
    return detail::check_view("query", query);
  }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept {
    const index_t most = std::min(chunk, shape.tokens);
    return scratch_of_doubles(most) + most * (shape.head_dim + 1) + shape.head_dim;
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const auto [first, end] = tokens(head.length());
    score_tokens(head, scores, scratch);
    Real most = 0;
    for (index_t n = first; n < end; ++n) most = std::max(most, scores[static_cast<std::size_t>(n)]);
    std::fill(scores.begin(), scores.begin() + first, most);
    std::fill(scores.begin() + end, scores.begin() + head.length(), most);
  }
  ///@}

  /// The tokens that are scored, of a head of `length`: from the first on, up to but not the second.
  struct token_range {
    index_t begin;  ///< the first
    index_t end;    ///< one behind the last
  };
  /// What `sink` and `recent` leave of a head.
  [[nodiscard]] constexpr token_range tokens(index_t length) const noexcept {
    const index_t begin = std::min(sink, length);
    return {begin, std::max(begin, length - recent)};
  }

  /// The scores of `tokens(length)`; those of the rest stay as they are.
  template <element T, std::floating_point Real>
  void score_tokens(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const index_t channels = head.head_dim();
    const index_t group = head.shape().group();
    const auto [first, end] = tokens(head.length());
    const index_t most = std::min(chunk, end - first);
    scratch_rows<Real> memory(scratch);
    double* const received = memory.take_doubles(most);
    Real* const keys = memory.take(most * channels);
    Real* const weights = memory.take(most);
    const std::span<Real> row(memory.take(channels), static_cast<std::size_t>(channels));
    constexpr Real none = std::numeric_limits<Real>::quiet_NaN();
    for (index_t from = first; from < end; from += most) {
      const index_t count = std::min(most, end - from);
      for (index_t i = 0; i < count; ++i) {
        Real* const key = keys + i * channels;
        head.key(from + i, std::span(key, row.size()));
        received[i] = 0;
        Real& score = scores[static_cast<std::size_t>(from + i)];
        head.value(from + i, row);
        const double length = norm(row.data(), channels);
        const bool counts = length <= std::numeric_limits<double>::max() && all_finite(key, channels);
        score = counts ? static_cast<Real>(length) : none;
      }
      for (index_t j = 0; j < group; ++j) {
        for (index_t t = 0; t < count; ++t) {
          read_query(head, head.kv_head() * group + j, from + t, row);
          if (!all_finite(row.data(), channels)) continue;
          attend(row.data(), keys, scores.data() + from, count, channels, weights, received);
        }
      }
      for (index_t i = 0; i < count; ++i) {
        Real& score = scores[static_cast<std::size_t>(from + i)];
        score = static_cast<Real>(static_cast<double>(score) * received[i] / static_cast<double>(group));
      }
    }
  }

 private:
  template <element T, std::floating_point Real>
  void read_query(const head_view<T>& head, index_t query_head, index_t n, std::span<Real> out) const noexcept {
    const index_t begin = sequence(head.layer(), head.batch(), head.kv_head()).begin;
    widen_row(query[head.batch()][query_head][begin + n], out.data());
  }

  /// Adds one query's attention to `received`. A token counts where norms[i] is a number.
  template <std::floating_point Real>
  static void attend(const Real* query_row, const Real* keys, const Real* norms, index_t count, index_t channels,
                     Real* weights, double* received) noexcept {
    constexpr Real most = std::numeric_limits<Real>::max();
    Real largest = -most;
    for (index_t i = 0; i < count; ++i) {
      const Real logit = dot(query_row, keys + i * channels, channels);
      weights[i] = logit >= -most ? std::min(logit, most) : -most;
      if (norms[i] == norms[i] && weights[i] > largest) largest = weights[i];
    }
    double sum = 0;
    for (index_t i = 0; i < count; ++i) {
      weights[i] = norms[i] == norms[i] ? std::exp(weights[i] - largest) : Real(0);
      sum += static_cast<double>(weights[i]);
    }
    if (!(sum > 0)) return;
    for (index_t i = 0; i < count; ++i) received[i] += static_cast<double>(weights[i]) / sum;
  }
};

/// Compactor (arXiv 2507.08143): score = blending z(leverage of the keys) + z(non-causal attention, averaged over 3
/// neighbours), over the tokens that are neither sinks nor recent; z subtracts the mean and divides by the standard
/// deviation. The release takes mean and deviation over all heads of a layer, here they are the head's own; and it
/// blends with the part of the cache that is evicted, 0.35 where that is not known.
///
/// Sinks and recent tokens get the largest score of the others, or 0: protect them. A token that is NaN in either score
/// is NaN, and counts 0 for its neighbours. Cost: both scores'.
template <element Query = float>
struct compactor {
  non_causal_attention<Query> attention{.sink = 8, .recent = 4};  ///< with every query of the prompt
  leverage_score leverage{};                                      ///< of the same tokens
  double blending = 0.35;                                         ///< weight of the leverage

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::keys | cache_part::values;

  [[nodiscard]] status check() const noexcept {
    RESTKV_RETURN_IF_FAILED(attention.check());
    RESTKV_RETURN_IF_FAILED(leverage.check());
    if (blending >= 0 && std::isfinite(blending)) return {};
    return status::error(errc::invalid_argument, "blending of compactor is %g, must be at least 0 and finite",
                         blending);
  }
  [[nodiscard]] status check(const problem_shape& shape) const noexcept { return attention.check(shape); }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept {
    return shape.tokens + std::max(attention.scratch_size(shape), leverage.scratch_size(shape));
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const auto [first, end] = attention.tokens(head.length());
    const std::span<Real> attended = scratch.first(static_cast<std::size_t>(head.length()));
    const std::span<Real> rest = scratch.subspan(attended.size());
    attention.score_tokens(head, attended, rest);
    leverage.score_tokens(head, first, end, scores, rest);
    const auto part = [begin = first, stop = end](std::span<Real> row) {
      return row.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(stop - begin));
    };
    average(part(attended));
    detail::standardise(part(attended));
    detail::standardise(part(scores));
    Real most = std::numeric_limits<Real>::lowest();
    for (index_t n = first; n < end; ++n) {
      Real& score = scores[static_cast<std::size_t>(n)];
      score = static_cast<Real>(blending * static_cast<double>(score) +
                                static_cast<double>(attended[static_cast<std::size_t>(n)]));
      most = std::max(most, score);
    }
    if (most == std::numeric_limits<Real>::lowest()) most = 0;  // no other is a number
    std::fill(scores.begin(), scores.begin() + first, most);
    std::fill(scores.begin() + end, scores.begin() + head.length(), most);
  }
  ///@}

 private:
  /// The mean of 3 neighbours, always divided by 3; what is NaN or lies outside counts 0 there.
  template <std::floating_point Real>
  static void average(std::span<Real> row) noexcept {
    const auto value = [](Real x) { return x == x ? x : Real(0); };
    Real before = 0;
    for (std::size_t n = 0; n < row.size(); ++n) {
      const Real here = row[n];
      const Real after = n + 1 < row.size() ? value(row[n + 1]) : Real(0);
      if (here == here) row[n] = (before + here + after) / 3;
      before = value(here);
    }
  }
};

}  // namespace restkv
