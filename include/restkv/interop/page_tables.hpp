// SPDX-License-Identifier: Apache-2.0
/// @file
/// Page tables as engines hold them: block tables, lists of pages behind each other (CSR), and slots.
///
/// What a table of another engine says is checked before anything follows it: a page out of range or one that a
/// sequence holds twice would be written through. Layouts of the pools themselves are in `page_tensors.hpp`.
///
/// | engine | tables | lengths | here |
/// |---|---|---|---|
/// | vLLM | block_table [batch, max_blocks] | seq_lens [batch] | `block_tables`, a view |
/// | FlashInfer | kv_indptr [batch + 1], kv_indices | kv_last_page_len [batch] | `page_lists`, to and from tables |
/// | a table for each KV head | [batch, kv_heads, max_blocks] | [batch, kv_heads] | `page_tables` itself |
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/cache/paged_layout.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

#include <limits>

namespace restkv {

/// The tables of an engine that has one for each sequence, as they are: block_table [batch, max_blocks] and lengths
/// [batch], any strides. Entries behind a sequence's pages may hold anything.
template <class Integer, memory_space Space>
[[nodiscard]] constexpr basic_page_tables<Integer, Space> block_tables(
    const tensor_view<Integer, 2, Space>& block_table, const tensor_view<Integer, 1, Space>& lengths) noexcept {
  return {{block_table.data,
           {block_table.extent(0), 1, block_table.extent(1)},
           {block_table.stride(0), 0, block_table.stride(1)}},
          {lengths.data, {lengths.extent(0), 1}, {lengths.stride(0), 0}}};
}

/// Checks tables that something else made: as `check_tables`, and that no sequence holds a page twice, in one table or
/// in two. Sequences may hold the same page: a prefix that they share. (vLLM fills what fell out of a sliding window
/// with its null block, page 0, which is such a page; those layers have their own tables and nothing left to evict.)
///
/// Cost: as `check_tables`, and one look at each entry for each 32768 pages of the pool.
[[nodiscard]] inline status check_engine_tables(const const_page_tables& tables, index_t pages,
                                                index_t page_size) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(check_tables(tables, pages, page_size));
  for (index_t b = 0; b < tables.batch(); ++b) {
    const const_page_tables mine = tables.sequence(b);
    const page_t twice = detail::common_page(mine, nullptr, page_size, pages);
    if (twice == no_page) continue;
    status outcome;
    index_t first_table = -1;
    index_t first_entry = -1;
    detail::visit_pages(mine, page_size, [&](index_t, index_t t, index_t i, page_t page) {
      if (page != twice) return true;
      if (first_table >= 0) {
        outcome = status::error(errc::aliasing,
                                "page %lld of %lld is entry %lld of table %lld and entry %lld of table %lld of "
                                "sequence %lld",
                                ll(page), ll(pages), ll(first_entry), ll(first_table), ll(i), ll(t), ll(b));
        return false;
      }
      first_table = t;
      first_entry = i;
      return true;
    });
    return outcome;
  }
  return {};
}

/// The pages of all tables one list behind the other (CSR), as FlashInfer takes them: those of row r are
/// indices[indptr[r]] to indices[indptr[r + 1] - 1], all full but the last, which holds last_page_len[r] tokens. A row
/// is a sequence, or a KV head of a sequence: r = b * tables + t. A row without pages has no tokens, whatever its
/// last_page_len says.
template <class Integer>
struct basic_page_lists {
  tensor_view<Integer, 1> indptr{};         ///< [rows + 1], ascending from 0
  tensor_view<Integer, 1> indices{};        ///< [indptr[rows]] or more, numbers of pages
  tensor_view<Integer, 1> last_page_len{};  ///< [rows], within [1, page_size]

  constexpr basic_page_lists() = default;
  /// A view of arrays in memory of your own.
  constexpr basic_page_lists(tensor_view<Integer, 1> starts, tensor_view<Integer, 1> numbers,
                             tensor_view<Integer, 1> tokens) noexcept
      : indptr(starts), indices(numbers), last_page_len(tokens) {}
  /// Lists that may be changed are lists that may be read.
  template <class U>
  requires std::is_same_v<const U, Integer>
  constexpr basic_page_lists(const basic_page_lists<U>& other) noexcept  // NOLINT(google-explicit-constructor)
      : indptr(other.indptr), indices(other.indices), last_page_len(other.last_page_len) {}

  /// Lists: sequences, or heads of sequences.
  [[nodiscard]] constexpr index_t rows() const noexcept { return last_page_len.extent(0); }
  /// Pages of a row.
  [[nodiscard]] constexpr index_t pages_in(index_t row) const noexcept {
    return static_cast<index_t>(indptr(row + 1)) - indptr(row);
  }
  /// Tokens of a row.
  [[nodiscard]] constexpr index_t length(index_t row, index_t page_size) const noexcept {
    return pages_in(row) == 0 ? 0 : (pages_in(row) - 1) * page_size + last_page_len(row);
  }
};

/// Lists that are written.
using page_lists = basic_page_lists<page_t>;
/// Lists that are read.
using const_page_lists = basic_page_lists<const page_t>;

namespace detail {

/// That lists have as many entries as they have rows, and memory.
[[nodiscard]] inline status check_list_shapes(const const_page_lists& lists) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(check_view("indptr", lists.indptr));
  RESTKV_RETURN_IF_FAILED(check_view("indices", lists.indices));
  RESTKV_RETURN_IF_FAILED(check_view("last_page_len", lists.last_page_len));
  if (lists.indptr.extent(0) != lists.rows() + 1) {
    return status::error(errc::shape_mismatch, "indptr has %lld entries, %lld rows of last_page_len need %lld",
                         ll(lists.indptr.extent(0)), ll(lists.rows()), ll(lists.rows() + 1));
  }
  return {};
}

/// That tables have as many rows as lists, in other memory.
[[nodiscard]] inline status check_same_rows(const const_page_lists& lists, const const_page_tables& tables) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (tables.batch() * tables.tables() != lists.rows()) {
    return status::error(errc::shape_mismatch, "the lists have %lld rows, %lld sequences of %lld tables need %lld",
                         ll(lists.rows()), ll(tables.batch()), ll(tables.tables()),
                         ll(tables.batch() * tables.tables()));
  }
  for (const byte_range& list :
       {touched_bytes(lists.indptr), touched_bytes(lists.indices), touched_bytes(lists.last_page_len)}) {
    RESTKV_RETURN_IF_FAILED(check_disjoint("the lists", list, "tables.ids", touched_bytes(tables.ids)));
    RESTKV_RETURN_IF_FAILED(check_disjoint("the lists", list, "tables.lengths", touched_bytes(tables.lengths)));
  }
  return {};
}

}  // namespace detail

/// Checks lists that something else made: entries for each row, indptr ascending from 0 and ending within indices,
/// pages within [0, pages), last pages of 1 to page_size tokens, no sequence that holds a page twice. `tables` is how
/// many rows belong to a sequence.
///
/// Cost: one look at each entry, twice for each 32768 pages of the pool.
[[nodiscard]] inline status check_page_lists(const const_page_lists& lists, index_t tables, index_t pages,
                                             index_t page_size) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(detail::check_list_shapes(lists));
  if (page_size < 1) {
    return status::error(errc::invalid_argument, "the page size is %lld tokens, must be at least 1", ll(page_size));
  }
  if (tables < 1 || lists.rows() % tables != 0) {
    return status::error(errc::shape_mismatch, "%lld rows of lists do not divide into sequences of %lld tables",
                         ll(lists.rows()), ll(tables));
  }
  if (lists.indptr(0) != 0) {
    return status::error(errc::invalid_argument, "indptr begins with %lld, must begin with 0", ll(lists.indptr(0)));
  }
  constexpr index_t most_tokens = std::numeric_limits<position_t>::max();
  for (index_t row = 0; row < lists.rows(); ++row) {
    const index_t begin = lists.indptr(row);
    const index_t end = lists.indptr(row + 1);
    if (end < begin || end > lists.indices.extent(0)) {
      return status::error(errc::invalid_argument,
                           "row %lld has pages %lld to %lld of indices: indptr must ascend and end by %lld", ll(row),
                           ll(begin), ll(end), ll(lists.indices.extent(0)));
    }
    const index_t last = lists.last_page_len(row);
    if (end > begin && (last < 1 || last > page_size)) {
      return status::error(errc::invalid_argument,
                           "the last page of row %lld holds %lld tokens, must be within [1, %lld]", ll(row), ll(last),
                           ll(page_size));
    }
    if (end - begin > most_tokens / page_size) {
      return status::error(errc::invalid_argument, "row %lld has %lld pages of %lld tokens, the longest axis is %lld",
                           ll(row), ll(end - begin), ll(page_size), ll(most_tokens));
    }
    for (index_t i = begin; i < end; ++i) {
      if (lists.indices(i) >= 0 && lists.indices(i) < pages) continue;
      return status::error(errc::invalid_argument, "index %lld, in row %lld, is page %lld, the pool has %lld pages",
                           ll(i), ll(row), ll(lists.indices(i)), ll(pages));
    }
  }
  for (index_t row = 0; row < lists.rows(); row += tables) {
    // The rows of a sequence are one list: as a table of pages with one token each.
    const index_t begin = lists.indptr(row);
    const auto count = static_cast<position_t>(lists.indptr(row + tables) - begin);
    const tensor_view<const page_t, 1> list = lists.indices.slice(0, begin, count);
    const const_page_tables whole({list.data, {1, 1, count}, {0, 0, list.stride(0)}}, {&count, {1, 1}});
    const page_t twice = detail::common_page(whole, nullptr, 1, pages);
    if (twice == no_page) continue;
    index_t first = begin;
    while (lists.indices(first) != twice) ++first;
    index_t second = first + 1;
    while (lists.indices(second) != twice) ++second;
    return status::error(errc::aliasing, "indices %lld and %lld, both of sequence %lld, are page %lld of %lld",
                         ll(first), ll(second), ll(row / tables), ll(twice), ll(pages));
  }
  return {};
}

/// Lists as tables, for everything that works on a cache in pages. tables: [batch, tables, most_pages] in memory of the
/// caller's, with at least as many entries as the longest row; entries behind a table's pages become `no_page`.
///
/// Fails, with nothing changed, as `check_page_lists`, and where the tables have other rows or too few entries. Cost:
/// one write of the tables.
[[nodiscard]] inline status read_page_lists(const const_page_lists& lists, index_t pages, index_t page_size,
                                            const page_tables& tables) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(check_table_shapes(tables, page_size));
  RESTKV_RETURN_IF_FAILED(detail::check_same_rows(lists, tables));
  if (lists.rows() == 0) return {};
  RESTKV_RETURN_IF_FAILED(check_page_lists(lists, tables.tables(), pages, page_size));
  for (index_t row = 0; row < lists.rows(); ++row) {
    if (lists.pages_in(row) <= tables.most_pages()) continue;
    return status::error(errc::shape_mismatch, "row %lld has %lld pages, a table has room for %lld", ll(row),
                         ll(lists.pages_in(row)), ll(tables.most_pages()));
  }
  for (index_t b = 0; b < tables.batch(); ++b) {
    for (index_t t = 0; t < tables.tables(); ++t) {
      const index_t row = b * tables.tables() + t;
      const index_t count = lists.pages_in(row);
      tables.lengths(b, t) = static_cast<position_t>(lists.length(row, page_size));
      for (index_t i = 0; i < tables.most_pages(); ++i) {
        tables.ids(b, t, i) = i < count ? lists.indices(lists.indptr(row) + i) : no_page;
      }
    }
  }
  return {};
}

/// Tables as lists, after they have changed. The lists may lie in the arrays they were read from: compaction only makes
/// them shorter.
///
/// lists: [tables.batch() * tables.tables() + 1], at least as many indices as the tables have pages, and [batch *
/// tables]. A row without tokens has a last_page_len of 0.
///
/// Fails, with nothing changed, on tables that do not fit a pool of `pages` pages, other rows, and too few indices.
/// Cost: one write of the lists.
[[nodiscard]] inline status write_page_lists(const const_page_tables& tables, index_t pages, index_t page_size,
                                             const page_lists& lists) noexcept {
  RESTKV_RETURN_IF_FAILED(check_tables(tables, pages, page_size));
  RESTKV_RETURN_IF_FAILED(detail::check_list_shapes(lists));
  RESTKV_RETURN_IF_FAILED(detail::check_same_rows(lists, tables));
  index_t needed = 0;
  detail::visit_pages(tables, page_size, [&](index_t, index_t, index_t, page_t) { return ++needed > 0; });
  if (needed > lists.indices.extent(0) || needed > std::numeric_limits<page_t>::max()) {
    return status::error(errc::shape_mismatch, "the tables hold %lld pages, indices has room for %lld",
                         static_cast<long long>(needed), static_cast<long long>(lists.indices.extent(0)));
  }
  page_t end = 0;
  lists.indptr(0) = 0;
  for (index_t b = 0; b < tables.batch(); ++b) {
    for (index_t t = 0; t < tables.tables(); ++t) {
      const index_t row = b * tables.tables() + t;
      const index_t length = tables.lengths(b, t);
      const index_t count = pages_of(length, page_size);
      for (index_t i = 0; i < count; ++i) lists.indices(end++) = tables.ids(b, t, i);
      lists.indptr(row + 1) = end;
      lists.last_page_len(row) = static_cast<position_t>(count == 0 ? 0 : length - (count - 1) * page_size);
    }
  }
  return {};
}

/// What a slot mapping holds for a token that is not stored.
inline constexpr std::int64_t no_slot = -1;

/// Where tokens [first, first + mapping.extent(0)) of a table lie, as kernels that write a cache want it:
/// mapping[i] = page * page_size + place for the pages that hold them.
///
/// Tokens are counted by what the cache holds, not by positions in the text: after an eviction the two differ, and an
/// engine that finds slots by position (position / block_size) would write behind its tables. To append, extend the
/// sequence first (`extend_sequence`), then ask for the slots of the new tokens.
///
/// Fails, with nothing changed, on tables that do not fit the pool, a table that does not exist, and tokens that it
/// does not have.
[[nodiscard]] inline status slot_mapping(const const_page_tables& tables, index_t pages, index_t page_size,
                                         index_t sequence, index_t table, index_t first,
                                         const tensor_view<std::int64_t, 1>& mapping) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(check_table_shapes(tables, page_size));
  if (sequence < 0 || sequence >= tables.batch() || table < 0 || table >= tables.tables()) {
    return status::error(errc::invalid_argument, "table %lld of sequence %lld: there are %lld sequences of %lld tables",
                         ll(table), ll(sequence), ll(tables.batch()), ll(tables.tables()));
  }
  RESTKV_RETURN_IF_FAILED(check_tables(tables.sequence(sequence), pages, page_size));
  const index_t length = tables.lengths(sequence, table);
  const index_t count = mapping.extent(0);
  if (first < 0 || count < 0 || count > length - first) {
    return status::error(errc::invalid_argument, "%lld slots from token %lld on: the table has %lld tokens", ll(count),
                         ll(first), ll(length));
  }
  RESTKV_RETURN_IF_FAILED(detail::check_view("mapping", mapping));
  for (index_t i = 0; i < count; ++i) {
    const index_t n = first + i;
    mapping(i) = static_cast<std::int64_t>(tables.ids(sequence, table, n / page_size)) * page_size + n % page_size;
  }
  return {};
}

}  // namespace restkv
