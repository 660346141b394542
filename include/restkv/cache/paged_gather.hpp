// SPDX-License-Identifier: Apache-2.0
/// @file
/// Reading a cache in pages: kept tokens or all tokens copied to a layout, and a sequence's pages as the chunks that
/// scoring reads in place.
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/cache/paged_layout.hpp>

#include <span>

namespace restkv {

namespace detail {

template <class T>
inline constexpr bool is_paged = false;
template <class T>
inline constexpr bool is_paged<paged_layout<T>> = true;

/// That writing to `out` leaves the tokens of a paged source alone. Two layouts of one pool may interleave, as long as
/// they have no page in common.
template <class T, cache_layout Layout>
[[nodiscard]] status check_pages_untouched(const paged_layout<T>& source, const Layout& out) noexcept {
  const byte_range from = source.touched();
  const byte_range to = out.touched();
  if (to.overlaps(touched_bytes(source.tables.ids)) || to.overlaps(touched_bytes(source.tables.lengths))) {
    return overlap_error("out", "the source's tables", to, touched_bytes(source.tables.ids));
  }
  if (!from.overlaps(to)) return {};
  if constexpr (is_paged<Layout>) {
    const bool same_pool = out.pages.data == source.pages.data && out.pages.extents == source.pages.extents &&
                           out.pages.strides == source.pages.strides;
    if (same_pool) {
      const page_t page = common_page(source.tables, &out.tables, source.page_size(), source.pages.extent(0));
      if (page == no_page) return {};
      return status::error(errc::aliasing, "page %lld of %lld is read and written", static_cast<long long>(page),
                           static_cast<long long>(source.pages.extent(0)));
    }
  }
  return overlap_error("out", "source", to, from);
}

/// That the source's heads have the tokens that a kept set names.
template <class T>
[[nodiscard]] status check_kept_in_pages(const const_kept_tokens& kept, const paged_layout<T>& source) noexcept {
  RESTKV_RETURN_IF_FAILED(check_kept_memory(kept));
  index_t longest = 0;
  for (index_t b = 0; b < source.batch(); ++b) {
    for (index_t t = 0; t < source.tables.tables(); ++t)
      longest = std::max<index_t>(longest, source.tables.lengths(b, t));
  }
  RESTKV_RETURN_IF_FAILED(check_kept(kept, source.batch(), source.heads(), longest));
  const index_t group = kept.heads() / source.heads();
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      const index_t length = kept.lengths(b, h);
      const index_t tokens = source.length(b, h / group);
      if (length == 0 || kept.positions(b, h, length - 1) < tokens) continue;
      return status::error(errc::invalid_argument,
                           "head %lld of sequence %lld keeps position %lld, its pages hold %lld tokens",
                           static_cast<long long>(h), static_cast<long long>(b),
                           static_cast<long long>(kept.positions(b, h, length - 1)), static_cast<long long>(tokens));
    }
  }
  return {};
}

}  // namespace detail

/// Copies kept tokens out of pages: out.row(b, h, i) = source.row(b, h / group, kept.positions(b, h, i)) for
/// i < kept.lengths(b, h), bit by bit, where group = kept.heads() / source.heads().
///
/// source: a `paged_layout`; out: any layout of [batch, kept.heads()] rows of head_dim channels: dense, ragged, or
/// pages again, also of the same pool. Elements are of any trivially copyable type. Slots behind a head's length are
/// left as they are.
///
/// Fails, before anything is written: tables that do not fit the pool, a kept set that does not fit the tables, an
/// inconsistent layout, other heads or channels, too few slots, a null pointer, and an output that overlaps the source,
/// its tables or the kept set (errc::aliasing): by bounds, or by pages where both are of one pool.
///
/// Cost: one read and one write of the kept tokens.
template <class T, cache_layout Layout, parallel_loop ParallelFor = serial_for>
  requires(std::is_same_v<typename Layout::value_type, std::remove_const_t<T>> &&
           detail::copyable_bytes<typename Layout::value_type>)
[[nodiscard]] status gather_tokens(const const_kept_tokens& kept, const paged_layout<T>& source, const Layout& out,
                                   const ParallelFor& parallel_for = {}) {
  using element_type = typename Layout::value_type;
  const paged_layout<const element_type> from{source.pages, source.tables};
  RESTKV_RETURN_IF_FAILED(from.check());
  RESTKV_RETURN_IF_FAILED(detail::check_kept_in_pages(kept, from));
  RESTKV_RETURN_IF_FAILED(detail::check_room(kept, "out", out));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "channels", out.head_dim(), "source", from.head_dim()));
  RESTKV_RETURN_IF_FAILED(detail::check_pages_untouched(from, out));
  parallel_for(kept.batch() * kept.heads(), [&](index_t row) {
    const index_t b = row / kept.heads();
    const index_t h = row % kept.heads();
    const index_t kv_head = h / (kept.heads() / from.heads());
    detail::token_copier<element_type> copier(from.head_dim());
    for (index_t slot = 0; slot < kept.lengths(b, h); ++slot) {
      copier.copy(from.row(b, kv_head, kept.positions(b, h, slot)), out.row(b, h, slot));
    }
    copier.flush();
  });
  return {};
}

/// Copies all tokens out of pages: out[b][h][n] = source.row(b, h, n) for n < source.length(b, h). This is how a cache
/// with a table for each head is scored by a policy that lets heads compete: hand `out` to the layer as it is, and
/// `source.tables.lengths` as its `head_lengths` with right padding.
///
/// out: [batch, heads, slots, head_dim], any strides, at least as many slots as the longest head has tokens; what is
/// behind a head's tokens is left as it is.
///
/// Fails, before anything is written, as `gather_tokens` does. Cost: one read and one write of the tokens.
template <class T, class U, parallel_loop ParallelFor = serial_for>
  requires(std::is_same_v<U, std::remove_const_t<T>> && detail::copyable_bytes<U>)
[[nodiscard]] status copy_pages(const paged_layout<T>& source, const tensor_view<U, 4>& out,
                                const ParallelFor& parallel_for = {}) {
  const paged_layout<const U> from{source.pages, source.tables};
  RESTKV_RETURN_IF_FAILED(from.check());
  RESTKV_RETURN_IF_FAILED(detail::check_output("out", dense_layout<U>{out}));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "sequences", out.extent(0), "source", from.batch()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "heads", out.extent(1), "source", from.heads()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "channels", out.extent(3), "source", from.head_dim()));
  for (index_t b = 0; b < from.batch(); ++b) {
    for (index_t h = 0; h < from.heads(); ++h) {
      if (from.length(b, h) <= out.extent(2)) continue;
      return status::error(errc::shape_mismatch, "head %lld of sequence %lld has %lld tokens, out has room for %lld",
                           static_cast<long long>(h), static_cast<long long>(b),
                           static_cast<long long>(from.length(b, h)), static_cast<long long>(out.extent(2)));
    }
  }
  RESTKV_RETURN_IF_FAILED(detail::check_pages_untouched(from, dense_layout<U>{out}));
  parallel_for(from.batch() * from.heads(), [&](index_t row) {
    const index_t b = row / from.heads();
    const index_t h = row % from.heads();
    detail::token_copier<U> copier(from.head_dim());
    for (index_t n = 0; n < from.length(b, h); ++n) copier.copy(from.row(b, h, n), out[b][h][n]);
    copier.flush();
  });
  return {};
}

/// The pages of one table as the chunks of a tensor [1, heads_per_page, length, head_dim], for a `layer_view`: scoring
/// then reads the cache where it lies.
///
/// memory: room for the chunks, pages_of(length, page_size) of them and at least one; it must live as long as `chunks`
/// is used. Pages that follow each other make one chunk where their tokens do too, as in pools [pages, page_size,
/// heads, head_dim]; elsewhere there is a chunk for each page. Sequences of a batch have different tables, so each is a
/// layer of its own. A table without tokens gives one chunk without tokens.
///
/// Fails on tables that do not fit the pool, a sequence or table that does not exist, and too small a memory; `chunks`
/// is then as it was.
template <class T>
[[nodiscard]] status page_chunks(const paged_layout<T>& cache, index_t sequence, index_t table,
                                 std::span<tensor_view<const std::remove_const_t<T>, 4>> memory,
                                 chunked_tensor_view<const std::remove_const_t<T>>& chunks) noexcept {
  using view = tensor_view<const std::remove_const_t<T>, 4>;
  const auto ll = [](auto n) { return static_cast<long long>(n); };
  const paged_layout<const std::remove_const_t<T>> from{cache.pages, cache.tables};
  RESTKV_RETURN_IF_FAILED(from.check());
  if (sequence < 0 || sequence >= from.batch() || table < 0 || table >= from.tables.tables()) {
    return status::error(errc::invalid_argument, "table %lld of sequence %lld: there are %lld sequences of %lld tables",
                         ll(table), ll(sequence), ll(from.batch()), ll(from.tables.tables()));
  }
  const index_t page_size = from.page_size();
  const index_t length = from.tables.lengths(sequence, table);
  const index_t pages = pages_of(length, page_size);
  const bool joins = from.pages.stride(0) == page_size * from.pages.stride(2);
  const auto follows = [&](index_t i) {
    return i > 0 && joins && from.tables.ids(sequence, table, i) == from.tables.ids(sequence, table, i - 1) + 1;
  };
  index_t needed = pages == 0 ? 1 : 0;
  for (index_t i = 0; i < pages; ++i) needed += follows(i) ? 0 : 1;
  if (static_cast<index_t>(memory.size()) < needed) {
    return status::error(errc::shape_mismatch, "memory has room for %lld chunks, the table needs %lld",
                         ll(memory.size()), ll(needed));
  }
  view none = from.pages.slice(0, 0, 1);
  none.extents[2] = 0;
  if (pages == 0) memory[0] = none;
  std::size_t count = 0;
  for (index_t i = 0; i < pages; ++i) {
    const index_t tokens = std::min(page_size, length - i * page_size);
    if (follows(i)) {
      memory[count - 1].extents[2] += tokens;
    } else {
      memory[count++] = from.pages.slice(0, from.tables.ids(sequence, table, i), 1).slice(2, 0, tokens);
    }
  }
  chunks = {memory.data(), needed};
  return {};
}

}  // namespace restkv
