// SPDX-License-Identifier: Apache-2.0
/// @file
/// `output_error`: what a kept set costs, exactly, and what a sum of single deletions would have predicted.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/selection/kept_tokens.hpp>
#include <restkv/verify/output_errors.hpp>
#include <restkv/verify/output_projection.hpp>
#include <restkv/verify/split_attention.hpp>

#include <atomic>
#include <vector>

namespace restkv {

namespace detail {

/// Refuses a matrix with an element that is not finite or out of the verifier's range.
template <class T>
[[nodiscard]] status check_elements(const char* name, const tensor_view<const T, 2>& matrix, double largest) noexcept {
  for (index_t r = 0; r < matrix.extent(0); ++r) {
    for (index_t c = 0; c < matrix.extent(1); ++c) {
      const double x = widen<double>(matrix(r, c));
      if (std::abs(x) <= largest) continue;
      return status::error(errc::invalid_argument, "%s holds %g at row %lld, column %lld: at most %g can be verified",
                           name, x, static_cast<long long>(r), static_cast<long long>(c), largest);
    }
  }
  return {};
}

/// First token of a sequence and head whose value cannot be verified, or -1.
template <element T>
[[nodiscard]] index_t find_bad_value(const layer_view<T>& layer, index_t b, index_t kv_head, double& bad) noexcept {
  const sequence_span span = sequence(layer, b, kv_head);
  for (index_t done = 0; done < span.length;) {
    const auto part = layer.value.from_token(span.begin + done);
    const index_t count = std::min(part.extent(2), span.length - done);
    for (index_t n = 0; n < count; ++n) {
      for (index_t c = 0; c < part.extent(3); ++c) {
        const double x = widen<double>(part(b, kv_head, n, c));
        if (std::abs(x) <= largest_verified_element) continue;
        bad = x;
        return span.begin + done + n;
      }
    }
    done += count;
  }
  return -1;
}

/// Everything about the arguments that does not need their values' elements.
template <element T>
[[nodiscard]] status check_verification(const const_kept_tokens& kept, const layer_view<T>& layer,
                                        index_t queries) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const problem_shape shape = shape_of(layer);
  if (layer.key.missing()) return status::error(errc::missing_input, "the layer has no key");
  RESTKV_RETURN_IF_FAILED(check_groups(shape.query_heads, shape.kv_heads));
  if (shape.head_dim < 1 || shape.head_dim > 4096) {
    return status::error(errc::invalid_argument, "head_dim is %lld, must be within [1, 4096]", ll(shape.head_dim));
  }
  if (queries < 0 || queries > layer.query.extent(2)) {
    return status::error(errc::invalid_argument, "%lld queries are to be verified, query has %lld rows", ll(queries),
                         ll(layer.query.extent(2)));
  }
  RESTKV_RETURN_IF_FAILED(check_layer(layer, shape, queries, true, true, !layer.metric.missing()));
  RESTKV_RETURN_IF_FAILED(check_kept(kept, shape.batch, shape.kv_heads, shape.tokens));
  if (shape.query_heads % kept.heads() != 0) {
    return status::error(errc::shape_mismatch,
                         "the kept set has %lld heads, query has %lld: query heads must be a multiple of them",
                         ll(kept.heads()), ll(shape.query_heads));
  }
  RESTKV_RETURN_IF_FAILED(check_kept_sequences(kept, layer));
  if (layer.projection.data != nullptr) {
    RESTKV_RETURN_IF_FAILED(check_projection_width(layer.projection, shape.query_heads, shape.head_dim));
    RESTKV_RETURN_IF_FAILED(check_elements("W_O", layer.projection, largest_verified_element));
  }
  if (!layer.metric.missing()) {
    for (index_t h = 0; h < shape.query_heads; ++h) {
      constexpr double largest = largest_verified_element * largest_verified_element * 1e10;
      RESTKV_RETURN_IF_FAILED(check_elements("layer.metric", layer.metric.gram[h], largest));
    }
  }
  return {};
}

/// The steps of `output_error`, for arguments that have been checked.
template <class Backend, element T>
class error_computation {
 public:
  /// `hidden`, unless it is null, gets what W_O makes of the heads' changes and outputs. [batch, queries, 2, hidden]
  error_computation(Backend& backend, const const_kept_tokens& kept, const layer_view<T>& layer, index_t queries,
                    double* hidden = nullptr)
      : backend_(backend),
        hidden_(hidden),
        kept_(kept),
        layer_(layer),
        shape_(shape_of(layer)),
        heads_(shape_.query_heads),
        width_(padded_channels(shape_.head_dim)),
        projected_(layer.projection.data != nullptr),
        in_metric_(projected_ || !layer.metric.missing()),
        made_(shape_.batch, heads_, queries) {
    made_.projected_ = projected_;
    made_.has_head_projected_ = in_metric_;
    for (index_t b = 0; b < shape_.batch; ++b) {
      made_.rows_[static_cast<std::size_t>(b)] = std::min(queries, shortest_head(layer, b));
    }
  }

  [[nodiscard]] status run(output_errors& out) {
    RESTKV_RETURN_IF_FAILED(check_values());
    prepare_grams();
    const auto vectors = static_cast<std::size_t>(shape_.batch * block * heads_ * width_);
    changes_.resize(vectors);
    outputs_.resize(vectors);
    if (in_metric_) value_norms_.resize(static_cast<std::size_t>(shape_.batch * heads_ * shape_.tokens));
    if (projected_) weights_.resize(static_cast<std::size_t>(shape_.batch * block * (width_ + heads_)));
    for (index_t begin = 0; begin < made_.queries(); begin += block) {
      const index_t end = std::min(made_.queries(), begin + block);
      std::atomic<bool> complete{true};
      backend_.parallel_for(shape_.batch * heads_, [&](index_t task) {
        if (!split_head(task / heads_, task % heads_, begin, end)) complete = false;
      });
      if (!complete) {
        return status::error(errc::workspace_too_small, "no memory to verify %lld queries over %lld tokens a thread",
                             static_cast<long long>(block), static_cast<long long>(shape_.tokens));
      }
      backend_.parallel_for(shape_.batch * (end - begin), [&](index_t task) {
        const index_t b = task / (end - begin);
        const index_t row = begin + task % (end - begin);
        if (row >= first_row(b, begin)) sum_heads(b, row, row - begin);
      });
    }
    out = std::move(made_);
    return {};
  }

 private:
  static constexpr index_t block = split_attention<T>::block;  // queries whose vectors are held at a time

  /// First row from `begin` on that sequence b has.
  [[nodiscard]] index_t first_row(index_t b, index_t begin) const noexcept {
    return std::max(begin, made_.queries() - made_.rows(b));
  }

  [[nodiscard]] status check_values() {
    std::vector<index_t> tokens(static_cast<std::size_t>(shape_.batch * shape_.kv_heads));
    std::vector<double> values(tokens.size());
    backend_.parallel_for(shape_.batch * shape_.kv_heads, [&](index_t i) {
      const auto at = static_cast<std::size_t>(i);
      tokens[at] = find_bad_value(layer_, i / shape_.kv_heads, i % shape_.kv_heads, values[at]);
    });
    for (index_t i = 0; i < static_cast<index_t>(tokens.size()); ++i) {
      const index_t token = tokens[static_cast<std::size_t>(i)];
      if (token < 0) continue;
      return status::error(errc::invalid_argument,
                           "value holds %g at token %lld of head %lld, sequence %lld: at most %g can be verified",
                           values[static_cast<std::size_t>(i)], static_cast<long long>(token),
                           static_cast<long long>(i % shape_.kv_heads), static_cast<long long>(i / shape_.kv_heads),
                           largest_verified_element);
    }
    return {};
  }

  void prepare_grams() {
    if (!in_metric_) return;
    grams_ = dense_grams(heads_, shape_.head_dim);
    backend_.parallel_for(heads_, [&](index_t h) {
      if (layer_.metric.missing()) {
        grams_.compute(layer_.projection, h);
      } else {
        grams_.copy(layer_.metric.gram, h);
      }
    });
  }

  /// The head tables' rows [begin, end), and the vectors behind them for `sum_heads`.
  [[nodiscard]] bool split_head(index_t b, index_t h, index_t begin, index_t end) noexcept {
    using table = output_errors::head_entry;
    const index_t first = first_row(b, begin);
    if (first >= end) return true;
    const index_t missing = made_.queries() - made_.rows(b);
    const index_t head = b * heads_ + h;
    split_problem<T> problem;
    problem.layer = &layer_;
    problem.kept = kept_;
    problem.batch = b;
    problem.query_head = h;
    problem.window = made_.rows(b);
    problem.first_row = first - missing;
    problem.rows = end - first;
    if (in_metric_) problem.gram = grams_[h];
    split_result result;
    result.error = made_.head_row(table::error, b, h, first);
    result.output_norm = made_.head_row(table::output_norm, b, h, first);
    result.predicted = made_.head_row(table::predicted, b, h, first);
    result.evicted_mass = made_.head_row(table::mass, b, h, first);
    result.change = changes_.data() + (head * block + first - begin) * width_;
    result.output = outputs_.data() + (head * block + first - begin) * width_;
    if (in_metric_) {
      result.projected_predicted = made_.head_row(table::projected_predicted, b, h, first);
      result.value_norms = value_norms_.data() + head * shape_.tokens;
      result.value_norms_known = first > missing;
    }
    if (!split_attention<T>(problem, result).run()) return false;
    if (in_metric_ && !projected_) {
      double* const projected = made_.head_row(table::projected_error, b, h, first);
      for (index_t i = 0; i < problem.rows; ++i) {
        projected[i] = std::sqrt(problem.gram(result.change + i * width_, shape_.head_dim));
      }
    }
    return true;
  }

  /// The layer tables' row, from the heads' vectors in slot `slot` of the block.
  void sum_heads(index_t b, index_t row, index_t slot) noexcept {
    using table = output_errors::head_entry;
    const strided_vectors change{changes_.data() + (b * heads_ * block + slot) * width_, block * width_};
    const strided_vectors output{outputs_.data() + (b * heads_ * block + slot) * width_, block * width_};
    projected_row norms;
    if (projected_) {
      double* const memory = weights_.data() + (b * block + slot) * (width_ + heads_);
      const index_t place = (b * made_.queries() + row) * 2 * layer_.projection.extent(0);
      norms = project_row(layer_.projection, heads_, shape_.head_dim, change, output, memory, memory + width_,
                          made_.head_row(table::projected_error, b, 0, row), made_.queries(),
                          hidden_ == nullptr ? nullptr : hidden_ + place);
    } else {
      for (index_t h = 0; h < heads_; ++h) {
        norms.change += squared_norm(change[h], width_);
        norms.output_norm += squared_norm(output[h], width_);
      }
      norms = {std::sqrt(norms.change), std::sqrt(norms.output_norm)};
    }
    double predicted = 0;
    for (index_t h = 0; h < heads_; ++h) {
      predicted += *made_.head_row(projected_ ? table::projected_predicted : table::predicted, b, h, row);
    }
    made_.layer_row(output_errors::layer_error, b, row) = norms.change;
    made_.layer_row(output_errors::layer_norm, b, row) = norms.output_norm;
    made_.layer_row(output_errors::predicted_sum, b, row) = predicted;
  }

  Backend& backend_;
  double* const hidden_;
  const const_kept_tokens kept_;
  const layer_view<T> layer_;
  problem_shape shape_;
  index_t heads_;
  index_t width_;
  bool projected_;
  bool in_metric_;
  output_errors made_;
  dense_grams grams_;
  std::vector<double> changes_;      // o' - o, [batch, heads, block, width]
  std::vector<double> outputs_;      // o, [batch, heads, block, width]
  std::vector<double> value_norms_;  // v^T G v, [batch, heads, tokens]
  std::vector<double> weights_;      // room of project_row, [batch, block, width + heads]
};

}  // namespace detail

/// Computes what a kept set costs the last `queries` rows of layer.query (0: all of them), in double throughout.
///
/// A token is evicted where it is visible to the query (causal, inside the sequence) and not kept; `kept` has a row per
/// KV head or per query head. Projected numbers of a head come from layer.projection, else from layer.metric (exact to
/// about 1e-8 of ||W[h]|| ||x||); the layer's sum over heads needs layer.projection. Single deletions through W_O are
/// measured with G[h], taken from layer.metric or computed from layer.projection. layer.keep_mask is not looked at.
/// Logits that are not numbers count as the lowest, as in the reference. The result does not depend on the number of
/// threads.
///
/// Errors, with nothing changed in `out`: a layer that does not fit itself; a kept set that does not fit the layer or
/// leaves a sequence's tokens; more queries than rows; a W_O of the wrong shape; values or weights that are not finite
/// or above 1e60 in magnitude; working memory that cannot be had. The result's tables come from std::vector, which
/// throws std::bad_alloc.
///
/// Memory: 8 (16 + 1) bytes a token and thread; with W_O also 8 bytes a token and query head. Cost: a query, head and
/// evicted token take 4 d multiply-adds; with W_O also d^2 / 2 a head and token and 2 hidden d a head and query. (Where
/// an evicted value equals the output to 4 digits, that pair takes d^2 / 2.)
template <tensor_backend Backend, element T>
[[nodiscard]] status output_error(Backend& backend, const const_kept_tokens& kept, const layer_view<T>& layer,
                                  output_errors& out, index_t queries = 0) {
  if (queries == 0) queries = layer.query.extent(2);
  RESTKV_RETURN_IF_FAILED(detail::check_verification(kept, layer, queries));
  return detail::error_computation<Backend, T>(backend, kept, layer, queries).run(out);
}

#if RESTKV_EXCEPTIONS

/// `output_error` that throws `restkv::error`.
template <tensor_backend Backend, element T>
[[nodiscard]] output_errors output_error(Backend& backend, const const_kept_tokens& kept, const layer_view<T>& layer,
                                         index_t queries = 0) {
  output_errors errors;
  throw_if_failed(output_error(backend, kept, layer, errors, queries));
  return errors;
}

#endif

}  // namespace restkv
