// SPDX-License-Identifier: Apache-2.0
/// @file
/// `merge`: what a selection dropped is merged into what it kept.
#pragma once

#include <restkv/merge/merge_run.hpp>

namespace restkv {

namespace detail {

template <class Operator, class KeyLayout, class ValueLayout, element T>
[[nodiscard]] status check_merge(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer,
                                 const Operator& merging, const merge_options& options) noexcept {
  RESTKV_RETURN_IF_FAILED(options.check());
  if constexpr (requires { { merging.check() } -> std::same_as<status>; }) RESTKV_RETURN_IF_FAILED(merging.check());
  const bool observes = options.guard != merge_guard::none || Operator::needs_attention;
  if (observes && layer.query.data == nullptr) {
    return status::error(errc::missing_input, "merging looks at %lld queries and the layer has no query",
                         static_cast<long long>(options.window));
  }
  RESTKV_RETURN_IF_FAILED(check_merged(cache, layer, layer.key.extent(2), observes ? 1 : 0));
  RESTKV_RETURN_IF_FAILED(check_written(cache, layer));
  const rotary_keys& rope = options.rope;
  if (Operator::merges_keys && !rope.ignore && rope.frequencies.empty()) {
    return status::error(errc::missing_input,
                         "keys of %lld tokens are to be averaged and rope.frequencies is empty: set it, or rope.ignore",
                         static_cast<long long>(layer.key.extent(2)));
  }
  if (2 * static_cast<index_t>(rope.frequencies.size()) > layer.key.extent(3)) {
    return status::error(errc::shape_mismatch,
                         "rope.frequencies has %zu entries, must be within [0, %lld] for %lld channels",
                         rope.frequencies.size(), static_cast<long long>(layer.key.extent(3) / 2),
                         static_cast<long long>(layer.key.extent(3)));
  }
  if (rope.positions.data == nullptr) return {};
  RESTKV_RETURN_IF_FAILED(check_equal("rope.positions", "sequences", rope.positions.extent(0), "key",
                                      layer.key.extent(0)));
  RESTKV_RETURN_IF_FAILED(check_equal("rope.positions", "heads", rope.positions.extent(1), "key", layer.key.extent(1)));
  return check_equal("rope.positions", "tokens", rope.positions.extent(2), "key", layer.key.extent(2));
}

}  // namespace detail

/// Bytes of workspace that `merge` needs for these arguments. 0 where they do not fit each other: `merge` says why.
template <merge_operator Operator, detail::element_layout KeyLayout, detail::element_layout ValueLayout, element T>
[[nodiscard]] std::size_t merge_workspace_bytes(const merged_cache<KeyLayout, ValueLayout>& cache,
                                                const layer_view<T>& layer, const Operator& merging,
                                                const merge_options& options = {}) noexcept {
  if (!detail::check_merge(cache, layer, merging, options).ok()) return 0;
  workspace counting;
  const detail::merge_run<Operator, KeyLayout, ValueLayout, T> run(cache, layer, merging, options, counting);
  return counting.required_bytes();
}

/// Merges the tokens that are in `layer` and not in `cache.kept` into the entries of the cache, which `compact` has
/// filled from that layer. Which entry receives a token, with what weight, and what becomes of it is the operator's
/// choice (`merge_operator`); the number of entries and their positions do not change.
///
/// layer: key and value before the compaction, [batch, kv_heads, tokens, head_dim], in one piece or in chunks; query
/// where there is a guard or the operator needs attention: the last `options.window` of it are observed, fewer where it
/// has fewer. With `layer.projection` the guard also looks at the layer's output through W_O.
///
/// The guard compares errors in double, with the entries as they are stored: merges into an entry are taken where the
/// sum over the head's window of ||o' - o||^2 falls, then a head's where that sum, computed anew, is below the one
/// before the call, then, in the order of heads, where the layer's error through W_O falls. So with a guard neither
/// error ever rises; what is turned down leaves the bits that were there. Later queries are not looked at: measure them
/// with `merged_future_error`.
///
/// Dropped tokens with a key or value that is not finite are not merged, nor is anything that would not be finite in
/// the cache's element type. Results do not depend on the number of threads.
///
/// Fails, before anything is written: options or an operator out of range, a kept set or cache that does not fit the
/// layer, missing queries or frequencies, memory of the cache that overlaps the layer's, too small a workspace.
///
/// Cost: L B d multiply-adds a head to find the most similar of B entries for L tokens, in blocks of 4 tokens by 16
/// entries; a guard takes 2 (L + 2 B) d multiply-adds for each of its queries, in double, and up to 8 B d more where it
/// judges token by token. Memory: about 8 bytes a token and head, 20 d bytes an entry, 40 d bytes a query and head.
template <merge_operator Operator, detail::element_layout KeyLayout, detail::element_layout ValueLayout, element T,
          parallel_loop ParallelFor = serial_for>
[[nodiscard]] status merge(const merged_cache<KeyLayout, ValueLayout>& cache, const layer_view<T>& layer,
                           const Operator& merging, const merge_options& options, workspace space,
                           const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_merge(cache, layer, merging, options));
  const detail::merge_run<Operator, KeyLayout, ValueLayout, T> run(cache, layer, merging, options, space);
  RESTKV_RETURN_IF_FAILED(space.check());
  run.run(parallel_for);
  return {};
}

}  // namespace restkv
