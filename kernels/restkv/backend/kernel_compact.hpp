// SPDX-License-Identifier: Apache-2.0
/// @file
/// Compaction on a `kernel_backend`: the kept keys and values of a cache, copied to a dense or a ragged one, or moved to the
/// front of their heads. The kept set may lie where the host cannot read it, as `select` leaves it.
///
/// What the host can see is checked before anything is launched: shapes, null pointers, room for the kept set's capacity,
/// and memory that overlaps. What the kept set holds is not: it must come from `select`, or have passed `check_kept`.
#pragma once

#include <restkv/backend/kernel_backend.hpp>
#include <restkv/cache/gather.hpp>
#include <restkv/kernel/gather_in_place.hpp>
#include <restkv/kernel/gather_tokens.hpp>

namespace restkv {

/// Keys or values of all heads behind each other, as variable-length attention kernels take them, in a backend's memory:
/// head h of sequence b has rows offsets(b * heads + h) .. offsets(b * heads + h + 1). `ragged_offsets` fills in the
/// offsets.
template <class T, memory_space Space>
struct ragged_rows {
  tensor_view<T, 2, Space> rows{};                      ///< [total_tokens, head_dim]
  tensor_view<const std::int64_t, 1, Space> offsets{};  ///< [batch * heads + 1] (cu_seqlens)
};

namespace detail {

/// The kept set and the caches that an executor works on.
template <class Executor>
using kept_of = std::type_identity_t<basic_kept_tokens<const position_t, Executor::space>>;  // a mutable set converts
template <class T, class Executor>
using cache_of = tensor_view<T, 4, Executor::space>;

template <class T, std::size_t Rank, memory_space Space>
[[nodiscard]] constexpr tensor_view<const T, Rank, Space> as_read(const tensor_view<T, Rank, Space>& view) noexcept {
  return {view.data, view.extents, view.strides};
}
/// A view for checks that look at its bounds alone.
template <class T, std::size_t Rank, memory_space Space>
[[nodiscard]] constexpr tensor_view<T, Rank> as_host(const tensor_view<T, Rank, Space>& view) noexcept {
  return {view.data, view.extents, view.strides};
}

template <class T, std::size_t Rank, memory_space Space>
[[nodiscard]] status check_cache_view(const char* name, const tensor_view<T, Rank, Space>& view) noexcept {
  return check_view(name, as_host(view));
}

/// That a cache and a kept set fit each other, as far as the host can see.
template <class T, memory_space Space>
[[nodiscard]] status check_source_of(const basic_kept_tokens<const position_t, Space>& kept, const char* name,
                                     const tensor_view<const T, 4, Space>& cache) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(check_cache_view("kept.positions", kept.positions));
  RESTKV_RETURN_IF_FAILED(check_cache_view("kept.lengths", kept.lengths));
  RESTKV_RETURN_IF_FAILED(check_cache_view(name, cache));
  RESTKV_RETURN_IF_FAILED(check_equal(name, "sequences", cache.extent(0), "the kept set", kept.batch()));
  if (cache.extent(1) > 0 && kept.heads() % cache.extent(1) == 0) return {};
  return status::error(errc::shape_mismatch,
                       "the kept set has %lld heads, %s has %lld: a multiple of the cache's heads is needed",
                       ll(kept.heads()), name, ll(cache.extent(1)));
}

/// That an output has room for a kept set, and shares no memory with what is read.
template <class T, memory_space Space>
[[nodiscard]] status check_room_for(const basic_kept_tokens<const position_t, Space>& kept, const char* from,
                                    const tensor_view<const T, 4, Space>& cache, const char* name,
                                    const tensor_view<T, 4, Space>& out) noexcept {
  RESTKV_RETURN_IF_FAILED(check_cache_view(name, out));
  RESTKV_RETURN_IF_FAILED(check_equal(name, "sequences", out.extent(0), "the kept set", kept.batch()));
  RESTKV_RETURN_IF_FAILED(check_equal(name, "heads", out.extent(1), "the kept set", kept.heads()));
  RESTKV_RETURN_IF_FAILED(check_equal(name, "channels", out.extent(3), from, cache.extent(3)));
  if (out.extent(2) < kept.capacity()) {
    return status::error(errc::shape_mismatch, "%s has room for %lld tokens a head, the kept set holds up to %lld", name,
                         static_cast<long long>(out.extent(2)), static_cast<long long>(kept.capacity()));
  }
  RESTKV_RETURN_IF_FAILED(check_distinct(name, as_host(out)));
  RESTKV_RETURN_IF_FAILED(check_disjoint(name, touched_bytes(out), from, touched_bytes(cache)));
  RESTKV_RETURN_IF_FAILED(check_disjoint(name, touched_bytes(out), "kept.positions", touched_bytes(kept.positions)));
  return check_disjoint(name, touched_bytes(out), "kept.lengths", touched_bytes(kept.lengths));
}

/// The rows of a ragged cache for kernels.
template <class T, memory_space Space>
[[nodiscard]] kernel::token_rows rows_of_ragged(const ragged_rows<T, Space>& ragged, index_t heads) noexcept {
  kernel::token_rows rows = kernel::rows_of(
      tensor_view<T, 4, Space>(ragged.rows.data, {1, 1, ragged.rows.extent(0), ragged.rows.extent(1)},
                               {0, 0, ragged.rows.stride(0), ragged.rows.stride(1)}));
  rows.offsets = ragged.offsets.data;
  rows.of_offset = ragged.offsets.stride(0);
  rows.heads = heads;
  return rows;
}

/// offsets[i] = the kept tokens of rows 0 .. i - 1. One item: rows are few.
struct sum_lengths {
  kernel::kept_rows kept;
  std::int64_t* offsets;
  index_t of_offset;

  RESTKV_HD void operator()(index_t) const noexcept {
    std::int64_t sum = 0;
    for (index_t row = 0; row < kept.count(); ++row) {
      offsets[row * of_offset] = sum;
      sum += kept.length(row / kept.heads, row % kept.heads);
    }
    offsets[kept.count() * of_offset] = sum;
  }
};

}  // namespace detail

/// Copies the kept keys and values to dense caches: out(b, h, i, :) = cache(b, h / group, kept.positions(b, h, i), :).
///
/// key, value: [batch, kv_heads, tokens, head_dim], any strides; out_key, out_value: [batch, kept.heads(), slots,
/// head_dim] with slots >= kept.capacity(), what lies behind a head's tokens is left as it is. Enqueues; nothing is
/// written on failure, but for a launch that fails (errc::device_failure). Cost: one read and one write of the kept tokens.
template <class Executor, class K, class V>
[[nodiscard]] status compact(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                             const detail::cache_of<K, Executor>& key, const detail::cache_of<V, Executor>& value,
                             const detail::cache_of<std::remove_const_t<K>, Executor>& out_key,
                             const detail::cache_of<std::remove_const_t<V>, Executor>& out_value) {
  RESTKV_RETURN_IF_FAILED(detail::check_source_of(kept, "key", detail::as_read(key)));
  RESTKV_RETURN_IF_FAILED(detail::check_source_of(kept, "value", detail::as_read(value)));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("value", "tokens", value.extent(2), "key", key.extent(2)));
  RESTKV_RETURN_IF_FAILED(detail::check_room_for(kept, "key", detail::as_read(key), "out_key", out_key));
  RESTKV_RETURN_IF_FAILED(detail::check_room_for(kept, "value", detail::as_read(value), "out_value", out_value));
  RESTKV_RETURN_IF_FAILED(
      detail::check_disjoint("out_key", touched_bytes(out_key), "out_value", touched_bytes(out_value)));
  const kernel::kept_rows rows(kept);
  kernel::gather(backend.executor(), rows, kept.heads() / key.extent(1), kernel::rows_of(key), kernel::rows_of(out_key));
  kernel::gather(backend.executor(), rows, kept.heads() / value.extent(1), kernel::rows_of(value),
                 kernel::rows_of(out_value));
  return backend.outcome("compaction");
}

/// offsets(i) = kept tokens of the rows before row i = b * heads + h; the last entry is their number in all.
/// offsets: [batch * heads + 1].
template <class Executor>
[[nodiscard]] status ragged_offsets(kernel_backend<Executor>& backend,
                                    const detail::kept_of<Executor>& kept,
                                    const tensor_view<std::int64_t, 1, Executor::space>& offsets) {
  RESTKV_RETURN_IF_FAILED(detail::check_cache_view("kept.lengths", kept.lengths));
  RESTKV_RETURN_IF_FAILED(detail::check_cache_view("offsets", offsets));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("offsets", "entries", offsets.extent(0), "the kept set's rows and one",
                                              kept.batch() * kept.heads() + 1));
  return backend.for_each(1, detail::sum_lengths{kernel::kept_rows(kept), offsets.data, offsets.stride(0)});
}

/// Copies the kept keys and values to ragged caches, whose offsets `ragged_offsets` filled in on the same backend. How many
/// tokens there are is not known on the host: both must have rows for batch * heads * capacity.
template <class Executor, class K, class V>
[[nodiscard]] status compact(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                             const detail::cache_of<K, Executor>& key, const detail::cache_of<V, Executor>& value,
                             const ragged_rows<std::remove_const_t<K>, Executor::space>& out_key,
                             const ragged_rows<std::remove_const_t<V>, Executor::space>& out_value) {
  const index_t rows = kept.batch() * kept.heads();
  const auto check = [&](const char* from, const auto& cache, const char* name, const auto& out) -> status {
    RESTKV_RETURN_IF_FAILED(detail::check_source_of(kept, from, detail::as_read(cache)));
    RESTKV_RETURN_IF_FAILED(detail::check_cache_view(name, out.rows));
    RESTKV_RETURN_IF_FAILED(detail::check_cache_view("offsets", out.offsets));
    RESTKV_RETURN_IF_FAILED(
        detail::check_equal("offsets", "entries", out.offsets.extent(0), "the kept set's rows and one", rows + 1));
    RESTKV_RETURN_IF_FAILED(detail::check_equal(name, "channels", out.rows.extent(1), from, cache.extent(3)));
    if (out.rows.extent(0) < rows * kept.capacity()) {
      return status::error(errc::shape_mismatch, "%s has %lld rows, the kept set holds up to %lld tokens", name,
                           static_cast<long long>(out.rows.extent(0)), static_cast<long long>(rows * kept.capacity()));
    }
    return detail::check_disjoint(name, touched_bytes(out.rows), from, touched_bytes(cache));
  };
  RESTKV_RETURN_IF_FAILED(check("key", key, "out_key", out_key));
  RESTKV_RETURN_IF_FAILED(check("value", value, "out_value", out_value));
  RESTKV_RETURN_IF_FAILED(
      detail::check_disjoint("out_key", touched_bytes(out_key.rows), "out_value", touched_bytes(out_value.rows)));
  const kernel::kept_rows of_kept(kept);
  kernel::gather(backend.executor(), of_kept, kept.heads() / key.extent(1), kernel::rows_of(key),
                 detail::rows_of_ragged(out_key, kept.heads()));
  kernel::gather(backend.executor(), of_kept, kept.heads() / value.extent(1), kernel::rows_of(value),
                 detail::rows_of_ragged(out_value, kept.heads()));
  return backend.outcome("compaction");
}

/// Moves the kept keys and values to the front of their heads: slot i of a head holds what lay at kept.positions(b, h, i);
/// what lies behind the kept tokens is unspecified. One set per KV head. Cost: one read and one write of what moves.
template <class Executor, class K, class V>
[[nodiscard]] status compact_in_place(kernel_backend<Executor>& backend,
                                      const detail::kept_of<Executor>& kept,
                                      const detail::cache_of<K, Executor>& key, const detail::cache_of<V, Executor>& value) {
  const auto check = [&](const char* name, const auto& cache) -> status {
    RESTKV_RETURN_IF_FAILED(detail::check_source_of(kept, name, detail::as_read(cache)));
    if (kept.heads() != cache.extent(1)) {
      return status::error(errc::unsupported,
                           "the kept set has %lld heads, %s has %lld: in place needs one set per KV head",
                           static_cast<long long>(kept.heads()), name, static_cast<long long>(cache.extent(1)));
    }
    RESTKV_RETURN_IF_FAILED(
        detail::check_distinct(name, detail::as_host(cache)));
    RESTKV_RETURN_IF_FAILED(
        detail::check_disjoint(name, touched_bytes(cache), "kept.positions", touched_bytes(kept.positions)));
    return detail::check_disjoint(name, touched_bytes(cache), "kept.lengths", touched_bytes(kept.lengths));
  };
  RESTKV_RETURN_IF_FAILED(check("key", key));
  RESTKV_RETURN_IF_FAILED(check("value", value));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("value", "tokens", value.extent(2), "key", key.extent(2)));
  if (may_overlap(detail::as_host(key), detail::as_host(value))) {
    return detail::overlap_error("key", "value", touched_bytes(key), touched_bytes(value));
  }
  const kernel::kept_rows rows(kept);
  kernel::compact_in_place(backend.executor(), rows, kernel::rows_of(key));
  kernel::compact_in_place(backend.executor(), rows, kernel::rows_of(value));
  return backend.outcome("compaction in place");
}

}  // namespace restkv
