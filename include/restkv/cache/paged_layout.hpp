// SPDX-License-Identifier: Apache-2.0
/// @file
/// Caches in pages: `page_tables`, which page holds which tokens of a sequence, and `paged_layout`, a tensor of keys or
/// values in pages, as a source or a destination of kept tokens.
///
/// Paging follows PagedAttention (Kwon et al., arXiv 2309.06180); tables for each KV head follow KV-Compress (Rehg,
/// arXiv 2410.00161), whose heads keep different numbers of tokens.
#pragma once

#include <restkv/cache/layout.hpp>
#include <restkv/cache/overlap.hpp>
#include <restkv/cache/page_pool.hpp>
#include <restkv/core/check_view.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

#include <algorithm>
#include <bitset>
#include <limits>
#include <type_traits>

namespace restkv {

/// Pages that hold `tokens` tokens: tokens / page_size, rounded up.
[[nodiscard]] constexpr index_t pages_of(index_t tokens, index_t page_size) noexcept {
  return tokens / page_size + (tokens % page_size != 0 ? 1 : 0);
}

/// Which pages hold the tokens of a batch: token n of table t of sequence b lies in page ids(b, t, n / page_size), at
/// place n % page_size. A view: the memory is the engine's.
///
/// A sequence has one table for all its KV heads, or one for each of them, or one for every few; see `paged_layout`.
/// Entries behind the pages that a table's length needs are not looked at. Several tables may hold the same page.
template <class Integer, memory_space Space = memory_space::host>
struct basic_page_tables {
  tensor_view<Integer, 3, Space> ids{};      ///< [batch, tables, most_pages], numbers of pages
  tensor_view<Integer, 2, Space> lengths{};  ///< [batch, tables], tokens

  constexpr basic_page_tables() = default;
  /// A view of tables in memory of your own.
  constexpr basic_page_tables(tensor_view<Integer, 3, Space> pages, tensor_view<Integer, 2, Space> tokens) noexcept
      : ids(pages), lengths(tokens) {}
  /// Tables that may be changed are tables that may be read.
  template <class U>
    requires std::is_same_v<const U, Integer>
  constexpr basic_page_tables(const basic_page_tables<U, Space>& other) noexcept  // NOLINT(google-explicit-constructor)
      : ids(other.ids), lengths(other.lengths) {}

  /// Sequences.
  [[nodiscard]] constexpr index_t batch() const noexcept { return lengths.extent(0); }
  /// Tables of a sequence.
  [[nodiscard]] constexpr index_t tables() const noexcept { return lengths.extent(1); }
  /// Pages that a table has room for.
  [[nodiscard]] constexpr index_t most_pages() const noexcept { return ids.extent(2); }
  /// The tables of one sequence, as a batch of one.
  [[nodiscard]] constexpr basic_page_tables sequence(index_t b) const noexcept {
    return {ids.slice(0, b, 1), lengths.slice(0, b, 1)};
  }
};

/// Tables that compaction changes.
using page_tables = basic_page_tables<page_t>;
/// Tables that are read.
using const_page_tables = basic_page_tables<const page_t>;

/// The part of `check_tables` that looks at shapes alone, for tables wherever they lie.
template <class Integer, memory_space Space>
[[nodiscard]] status check_table_shapes(const basic_page_tables<Integer, Space>& tables, index_t page_size) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (page_size < 1) {
    return status::error(errc::invalid_argument, "the page size is %lld tokens, must be at least 1", ll(page_size));
  }
  const auto& ids = tables.ids;
  const auto& lengths = tables.lengths;
  if (ids.extent(0) != lengths.extent(0) || ids.extent(1) != lengths.extent(1)) {
    return status::error(errc::shape_mismatch, "tables.ids is [%lld, %lld, ...], tables.lengths is [%lld, %lld]",
                         ll(ids.extent(0)), ll(ids.extent(1)), ll(lengths.extent(0)), ll(lengths.extent(1)));
  }
  RESTKV_RETURN_IF_FAILED(detail::check_view("tables.lengths", lengths));
  return detail::check_view("tables.ids", ids);
}

/// Checks that tables fit a pool: shapes, lengths that the entries suffice for, and pages within [0, pages).
[[nodiscard]] inline status check_tables(const const_page_tables& tables, index_t pages, index_t page_size) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(check_table_shapes(tables, page_size));
  const auto& ids = tables.ids;
  const auto& lengths = tables.lengths;
  for (index_t b = 0; b < tables.batch(); ++b) {
    for (index_t t = 0; t < tables.tables(); ++t) {
      const index_t length = lengths(b, t);
      if (length < 0 || pages_of(length, page_size) > tables.most_pages()) {
        return status::error(errc::invalid_argument,
                             "table %lld of sequence %lld has %lld tokens, its %lld pages of %lld hold at most %lld",
                             ll(t), ll(b), ll(length), ll(tables.most_pages()), ll(page_size),
                             ll(detail::saturated_product(tables.most_pages(), page_size)));
      }
      for (index_t i = 0; i < pages_of(length, page_size); ++i) {
        if (ids(b, t, i) >= 0 && ids(b, t, i) < pages) continue;
        return status::error(errc::invalid_argument,
                             "entry %lld of table %lld of sequence %lld is page %lld, the pool has %lld pages", ll(i),
                             ll(t), ll(b), ll(ids(b, t, i)), ll(pages));
      }
    }
  }
  return {};
}

namespace detail {

/// Calls visit(b, t, i, page) for every page of the tables until one call returns false; says whether none did.
template <class Visit>
constexpr bool visit_pages(const const_page_tables& tables, index_t page_size, const Visit& visit) noexcept {
  for (index_t b = 0; b < tables.batch(); ++b) {
    for (index_t t = 0; t < tables.tables(); ++t) {
      for (index_t i = 0; i < pages_of(tables.lengths(b, t), page_size); ++i) {
        if (!visit(b, t, i, tables.ids(b, t, i))) return false;
      }
    }
  }
  return true;
}

/// The smallest-numbered page within [0, pages) that `first` holds together with `second`, or holds twice where
/// `second` is null; no_page where there is none. Marks lie on the stack, for so many pages at a time.
[[nodiscard]] inline page_t common_page(const const_page_tables& first, const const_page_tables* second,
                                        index_t page_size, index_t pages) noexcept {
  constexpr index_t span = 32768;
  page_t common = no_page;
  pages = std::min<index_t>(pages, std::numeric_limits<page_t>::max());
  for (index_t begin = 0; begin < pages && common == no_page; begin += span) {
    std::bitset<static_cast<std::size_t>(span)> seen;
    const auto place = [&](page_t page) { return static_cast<std::size_t>(page - begin); };
    const auto here = [&](page_t page) { return page >= begin && page - begin < span; };
    const auto visit = [&](const const_page_tables& tables, bool marks, bool asks) {
      visit_pages(tables, page_size, [&](index_t, index_t, index_t, page_t page) {
        if (!here(page)) return true;
        if (asks && seen.test(place(page)) && (common == no_page || page < common)) common = page;
        if (marks) seen.set(place(page));
        return true;
      });
    };
    visit(first, true, second == nullptr);
    if (second != nullptr) visit(*second, false, true);
  }
  return common;
}

}  // namespace detail

/// Keys or values in pages of `page_size` tokens. KV head h of sequence b has table h / heads_per_page and lies in row
/// h % heads_per_page of its pages, where heads_per_page is pages.extent(1):
///
/// - pages [pages, kv_heads, page_size, head_dim] and tables [batch, 1, ...]: one table a sequence, whose pages hold
///   the same tokens of all heads. Strides say whether heads or tokens come first within a page.
/// - pages [pages, 1, page_size, head_dim] and tables [batch, kv_heads, ...]: a table for each head, whose heads may
///   keep different numbers of tokens and share one pool.
///
/// With const elements it is a source for `gather_tokens`; else it also models `cache_layout`: `capacity(b, h)` is what
/// the pages of the head's table hold, so set `tables.lengths` to the tokens that are to come (the longest head's) and
/// fill in as many pages. `check()` then fails when a page occurs twice, and knows nothing of pages that tables
/// elsewhere hold too: give it pages that you allocated for it.
///
/// In memory of a device it is what kernels read and write; only its shapes can be checked there (`check_shapes`).
template <class T, memory_space Space = memory_space::host>
struct paged_layout {
  using value_type = std::remove_const_t<T>;        ///< of keys or values
  tensor_view<T, 4, Space> pages{};                 ///< [pages, heads_per_page, page_size, head_dim]
  basic_page_tables<const page_t, Space> tables{};  ///< which pages hold which tokens

  /// Tokens of a page.
  [[nodiscard]] constexpr index_t page_size() const noexcept { return pages.extent(2); }
  /// Tokens that a head's table says it has.
  [[nodiscard]] constexpr index_t length(index_t b, index_t h) const noexcept
    requires(Space == memory_space::host)
  {
    return tables.lengths(b, h / pages.extent(1));
  }
  ///@{
  /// See `cache_layout`.
  [[nodiscard]] constexpr index_t batch() const noexcept { return tables.batch(); }
  [[nodiscard]] constexpr index_t heads() const noexcept {
    return detail::saturated_product(tables.tables(), pages.extent(1));
  }
  [[nodiscard]] constexpr index_t head_dim() const noexcept { return pages.extent(3); }
  [[nodiscard]] constexpr index_t capacity(index_t b, index_t h) const noexcept
    requires(Space == memory_space::host)
  {
    return pages_of(length(b, h), page_size()) * page_size();
  }
  [[nodiscard]] constexpr tensor_view<T, 1> row(index_t b, index_t h, index_t slot) const noexcept
    requires(Space == memory_space::host)
  {
    const index_t page = tables.ids(b, h / pages.extent(1), slot / page_size());
    return pages[page][h % pages.extent(1)][slot % page_size()];
  }
  [[nodiscard]] byte_range touched() const noexcept { return touched_bytes(pages); }
  ///@}

  /// The part of `check` that looks at no entry of a table.
  [[nodiscard]] status check_shapes() const noexcept {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    RESTKV_RETURN_IF_FAILED(detail::check_view("pages", pages));
    RESTKV_RETURN_IF_FAILED(check_table_shapes(tables, page_size()));
    if constexpr (!std::is_const_v<T>) {
      if (may_overlap_itself(pages)) {
        return status::error(errc::aliasing, "pages overlaps itself: %lld pages of %lld tokens", ll(pages.extent(0)),
                             ll(page_size()));
      }
      if (touched().overlaps(touched_bytes(tables.ids)) || touched().overlaps(touched_bytes(tables.lengths))) {
        return status::error(errc::aliasing,
                             "pages spans %lld bytes, and the %lld entries of the tables lie among them",
                             ll(touched().last - touched().first), ll(tables.ids.size()));
      }
    }
    return {};
  }

  /// Fails on tables that do not fit the pool (`check_tables`), on a null pointer or a negative extent, and, where the
  /// pages can be written, on a page that occurs twice, on pages that share memory, and on tables within the pages.
  /// Cost: one look at each entry, twice for each 32768 pages of the pool.
  [[nodiscard]] status check() const noexcept
    requires(Space == memory_space::host)
  {
    RESTKV_RETURN_IF_FAILED(check_shapes());
    RESTKV_RETURN_IF_FAILED(check_tables(tables, pages.extent(0), page_size()));
    if constexpr (!std::is_const_v<T>) {
      if (const page_t twice = detail::common_page(tables, nullptr, page_size(), pages.extent(0)); twice != no_page) {
        return status::error(errc::aliasing, "page %lld of %lld occurs twice in the tables that are written to",
                             static_cast<long long>(twice), static_cast<long long>(pages.extent(0)));
      }
    }
    return {};
  }
};

}  // namespace restkv
