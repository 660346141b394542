// SPDX-License-Identifier: Apache-2.0
/// @file
/// `refine_set_error`: a kept set exchanged token by token for the error of the whole set.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/selection/set_error/search.hpp>

#include <array>

namespace restkv {

/// Bytes that `refine_set_error` needs for a layer and sets of these capacities. Linear in observed queries times
/// query heads times (candidates + capacity); nothing depends on the length of the prompt.
template <element T>
[[nodiscard]] std::size_t set_error_workspace_bytes(const set_error& options, const layer_view<T>& layer,
                                                    const const_kept_tokens& candidates,
                                                    const const_kept_tokens& kept) noexcept {
  if (kept.heads() < 1 || shape_of(layer).query_heads % kept.heads() != 0) return 0;
  workspace counting;
  const detail::exchange_memory memory(
      detail::exchange_sizes_of(options, layer, kept.heads(), candidates.capacity(), kept.capacity()), counting);
  static_cast<void>(memory);
  return counting.required_bytes();
}

/// Exchanges kept tokens for candidates as long as that lowers the objective of `set_error`; the first part of it, the
/// error over the observed queries, never ends above where it began. Totals stay: each exchange takes one token out of
/// the layer's sets and brings one in, in the same head or in another one of the same sequence (up to `kept.capacity()`). `kept` is
/// the start and the result: use what `select` chose. `candidates`: what may enter, for example what `select` keeps
/// with three times the budget; need not hold the kept tokens. One set a KV head, or one a query head. Positions
/// ascend.
///
/// Per round, the gain of every single token is computed exactly (its effect on the error of the set as it stands,
/// heads joint), the best pairs are exchanged together, and fewer of them where the new set, evaluated anew, is not
/// better: what is accepted never rests on updates, so rounding cannot pile up. Ties go to the smaller head, then to
/// the smaller position. The result does not depend on the number of threads.
///
/// metric: a `group_metric` of the same W_O and number of sets. layer.projection: W_O; without it the error is that of
/// the heads' outputs side by side. Sequences shorter than the horizon, with nothing to exchange, or with a full output
/// that is 0 or not finite are left as they are. Allocates nothing.
///
/// Errors: tensors, sets, a metric or weights that do not fit; more observed queries than `query` has rows; a horizon
/// that does not divide the window; a workspace smaller than `set_error_workspace_bytes`. Nothing is written then.
///
/// Cost, for R observed queries, Hq heads of d channels in groups of g, C rows of W_O and N tokens that take part a KV
/// head: three products of R * Hq * L * d, once (the keys twice, the values once); then per round at most
/// R * Hq * N * d * (g + 3) / 2 for gains, R * Hq * N * d a set that is looked at, and R * Hq * C * d for W_O, two to
/// seven times. Memory: see `set_error_workspace_bytes`.
template <tensor_backend Backend, element T>
[[nodiscard]] status refine_set_error(Backend& backend, const set_error& options, const layer_view<T>& layer,
                                      const group_metric_view& metric, const const_kept_tokens& candidates,
                                      kept_tokens& kept, workspace space, set_error_report* report = nullptr) {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(options.check());
  const problem_shape shape = shape_of(layer);
  if (layer.key.missing()) return status::error(errc::missing_input, "the layer has no key");
  if (shape.kv_heads < 1 || shape.query_heads < 1 || shape.query_heads % shape.kv_heads != 0 || shape.head_dim < 1) {
    return status::error(errc::shape_mismatch,
                         "query has %lld heads, key has %lld of %lld channels: query heads must be a multiple of kv "
                         "heads",
                         ll(shape.query_heads), ll(shape.kv_heads), ll(shape.head_dim));
  }
  RESTKV_RETURN_IF_FAILED(check_layer(layer, shape, 0, true, true, false));
  RESTKV_RETURN_IF_FAILED(check_kept(kept, shape.batch, shape.kv_heads, shape.tokens));
  RESTKV_RETURN_IF_FAILED(check_kept(candidates, shape.batch, shape.kv_heads, shape.tokens));
  if (candidates.heads() != kept.heads() || shape.query_heads % kept.heads() != 0) {
    return status::error(errc::shape_mismatch, "%lld query heads, %lld kept sets, %lld sets of candidates: do not fit",
                         ll(shape.query_heads), ll(kept.heads()), ll(candidates.heads()));
  }
  const detail::exchange_sizes sizes =
      detail::exchange_sizes_of(options, layer, kept.heads(), candidates.capacity(), kept.capacity());
  const index_t rows = sizes.observed.rows;
  if (rows > layer.query.extent(2) || rows > set_error::most_rows) {
    return status::error(errc::shape_mismatch,
                         "set_error observes %lld queries, query has %lld rows and %lld are possible",
                         ll(rows), ll(layer.query.extent(2)), ll(set_error::most_rows));
  }
  if (sizes.observed.horizon > 0 && rows % sizes.observed.horizon != 0) {
    return status::error(errc::invalid_argument, "set_error observes %lld queries at %lld positions: not a multiple",
                         ll(rows), ll(sizes.observed.horizon));
  }
  for (const auto& weights : {options.weights, options.noise_weights}) {
    if (weights.empty() || static_cast<index_t>(weights.size()) == rows) continue;
    return status::error(errc::shape_mismatch, "set_error has %zu weights for %lld queries", weights.size(), ll(rows));
  }
  if (layer.projection.data != nullptr) {
    RESTKV_RETURN_IF_FAILED(check_projection_width(layer.projection, shape.query_heads, shape.head_dim));
  }
  const std::array<index_t, 4> expected{kept.heads(), sizes.pairs(), shape.head_dim, sizes.width()};
  if (metric.missing() || metric.gram.extents != expected || !metric.gram.dense()) {
    return status::error(errc::shape_mismatch,
                         "the group metric has %lld sets of %lld pairs of %lld channels, %lld, %lld, %lld are needed",
                         ll(metric.gram.extent(0)), ll(metric.gram.extent(1)), ll(metric.gram.extent(2)),
                         ll(expected[0]), ll(expected[1]), ll(expected[2]));
  }
  for (index_t b = 0; b < shape.batch; ++b) {
    for (index_t row = 0; row < kept.heads(); ++row) {
      const sequence_span span = sequence(layer, b, row * shape.kv_heads / kept.heads());
      for (const const_kept_tokens& set : {const_kept_tokens(kept), candidates}) {
        const index_t length = set.lengths(b, row);
        if (length == 0) continue;
        if (set.positions(b, row, 0) >= span.begin && set.positions(b, row, length - 1) < span.begin + span.length) {
          continue;
        }
        return status::error(errc::invalid_argument,
                             "set %lld of sequence %lld holds positions %lld to %lld, its tokens are %lld to %lld",
                             ll(row), ll(b), ll(set.positions(b, row, 0)), ll(set.positions(b, row, length - 1)),
                             ll(span.begin), ll(span.begin + span.length - 1));
      }
    }
  }
  detail::exchange_memory memory(sizes, space);
  RESTKV_RETURN_IF_FAILED(space.check());
  set_error_report made;
  if (sizes.capacity > 0) {
    detail::set_error_run<Backend, T>(backend, options, layer, sizes, metric, candidates, kept, memory).run(made);
  }
  if (report != nullptr) *report = made;
  return {};
}

}  // namespace restkv
