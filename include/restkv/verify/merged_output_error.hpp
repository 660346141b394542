// SPDX-License-Identifier: Apache-2.0
/// @file
/// `merged_output_error`: what a compacted cache costs whose entries were changed, by merging or otherwise.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/merge/merged_cache.hpp>
#include <restkv/merge/running_attention.hpp>
#include <restkv/verify/future_error.hpp>

#include <atomic>
#include <memory>
#include <new>
#include <vector>

namespace restkv {

namespace detail {
template <class Backend, class KeyLayout, class ValueLayout, element T>
class merged_error_computation;
}  // namespace detail

/// The cost of a changed cache for each query: per head and for the layer. Owns its numbers, all double. Movable.
///
/// Row i belongs to the i-th of the last `queries()` queries, oldest first. A sequence with fewer tokens than that has
/// only its last rows; the others are 0 everywhere and count nowhere.
class merged_output_errors {
 public:
  merged_output_errors() = default;

  /// ||o' - o||. [batch, query_heads, queries]
  [[nodiscard]] tensor_view<const double, 3> head() const noexcept {
    return {head_.data(), {batch_, heads_, queries_}};
  }
  /// ||o||. [batch, query_heads, queries]
  [[nodiscard]] tensor_view<const double, 3> head_output_norm() const noexcept {
    return {head_norm_.data(), {batch_, heads_, queries_}};
  }
  /// ||sum_h W[h] (o'_h - o_h)||; without W_O the norm of the concatenated heads' change. [batch, queries]
  [[nodiscard]] tensor_view<const double, 2> layer() const noexcept { return {layer_.data(), {batch_, queries_}}; }
  /// ||sum_h W[h] o_h||; without W_O the norm of the concatenated heads' output. [batch, queries]
  [[nodiscard]] tensor_view<const double, 2> layer_output_norm() const noexcept {
    return {layer_norm_.data(), {batch_, queries_}};
  }
  /// Rows of each table.
  [[nodiscard]] index_t queries() const noexcept { return queries_; }

  /// sqrt(sum layer^2 / sum layer_output_norm^2) over all rows of all sequences. 0 where nothing changed; infinity
  /// where something did and the output is 0.
  [[nodiscard]] double mean_relative() const noexcept { return relative(layer_, layer_norm_); }
  /// The same over one query head alone: sqrt(sum head^2 / sum head_output_norm^2).
  [[nodiscard]] double mean_relative(index_t h) const noexcept {
    std::vector<double> error;
    std::vector<double> norm;
    for (index_t b = 0; b < batch_; ++b) {
      for (index_t i = 0; i < queries_; ++i) {
        error.push_back(head()(b, h, i));
        norm.push_back(head_output_norm()(b, h, i));
      }
    }
    return relative(error, norm);
  }

 private:
  template <class Backend, class KeyLayout, class ValueLayout, element T>
  friend class detail::merged_error_computation;

  merged_output_errors(index_t batch, index_t heads, index_t queries)
      : batch_(batch),
        heads_(heads),
        queries_(queries),
        head_(static_cast<std::size_t>(batch * heads * queries)),
        head_norm_(head_.size()),
        layer_(static_cast<std::size_t>(batch * queries)),
        layer_norm_(layer_.size()) {}

  [[nodiscard]] static double relative(const std::vector<double>& error, const std::vector<double>& norm) noexcept {
    double error_square = 0;
    double norm_square = 0;
    for (const double x : error) error_square += x * x;
    for (const double x : norm) norm_square += x * x;
    if (error_square == 0) return 0;
    return norm_square == 0 ? std::numeric_limits<double>::infinity() : std::sqrt(error_square / norm_square);
  }

  index_t batch_ = 0;
  index_t heads_ = 0;
  index_t queries_ = 0;
  std::vector<double> head_;
  std::vector<double> head_norm_;
  std::vector<double> layer_;
  std::vector<double> layer_norm_;
};

namespace detail {

/// The steps of `merged_output_error`, for arguments that have been checked.
template <class Backend, class KeyLayout, class ValueLayout, element T>
class merged_error_computation {
 public:
  merged_error_computation(Backend& backend, const merged_cache<KeyLayout, ValueLayout>& cache,
                           const layer_view<T>& layer, index_t tokens, index_t queries)
      : backend_(backend),
        cache_(cache),
        layer_(layer),
        shape_(shape_of(layer)),
        tokens_(tokens),
        made_(shape_.batch, shape_.query_heads, queries),
        changes_(static_cast<std::size_t>(shape_.batch * queries * shape_.query_heads * shape_.head_dim)),
        outputs_(changes_.size()) {}

  [[nodiscard]] status run(merged_output_errors& out) {
    std::atomic<bool> complete{true};
    backend_.parallel_for(shape_.batch * shape_.query_heads, [&](index_t task) {
      if (!attend(task / shape_.query_heads, task % shape_.query_heads)) complete = false;
    });
    if (!complete) {
      return status::error(errc::workspace_too_small, "no memory to verify %lld queries of %lld channels",
                           static_cast<long long>(made_.queries_), static_cast<long long>(shape_.head_dim));
    }
    backend_.parallel_for(shape_.batch * made_.queries_, [&](index_t task) { sum_heads(task); });
    out = std::move(made_);
    return {};
  }

 private:
  [[nodiscard]] std::size_t vector_of(index_t b, index_t row, index_t h) const noexcept {
    return static_cast<std::size_t>(((b * made_.queries_ + row) * shape_.query_heads + h) * shape_.head_dim);
  }

  [[nodiscard]] bool attend(index_t b, index_t h) {
    const index_t d = shape_.head_dim;
    const index_t rows = std::min(made_.queries_, shortest_head(layer_, b));
    const index_t missing = made_.queries_ - rows;
    const index_t kv_head = h / shape_.group();
    const index_t kept_head = h / (shape_.query_heads / cache_.kept.heads());
    const sequence_span span = sequence(layer_, b, kv_head);
    const index_t end = span.begin + span.length;
    const std::unique_ptr<double[]> memory(new (std::nothrow)
                                               double[static_cast<std::size_t>((2 * rows + 2) * d + 2 * rows)]);
    if (memory == nullptr) return false;
    double* const key = memory.get();
    double* const value = key + d;
    running_attention sums(d, rows, value + d, value + (1 + rows) * d);
    const auto queries = window_queries(layer_, b, h, rows);
    for (index_t i = 0; i < rows; ++i) widen_row(queries[i], sums.query(i));
    const auto add = [&](index_t position, const auto& key_row, const auto& value_row) {
      widen_row(key_row, key);
      widen_row(value_row, value);
      for (index_t i = 0; i < rows; ++i) {
        if (position < end - rows + i + 1) sums.add(i, key, value);
      }
    };
    sums.clear(rows);
    for_each_token(layer_, b, kv_head, span.begin, end, add);
    for (index_t i = 0; i < rows; ++i) sums.output(i, outputs_.data() + vector_of(b, missing + i, h));
    sums.clear(rows);
    for (index_t n = 0; n < cache_.length(b, kept_head); ++n) {
      const index_t position = n < cache_.kept.lengths(b, kept_head) ? cache_.kept.positions(b, kept_head, n) : -1;
      add(position, cache_.key.row(b, kept_head, n), cache_.value.row(b, kept_head, n));
    }
    for_each_token(layer_, b, kv_head, std::max(span.begin, tokens_), end, add);
    for (index_t i = 0; i < rows; ++i) {
      double* const change = changes_.data() + vector_of(b, missing + i, h);
      const double* const output = outputs_.data() + vector_of(b, missing + i, h);
      sums.output(i, change);
      for (index_t c = 0; c < d; ++c) change[c] -= output[c];
      const auto at = static_cast<std::size_t>((b * shape_.query_heads + h) * made_.queries_ + missing + i);
      made_.head_[at] = std::sqrt(restkv::squared_norm(change, d));
      made_.head_norm_[at] = std::sqrt(restkv::squared_norm(output, d));
    }
    return true;
  }

  void sum_heads(index_t task) noexcept {
    const index_t width = shape_.query_heads * shape_.head_dim;
    const double* const change = changes_.data() + task * width;
    const double* const output = outputs_.data() + task * width;
    double error = 0;
    double norm = 0;
    if (layer_.projection.data == nullptr) {
      error = restkv::squared_norm(change, width);
      norm = restkv::squared_norm(output, width);
    } else {
      for (index_t i = 0; i < layer_.projection.extent(0); ++i) {
        double of_change = 0;
        double of_output = 0;
        for (index_t c = 0; c < width; ++c) {
          const double weight = widen<double>(layer_.projection(i, c));
          of_change += weight * change[c];
          of_output += weight * output[c];
        }
        error += of_change * of_change;
        norm += of_output * of_output;
      }
    }
    made_.layer_[static_cast<std::size_t>(task)] = std::sqrt(error);
    made_.layer_norm_[static_cast<std::size_t>(task)] = std::sqrt(norm);
  }

  Backend& backend_;
  const merged_cache<KeyLayout, ValueLayout> cache_;
  const layer_view<T> layer_;
  problem_shape shape_;
  index_t tokens_;
  merged_output_errors made_;
  std::vector<double> changes_;  // [batch, queries, query_heads, head_dim]
  std::vector<double> outputs_;  // [batch, queries, query_heads, head_dim]
};

template <class KeyLayout, class ValueLayout, element T>
[[nodiscard]] status check_merged_error(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer,
                                        index_t tokens, index_t queries) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (queries < 0 || queries > layer.query.extent(2)) {
    return status::error(errc::invalid_argument, "%lld queries are to be verified, query has %lld rows", ll(queries),
                         ll(layer.query.extent(2)));
  }
  return check_merged(cache, layer, tokens, std::max<index_t>(queries, 1));
}

}  // namespace detail

/// Computes what a changed cache costs the last `queries` rows of layer.query (0: all of them), in double throughout:
/// the attention over the entries as they are stored against that over all tokens of the layer, per query head, and
/// summed over the heads through layer.projection where there is one. A head that sees no entry has the output 0.
///
/// `layer` is what was compacted. For an unchanged cache the numbers are those of `output_error`. Elements that are not
/// finite give numbers that are not. The result does not depend on the number of threads.
///
/// Errors, with nothing changed in `out`: a kept set or cache that does not fit the layer, more queries than rows, a
/// W_O of another width, working memory that cannot be had. The tables come from std::vector, which throws
/// std::bad_alloc.
///
/// Cost: 2 d multiply-adds and an exponential for each query, head and token or entry; with W_O 2 hidden d a head and
/// query.
template <tensor_backend Backend, detail::element_layout KeyLayout, detail::element_layout ValueLayout, element T>
[[nodiscard]] status merged_output_error(Backend& backend, const merged_cache<KeyLayout, ValueLayout>& cache,
                                         const layer_view<T>& layer, merged_output_errors& out, index_t queries = 0) {
  if (queries == 0) queries = layer.query.extent(2);
  const index_t tokens = layer.key.extent(2);
  RESTKV_RETURN_IF_FAILED(detail::check_merged_error(cache, layer, tokens, queries));
  return detail::merged_error_computation<Backend, KeyLayout, ValueLayout, T>(backend, cache, layer, tokens, queries)
      .run(out);
}

/// The same for the queries of `future` against the cache of `prompt` followed by the future tokens, none of which is
/// evicted; compare `future_error`. prompt.query is not looked at.
///
/// Errors: those of `merged_output_error`; sequences with lengths of their own (errc::unsupported).
template <tensor_backend Backend, detail::element_layout KeyLayout, detail::element_layout ValueLayout, element T>
[[nodiscard]] status merged_future_error(Backend& backend, const merged_cache<KeyLayout, ValueLayout>& cache,
                                         const layer_view<T>& prompt, const future_view<T>& future,
                                         merged_output_errors& out) {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const index_t tokens = prompt.key.extent(2);
  const index_t more = future.key.extent(2);
  if (prompt.lengths.data != nullptr || prompt.head_lengths.data != nullptr) {
    return status::error(errc::unsupported, "%lld sequences have lengths of their own, in %lld tokens: not supported",
                         ll(prompt.key.extent(0)), ll(tokens));
  }
  detail::layer_with_future<T> whole;
  RESTKV_RETURN_IF_FAILED(whole.join(prompt, future));
  RESTKV_RETURN_IF_FAILED(detail::check_merged_error(cache, whole.view, tokens, more));
  return detail::merged_error_computation<Backend, KeyLayout, ValueLayout, T>(backend, cache, whole.view, tokens, more)
      .run(out);
}

}  // namespace restkv
