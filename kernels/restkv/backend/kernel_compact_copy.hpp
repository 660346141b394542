// SPDX-License-Identifier: Apache-2.0
/// @file
/// Kept tokens copied on a `kernel_backend`: to dense caches, to ragged ones and to pages, with the rotation of the
/// keys on the way where it is asked for.
#pragma once

#include <restkv/backend/kernel_compact_rotation.hpp>

namespace restkv {

namespace detail {

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

/// lengths(b, t) = kept tokens of the longest of the heads that share table t. For each table.
template <memory_space Space>
struct longest_of_table {
  kernel::kept_rows kept;
  index_t heads_per_page;
  tensor_view<position_t, 2, Space> lengths;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t b = item / lengths.extent(1);
    const index_t t = item % lengths.extent(1);
    index_t longest = 0;
    for (index_t h = t * heads_per_page; h < (t + 1) * heads_per_page; ++h) {
      const index_t length = kept.length(b, h);
      if (length > longest) longest = length;
    }
    lengths(b, t) = static_cast<position_t>(longest);
  }
};

}  // namespace detail

/// Copies kept tokens: out.row(b, h, i) = source.row(b, h / group, kept.positions(b, h, i)) for i < kept.lengths(b, h),
/// bit by bit, where group = kept.heads() / heads of the source.
///
/// source: [batch, kv_heads, tokens, channels], any strides, or pages; out: [batch, kept.heads(), slots, channels] with
/// slots >= kept.capacity(), `ragged_rows` or pages. Elements of 1, 2, 4 or 8 bytes. What lies behind a head's tokens
/// is left as it is.
///
/// Enqueues; nothing is written on failure, but for a launch that fails (errc::device_failure). Fails as the CPU's
/// `gather_tokens` does, as far as the host can see (`kernel_compact_rows.hpp`). Cost: one read and one write of the
/// kept tokens.
template <class Executor, detail::source_rows<Executor::space> Source, detail::takes_rows_of<Source> Out>
[[nodiscard]] status gather_tokens(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                                   const Source& source, const Out& out) {
  RESTKV_RETURN_IF_FAILED(detail::check_gather_rows(kept, "source", source, "out", out));
  kernel::gather(backend.executor(), kernel::kept_rows(kept), kept.heads() / detail::heads_of(source),
                 kernel::rows_of(source), detail::kernel_rows(out, kept.heads()));
  return backend.outcome("a gather of tokens");
}

/// Copies the kept keys and values, with everything checked for both before anything is launched; with a `key_rotation`
/// keys are turned to their new positions on their way, in the same read and write.
///
/// key: [batch, kv_heads, tokens, key_dim], value: [batch, kv_heads, tokens, value_dim], any strides, or pages.
/// out_key, out_value: [batch, kept.heads(), slots, channels] with slots >= kept.capacity(); or `ragged_rows`, whose
/// offsets `ragged_offsets` filled in on the same backend, with rows for batch * heads * capacity; or pages, with
/// tables of room for capacity, see `page_lengths`. They may interleave within one buffer.
///
/// Enqueues; nothing is written on failure, but for a launch that fails (errc::device_failure). Fails as the CPU's
/// `compact` and `rotate_keys` do, as far as the host can see (`kernel_compact_rows.hpp`). Cost: one read and one write
/// of the kept tokens.
template <class Executor, detail::source_rows<Executor::space> Key, detail::source_rows<Executor::space> Value,
          detail::takes_rows_of<Key> OutKey, detail::takes_rows_of<Value> OutValue,
          detail::rotation_of<Executor::space, detail::rows_value_t<Key>> Rotation = no_rotation>
[[nodiscard]] status compact(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept, const Key& key,
                             const Value& value, const OutKey& out_key, const OutValue& out_value,
                             const Rotation& rotation = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_rows("key", key));
  RESTKV_RETURN_IF_FAILED(detail::check_rows("value", value));
  RESTKV_RETURN_IF_FAILED(detail::check_beside_rows(key, value));
  RESTKV_RETURN_IF_FAILED(detail::check_gather_rows(kept, "key", key, "out_key", out_key));
  RESTKV_RETURN_IF_FAILED(detail::check_gather_rows(kept, "value", value, "out_value", out_value));
  RESTKV_RETURN_IF_FAILED(detail::check_source_untouched("value", value, "out_key", out_key));
  RESTKV_RETURN_IF_FAILED(detail::check_source_untouched("key", key, "out_value", out_value));
  RESTKV_RETURN_IF_FAILED(detail::check_outputs_apart("out_key", out_key, "out_value", out_value));
  RESTKV_RETURN_IF_FAILED(detail::check_rotation(rotation, "out_key", touched_bytes(detail::memory_of(out_key)),
                                                 detail::channels_of(out_key)));
  const kernel::kept_rows rows(kept);
  const index_t group = kept.heads() / detail::heads_of(key);
  detail::gather_keys<detail::rows_value_t<Key>>(backend.executor(), rows, group, kernel::rows_of(key),
                                                 detail::kernel_rows(out_key, kept.heads()), rotation);
  kernel::gather(backend.executor(), rows, group, kernel::rows_of(value), detail::kernel_rows(out_value, kept.heads()));
  return backend.outcome("compaction");
}

/// offsets(i) = kept tokens of the rows before row i = b * heads + h; the last entry is their number in all.
/// offsets: [batch * heads + 1]. Enqueues; fails as the CPU's does, as far as the host can see.
template <class Executor>
[[nodiscard]] status ragged_offsets(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                                    const tensor_view<std::int64_t, 1, Executor::space>& offsets) {
  RESTKV_RETURN_IF_FAILED(detail::check_offsets(kept, offsets));
  return backend.for_each(1, detail::sum_lengths{kernel::kept_rows(kept), offsets.data, offsets.stride(0)});
}

/// lengths(b, t) = kept tokens of the longest of the heads that share table t, as the tables of the compacted pages
/// have it. lengths: [batch, kept.heads() / heads_per_page]. Enqueues.
template <class Executor>
[[nodiscard]] status page_lengths(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                                  index_t heads_per_page, const tensor_view<position_t, 2, Executor::space>& lengths) {
  RESTKV_RETURN_IF_FAILED(detail::check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(detail::check_view("lengths", lengths));
  RESTKV_RETURN_IF_FAILED(detail::check_distinct("lengths", lengths));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("lengths", "sequences", lengths.extent(0), "the kept set", kept.batch()));
  RESTKV_RETURN_IF_FAILED(
      detail::check_equal("lengths", "heads", lengths.extent(1) * heads_per_page, "the kept set", kept.heads()));
  RESTKV_RETURN_IF_FAILED(detail::check_apart_from_kept(kept, "lengths", touched_bytes(lengths)));
  return backend.for_each(lengths.size(),
                          detail::longest_of_table<Executor::space>{kernel::kept_rows(kept), heads_per_page, lengths});
}

/// Copies tables of pages to a backend's memory, after `check_tables` for a pool of `pages` pages. out: dense, of the
/// same extents. The host's tables may change when the call is back.
template <class Executor>
[[nodiscard]] status upload_tables(kernel_backend<Executor>& backend, const const_page_tables& tables, index_t pages,
                                   index_t page_size, const basic_page_tables<page_t, Executor::space>& out) {
  RESTKV_RETURN_IF_FAILED(check_tables(tables, pages, page_size));
  RESTKV_RETURN_IF_FAILED(check_table_shapes(out, page_size));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "sequences", out.batch(), "tables", tables.batch()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "tables", out.tables(), "tables", tables.tables()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "pages", out.most_pages(), "tables", tables.most_pages()));
  if (!out.ids.dense() || !out.lengths.dense()) {
    return status::error(errc::shape_mismatch, "out has strides of %lld and %lld on its last axes, must be dense",
                         static_cast<long long>(out.ids.stride(2)), static_cast<long long>(out.lengths.stride(1)));
  }
  const index_t most = tables.most_pages();
  const index_t count = tables.tables();
  kernel::upload_table(backend.executor(), out.ids.data, tables.ids.size(),
                       [&](index_t i) { return tables.ids(i / (count * most), i / most % count, i % most); });
  kernel::upload_table(backend.executor(), out.lengths.data, tables.lengths.size(),
                       [&](index_t i) { return tables.lengths(i / count, i % count); });
  return backend.outcome("an upload");
}

}  // namespace restkv
