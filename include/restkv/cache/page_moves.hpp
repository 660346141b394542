// SPDX-License-Identifier: Apache-2.0
/// @file
/// `plan_page_moves`: which pages a paged cache keeps, leaves and takes when only some tokens are kept.
///
/// A page of slots all of whose tokens come from one page, from its beginning on and in every head, is that page:
/// nothing is copied, and a page that is shared stays shared. A policy that keeps whole pages (`granularity`) moves no
/// token at all. Other slots are written, and a page that anything else refers to never is: they go to the page they
/// were in when that is the sequence's own, else to its own pages that hold no kept token, and when these do not
/// suffice to free ones; if there are too few, nothing is changed. The sequence lets go of every other page.
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/cache/paged_layout.hpp>
#include <restkv/core/workspace.hpp>

#include <algorithm>
#include <cstdint>
#include <span>

namespace restkv {

/// What a compaction of pages will do. Its arrays lie in the workspace that it was planned in.
struct page_moves {
  tensor_view<page_t, 3> ids{};          ///< [batch, tables, most_pages], the pages of each table afterwards
  tensor_view<position_t, 2> lengths{};  ///< [batch, tables], the tokens of each table afterwards
  std::span<page_t> released{};          ///< pages that tables let go of
  std::span<page_t> fresh{};             ///< pages taken from the allocator for copies
  std::span<const page_t> freed{};       ///< after the commit: those of `released` that are free again
  index_t page_size = 0;                 ///< tokens of a page
  index_t heads_per_page = 0;            ///< KV heads of a table
};

namespace detail {

/// What planning writes for tables of a given size.
struct page_move_memory {
  page_t* ids;
  position_t* lengths;
  page_t* released;
  page_t* fresh;
  std::uint8_t* stays;  // [most_pages]

  page_move_memory(workspace& memory, const const_page_tables& tables) noexcept
      : ids(memory.take<page_t>(tables.ids.size())),
        lengths(memory.take<position_t>(tables.lengths.size())),
        released(memory.take<page_t>(tables.ids.size())),
        fresh(memory.take<page_t>(tables.ids.size())),
        stays(memory.take<std::uint8_t>(tables.most_pages())) {}
};

/// The compaction of one table of one sequence.
struct table_moves {
  std::span<const const_kept_tokens> layers;
  index_t b;
  index_t first_head;
  index_t heads;
  index_t page_size;

  template <class Ask>
  [[nodiscard]] constexpr bool all(const Ask& ask) const noexcept {
    for (const const_kept_tokens& kept : layers) {
      for (index_t h = first_head; h < first_head + heads; ++h) {
        if (!ask(kept, h)) return false;
      }
    }
    return true;
  }
  /// Tokens of the longest head afterwards.
  [[nodiscard]] index_t length() const noexcept {
    index_t longest = 0;
    for (const const_kept_tokens& kept : layers) {
      for (index_t h = first_head; h < first_head + heads; ++h)
        longest = std::max<index_t>(longest, kept.lengths(b, h));
    }
    return longest;
  }
  /// The page whose beginning page i of slots is, in all heads that have slots there; -1 where there is no such page.
  /// Positions ascend, so the first and the last slot answer for those between.
  [[nodiscard]] index_t taken_over(index_t i) const noexcept {
    index_t page = -1;
    const bool one = all([&](const const_kept_tokens& kept, index_t h) {
      const index_t begin = i * page_size;
      const index_t end = std::min<index_t>(kept.lengths(b, h), begin + page_size);
      if (end <= begin) return true;
      const index_t first = kept.positions(b, h, begin);
      if (first % page_size != 0 || kept.positions(b, h, end - 1) - first != end - 1 - begin) return false;
      if (page >= 0 && first / page_size != page) return false;
      page = first / page_size;
      return true;
    });
    return one ? page : -1;
  }
  /// That no head keeps a token of page i.
  [[nodiscard]] bool unkept(index_t i) const noexcept {
    return all([&](const const_kept_tokens& kept, index_t h) {
      index_t low = 0;
      index_t high = kept.lengths(b, h);
      while (low < high) {
        const index_t middle = low + (high - low) / 2;
        if (kept.positions(b, h, middle) < i * page_size) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      return low == kept.lengths(b, h) || kept.positions(b, h, low) >= (i + 1) * page_size;
    });
  }
};

/// That a kept set has one row for each KV head of the tables.
[[nodiscard]] inline status check_heads_of_tables(index_t kept_heads, index_t heads) noexcept {
  if (kept_heads == heads) return {};
  return status::error(errc::unsupported, "the kept set has %lld heads, the tables have %lld: one set per KV head",
                       static_cast<long long>(kept_heads), static_cast<long long>(heads));
}

/// That a kept set has one row for each KV head of the tables, and keeps only tokens that are there.
[[nodiscard]] inline status check_kept_of_tables(const const_kept_tokens& kept, const const_page_tables& tables,
                                                 index_t heads_per_page) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const index_t heads = saturated_product(tables.tables(), heads_per_page);
  RESTKV_RETURN_IF_FAILED(check_kept_memory(kept));
  index_t longest = 0;
  for (index_t b = 0; b < tables.batch(); ++b) {
    for (index_t t = 0; t < tables.tables(); ++t) longest = std::max<index_t>(longest, tables.lengths(b, t));
  }
  RESTKV_RETURN_IF_FAILED(check_kept(kept, tables.batch(), heads, longest));
  RESTKV_RETURN_IF_FAILED(check_heads_of_tables(kept.heads(), heads));
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < heads; ++h) {
      const index_t length = kept.lengths(b, h);
      const index_t tokens = tables.lengths(b, h / heads_per_page);
      if (length == 0 || kept.positions(b, h, length - 1) < tokens) continue;
      return status::error(errc::invalid_argument,
                           "head %lld of sequence %lld keeps position %lld, its table has %lld tokens", ll(h), ll(b),
                           ll(kept.positions(b, h, length - 1)), ll(tokens));
    }
  }
  return {};
}

/// That every page has at least as many references as the tables hold it times. `scratch` has room for all of them.
template <page_allocator Allocator>
[[nodiscard]] status check_references(const Allocator& allocator, const const_page_tables& tables, index_t page_size,
                                      page_t* scratch) noexcept {
  page_t* last = scratch;
  visit_pages(tables, page_size, [&](index_t, index_t, index_t, page_t page) {
    *last++ = page;
    return true;
  });
  std::sort(scratch, last);
  for (const page_t* first = scratch; first != last;) {
    const page_t page = *first;
    const page_t* const next = std::upper_bound(first, static_cast<const page_t*>(last), page);
    const auto references = static_cast<index_t>(allocator.references(page));
    if (next - first > references) {
      return status::error(errc::invalid_argument, "page %lld is in the tables %lld times and has %lld references",
                           static_cast<long long>(page), static_cast<long long>(next - first),
                           static_cast<long long>(references));
    }
    first = next;
  }
  return {};
}

}  // namespace detail

/// Bytes of workspace that `plan_page_moves` and `compact_pages` need for tables of this size.
[[nodiscard]] inline std::size_t page_moves_bytes(const const_page_tables& tables) noexcept {
  workspace counted;
  const detail::page_move_memory memory(counted, tables);
  static_cast<void>(memory);
  return counted.required_bytes();
}

/// Decides which pages a compaction keeps, leaves and takes, and takes them from the allocator. No page is written and
/// no table is changed; give the pages back with `cancel_page_moves`, or go on with `move_tokens` and
/// `commit_page_moves`.
///
/// layers: the kept sets of all layers that use these tables, each [batch, tables * heads_per_page]. A table is as long
/// afterwards as the longest of its heads in any layer; the slots behind a shorter head's length hold leftovers.
///
/// Fails, with the allocator and `moves` as they were: tables or kept sets that do not fit, a kept set per query head,
/// a page with fewer references than tables, a workspace that is too small, and too few free pages
/// (errc::workspace_too_small).
///
/// Cost: O(log kept) per page, head and layer, and a sort of the pages.
template <page_allocator Allocator>
[[nodiscard]] status plan_page_moves(Allocator& allocator, std::span<const const_kept_tokens> layers,
                                     const const_page_tables& tables, index_t page_size, index_t heads_per_page,
                                     workspace memory, page_moves& moves) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(check_tables(tables, static_cast<index_t>(allocator.pages()), page_size));
  if (heads_per_page < 1 || layers.empty()) {
    return status::error(errc::invalid_argument, "%lld heads per page and %lld kept sets: at least 1 of each is needed",
                         ll(heads_per_page), ll(static_cast<index_t>(layers.size())));
  }
  for (const const_kept_tokens& kept : layers) {
    RESTKV_RETURN_IF_FAILED(detail::check_kept_of_tables(kept, tables, heads_per_page));
  }
  const detail::page_move_memory arrays(memory, tables);
  RESTKV_RETURN_IF_FAILED(memory.check());
  RESTKV_RETURN_IF_FAILED(detail::check_references(allocator, tables, page_size, arrays.fresh));

  page_moves made;
  made.ids = {arrays.ids, tables.ids.extents};
  made.lengths = {arrays.lengths, tables.lengths.extents};
  made.page_size = page_size;
  made.heads_per_page = heads_per_page;
  index_t released = 0;
  index_t needed = 0;
  for (index_t b = 0; b < tables.batch(); ++b) {
    for (index_t t = 0; t < tables.tables(); ++t) {
      const detail::table_moves table{layers, b, t * heads_per_page, heads_per_page, page_size};
      const index_t length = table.length();
      const index_t before = pages_of(tables.lengths(b, t), page_size);
      const index_t after = pages_of(length, page_size);
      made.lengths(b, t) = static_cast<position_t>(length);
      for (index_t i = after; i < tables.most_pages(); ++i) made.ids(b, t, i) = no_page;
      const auto owned = [&](index_t i) {
        return static_cast<index_t>(allocator.references(tables.ids(b, t, i))) == 1;
      };
      std::fill(arrays.stays, arrays.stays + before, std::uint8_t{0});
      index_t copies = 0;
      for (index_t i = 0; i < after; ++i) {
        // A page goes to the slots of its own number or of a smaller one, so by now it is known whether page i went.
        index_t page = table.taken_over(i);
        if (page < 0 && owned(i) && arrays.stays[i] == 0) page = i;
        made.ids(b, t, i) = page < 0 ? no_page : tables.ids(b, t, page);
        if (page < 0) {
          ++copies;
        } else {
          arrays.stays[page] = 1;
        }
      }
      index_t hole = 0;
      for (index_t i = before; i-- > 0;) {
        if (arrays.stays[i] != 0) continue;
        if (copies == 0 || !owned(i) || !table.unkept(i)) {
          arrays.released[released++] = tables.ids(b, t, i);
          continue;
        }
        while (made.ids(b, t, hole) != no_page) ++hole;
        made.ids(b, t, hole) = tables.ids(b, t, i);
        --copies;
      }
      needed += copies;
    }
  }
  RESTKV_RETURN_IF_FAILED(detail::check_available(needed, static_cast<index_t>(allocator.available())));
  for (index_t i = 0; i < needed; ++i) RESTKV_RETURN_IF_FAILED(allocator.allocate(arrays.fresh[i]));
  made.released = {arrays.released, static_cast<std::size_t>(released)};
  made.fresh = {arrays.fresh, static_cast<std::size_t>(needed)};
  index_t next = 0;
  for (index_t b = 0; b < tables.batch(); ++b) {
    for (index_t t = 0; t < tables.tables(); ++t) {
      for (index_t i = 0; i < pages_of(made.lengths(b, t), page_size); ++i) {
        if (made.ids(b, t, i) == no_page) made.ids(b, t, i) = arrays.fresh[next++];
      }
    }
  }
  moves = made;
  return {};
}

/// Gives the pages back that a plan took. Fails when the allocator does.
template <page_allocator Allocator>
[[nodiscard]] status cancel_page_moves(Allocator& allocator, page_moves& moves) noexcept {
  for (std::size_t i = moves.fresh.size(); i-- > 0;) {
    bool freed = false;
    RESTKV_RETURN_IF_FAILED(allocator.release(moves.fresh[i], freed));
  }
  moves = {};
  return {};
}

}  // namespace restkv
