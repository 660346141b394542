// SPDX-License-Identifier: Apache-2.0
/// @file
/// The life of a sequence in a paged cache: room for new tokens, a second sequence that shares its pages, the end.
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/cache/page_moves.hpp>

namespace restkv {

namespace detail {

[[nodiscard]] inline status check_sequence(const const_page_tables& tables, index_t page_size,
                                           index_t sequence) noexcept {
  RESTKV_RETURN_IF_FAILED(check_table_shapes(tables, page_size));
  if (sequence >= 0 && sequence < tables.batch()) return {};
  return status::error(errc::invalid_argument, "sequence %lld: the tables are of %lld sequences",
                       static_cast<long long>(sequence), static_cast<long long>(tables.batch()));
}

template <class T>
[[nodiscard]] status check_pool_tensor(const tensor_view<T, 4>& pages, index_t count, index_t page_size) noexcept {
  RESTKV_RETURN_IF_FAILED(check_view("pages", pages));
  RESTKV_RETURN_IF_FAILED(check_equal("pages", "pages", pages.extent(0), "the allocator", count));
  RESTKV_RETURN_IF_FAILED(check_equal("pages", "tokens in a page", pages.extent(2), "another tensor", page_size));
  return check_distinct("pages", pages);
}

template <class T>
void copy_page(const tensor_view<T, 4>& pages, page_t from, page_t to, index_t tokens) noexcept {
  token_copier<T> copier(pages.extent(3));
  for (index_t h = 0; h < pages.extent(1); ++h) {
    for (index_t n = 0; n < tokens; ++n) copier.copy(pages[from][h][n], pages[to][h][n]);
  }
  copier.flush();
}

}  // namespace detail

/// Makes room for `count` tokens behind those of each of a sequence's tables: takes the pages that this needs, and
/// where the last page is partly filled and shared, copies it to a page of the table's own first. The tables are
/// `count` tokens longer afterwards; writing them is the caller's.
///
/// pages: the tensors that the tables' pages belong to, each [pages, heads_per_page, page_size, channels].
///
/// Fails, with nothing changed: tables or tensors that do not fit, a table with too few entries, and too few free pages
/// (errc::workspace_too_small). Cost: one read and one write of a page at most for each table.
template <page_allocator Allocator, class First, class... Rest>
  requires(detail::copyable_bytes<First> && (detail::copyable_bytes<Rest> && ...))
[[nodiscard]] status extend_sequence(Allocator& allocator, const page_tables& tables, index_t sequence, index_t count,
                                     const tensor_view<First, 4>& pages,
                                     const tensor_view<Rest, 4>&... more_pages) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const auto in_pool = static_cast<index_t>(allocator.pages());
  const index_t page_size = pages.extent(2);
  RESTKV_RETURN_IF_FAILED(detail::check_sequence(tables, page_size, sequence));
  const page_tables mine = tables.sequence(sequence);
  RESTKV_RETURN_IF_FAILED(check_tables(mine, in_pool, page_size));
  status outcome = detail::check_pool_tensor(pages, in_pool, page_size);
  [[maybe_unused]] const auto check = [&](const auto& tensor) {
    if (outcome.ok()) outcome = detail::check_pool_tensor(tensor, in_pool, page_size);
  };
  (check(more_pages), ...);
  RESTKV_RETURN_IF_FAILED(outcome);

  // The page that the first new token goes to, where it is not a new one.
  const auto last_page = [&](index_t t) -> page_t {
    const index_t length = mine.lengths(0, t);
    return count > 0 && length % page_size != 0 ? mine.ids(0, t, length / page_size) : no_page;
  };
  index_t needed = 0;
  for (index_t t = 0; t < mine.tables(); ++t) {
    const index_t length = mine.lengths(0, t);
    const index_t most = std::min<index_t>(mine.most_pages() * page_size, 0x7fffffff);
    if (count < 0 || count > most - length) {
      return status::error(errc::shape_mismatch, "%lld tokens behind %lld of table %lld: it has room for 0 to %lld",
                           ll(count), ll(length), ll(t), ll(most - length));
    }
    needed += pages_of(length + count, page_size) - pages_of(length, page_size);
    if (const page_t last = last_page(t); last != no_page) {
      const auto references = static_cast<index_t>(allocator.references(last));
      if (references < 1) {
        return status::error(errc::invalid_argument, "page %lld of table %lld has %lld references", ll(last), ll(t),
                             ll(references));
      }
      needed += references > 1 ? 1 : 0;
    }
  }
  RESTKV_RETURN_IF_FAILED(detail::check_available(needed, static_cast<index_t>(allocator.available())));

  for (index_t t = 0; t < mine.tables(); ++t) {
    const index_t length = mine.lengths(0, t);
    const page_t last = last_page(t);
    if (last != no_page && static_cast<index_t>(allocator.references(last)) > 1) {
      page_t copy = no_page;
      bool freed = false;
      RESTKV_RETURN_IF_FAILED(allocator.allocate(copy));
      detail::copy_page(pages, last, copy, length % page_size);
      (detail::copy_page(more_pages, last, copy, length % page_size), ...);
      mine.ids(0, t, length / page_size) = copy;
      RESTKV_RETURN_IF_FAILED(allocator.release(last, freed));
    }
    for (index_t i = pages_of(length, page_size); i < pages_of(length + count, page_size); ++i) {
      page_t page = no_page;
      RESTKV_RETURN_IF_FAILED(allocator.allocate(page));
      mine.ids(0, t, i) = page;
    }
    mine.lengths(0, t) = static_cast<position_t>(length + count);
  }
  return {};
}

/// Makes sequence `to` hold what sequence `from` holds, by sharing its pages: for beams, or prompts with the same
/// beginning. `to` must be empty, and has the same number of tables.
///
/// tables: the tables of both. Fails, with nothing changed: tables that do not fit, a sequence that is not empty or
/// does not exist, and a page that cannot be shared. Cost: one reference more for each page; no token is read.
template <page_allocator Allocator>
[[nodiscard]] status fork_sequence(Allocator& allocator, const page_tables& tables, index_t page_size, index_t from,
                                   index_t to) noexcept {
  RESTKV_RETURN_IF_FAILED(check_tables(tables, static_cast<index_t>(allocator.pages()), page_size));
  RESTKV_RETURN_IF_FAILED(detail::check_sequence(tables, page_size, from));
  RESTKV_RETURN_IF_FAILED(detail::check_sequence(tables, page_size, to));
  for (index_t t = 0; t < tables.tables(); ++t) {
    if (from != to && tables.lengths(to, t) == 0) continue;
    return status::error(errc::invalid_argument, "sequence %lld cannot become a copy of %lld: it has %lld tokens",
                         static_cast<long long>(to), static_cast<long long>(from),
                         static_cast<long long>(tables.lengths(to, t)));
  }
  status outcome;
  index_t shared = 0;
  const const_page_tables source = tables.sequence(from);
  detail::visit_pages(source, page_size, [&](index_t, index_t t, index_t i, page_t page) {
    outcome = allocator.share(page);
    if (!outcome.ok()) return false;
    ++shared;
    tables.ids(to, t, i) = page;
    return true;
  });
  if (!outcome.ok()) {
    detail::visit_pages(source, page_size, [&](index_t, index_t t, index_t i, page_t page) {
      if (shared-- == 0) return false;
      tables.ids(to, t, i) = no_page;
      bool freed = false;
      return allocator.release(page, freed).ok();
    });
    return outcome;
  }
  for (index_t t = 0; t < tables.tables(); ++t) tables.lengths(to, t) = tables.lengths(from, t);
  return {};
}

/// Lets go of all pages of a sequence, which is empty afterwards; its entries become `no_page`.
///
/// Fails, with nothing changed, on tables that do not fit, a sequence that does not exist, and a page without a
/// reference; later only when the allocator refuses to release a page that has one.
template <page_allocator Allocator>
[[nodiscard]] status release_sequence(Allocator& allocator, const page_tables& tables, index_t page_size,
                                      index_t sequence) noexcept {
  RESTKV_RETURN_IF_FAILED(detail::check_sequence(tables, page_size, sequence));
  const page_tables mine = tables.sequence(sequence);
  RESTKV_RETURN_IF_FAILED(check_tables(mine, static_cast<index_t>(allocator.pages()), page_size));
  status outcome;
  const bool repeats =
      detail::common_page(mine, nullptr, page_size, static_cast<index_t>(allocator.pages())) != no_page;
  detail::visit_pages(mine, page_size, [&](index_t, index_t t, index_t i, page_t page) {
    index_t entries = 1;  // that hold this page
    if (repeats) {
      entries = 0;
      detail::visit_pages(mine, page_size, [&](index_t, index_t, index_t, page_t other) {
        entries += other == page ? 1 : 0;
        return true;
      });
    }
    const auto references = static_cast<index_t>(allocator.references(page));
    if (references >= entries) return true;
    outcome = status::error(errc::invalid_argument,
                            "entry %lld of table %lld is page %lld, which is in the tables %lld times and has %lld "
                            "references",
                            static_cast<long long>(i), static_cast<long long>(t), static_cast<long long>(page),
                            static_cast<long long>(entries), static_cast<long long>(references));
    return false;
  });
  RESTKV_RETURN_IF_FAILED(outcome);
  detail::visit_pages(mine, page_size, [&](index_t, index_t t, index_t i, page_t page) {
    bool freed = false;
    outcome = allocator.release(page, freed);
    if (outcome.ok()) mine.ids(0, t, i) = no_page;
    return outcome.ok();
  });
  RESTKV_RETURN_IF_FAILED(outcome);
  for (index_t t = 0; t < mine.tables(); ++t) mine.lengths(0, t) = 0;
  return {};
}

}  // namespace restkv
