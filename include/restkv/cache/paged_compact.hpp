// SPDX-License-Identifier: Apache-2.0
/// @file
/// `compact_pages`: kept tokens of a paged cache move to the front of their tables, and whole pages become free.
///
/// `compact_pages` does this for one layer. Where the layers of a model share their tables (block ids that index a
/// tensor of each layer), take its three steps apart: `plan_page_moves` for the kept sets of all layers, `move_tokens`
/// for each tensor of each layer, `commit_page_moves`. `page_moves.hpp` says what becomes of shared pages.
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/cache/page_moves.hpp>

namespace restkv {

namespace detail {

template <class T>
[[nodiscard]] status check_paged_tensor(const page_moves& moves, const const_page_tables& tables,
                                        const const_kept_tokens& kept, const tensor_view<T, 4>& pages) noexcept {
  RESTKV_RETURN_IF_FAILED(check_view("pages", pages));
  RESTKV_RETURN_IF_FAILED(check_equal("pages", "tokens in a page", pages.extent(2), "the plan", moves.page_size));
  RESTKV_RETURN_IF_FAILED(check_equal("pages", "heads in a page", pages.extent(1), "the plan", moves.heads_per_page));
  RESTKV_RETURN_IF_FAILED(check_distinct("pages", pages));
  const byte_range bytes = touched_bytes(pages);
  RESTKV_RETURN_IF_FAILED(check_disjoint("pages", bytes, "kept.positions", touched_bytes(kept.positions)));
  RESTKV_RETURN_IF_FAILED(check_disjoint("pages", bytes, "kept.lengths", touched_bytes(kept.lengths)));
  RESTKV_RETURN_IF_FAILED(check_disjoint("pages", bytes, "tables.ids", touched_bytes(tables.ids)));
  RESTKV_RETURN_IF_FAILED(check_disjoint("pages", bytes, "tables.lengths", touched_bytes(tables.lengths)));
  return check_disjoint("pages", bytes, "the plan", touched_bytes(moves.ids));
}

/// Copies the kept tokens of one head in ascending order. A page that is written is the one its slots had, whose tokens
/// are read before they are written since slot <= position, or one that holds no kept token.
template <class T>
void move_tokens_of_head(const page_moves& moves, const const_kept_tokens& kept, const const_page_tables& tables,
                         const tensor_view<T, 4>& pages, index_t row) noexcept {
  const index_t b = row / kept.heads();
  const index_t h = row % kept.heads();
  const index_t t = h / moves.heads_per_page;
  const index_t in_page = h % moves.heads_per_page;
  const index_t size = moves.page_size;
  token_copier<T> copier(pages.extent(3));
  for (index_t slot = 0; slot < kept.lengths(b, h); ++slot) {
    const index_t position = kept.positions(b, h, slot);
    const page_t from = tables.ids(b, t, position / size);
    const page_t to = moves.ids(b, t, slot / size);
    if (from == to && position % size == slot % size) continue;
    copier.copy(pages[from][in_page][position % size], pages[to][in_page][slot % size]);
  }
  copier.flush();
}

}  // namespace detail

/// Moves the kept tokens of one tensor as planned; tables are those of the plan, not yet committed. Once for keys, for
/// values, and for arrays beside them (scales, positions), in every layer.
///
/// kept: the layer's set, one of those that the plan was made for; pages: [pages, heads_per_page, page_size, channels],
/// any strides, any trivially copyable type.
///
/// Fails, before anything is moved: a kept set that the plan is too short for, or a tensor that does not fit the pages,
/// overlaps itself, the kept set, the tables or the plan. Cost: one read and one write of the tokens that move.
template <class T, parallel_loop ParallelFor = serial_for>
  requires detail::copyable_bytes<T>
[[nodiscard]] status move_tokens(const page_moves& moves, const const_kept_tokens& kept,
                                 const const_page_tables& tables, const tensor_view<T, 4>& pages,
                                 const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_paged_tensor(moves, tables, kept, pages));
  RESTKV_RETURN_IF_FAILED(check_tables(tables, pages.extent(0), moves.page_size));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("the plan", "sequences", moves.ids.extent(0), "tables", tables.batch()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("the plan", "tables", moves.ids.extent(1), "tables", tables.tables()));
  RESTKV_RETURN_IF_FAILED(check_tables({moves.ids, moves.lengths}, pages.extent(0), moves.page_size));
  RESTKV_RETURN_IF_FAILED(detail::check_kept_of_tables(kept, tables, moves.heads_per_page));
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      const index_t planned = moves.lengths(b, h / moves.heads_per_page);
      if (kept.lengths(b, h) <= planned) continue;
      return status::error(errc::shape_mismatch, "head %lld of sequence %lld keeps %lld tokens, the plan is for %lld",
                           static_cast<long long>(h), static_cast<long long>(b),
                           static_cast<long long>(kept.lengths(b, h)), static_cast<long long>(planned));
    }
  }
  parallel_for(kept.batch() * kept.heads(),
               [&](index_t row) { detail::move_tokens_of_head(moves, kept, tables, pages, row); });
  return {};
}

/// Puts the plan's pages and lengths into the tables and lets go of the pages that they no longer hold; `moves.freed`
/// are those that are free again. Entries behind a table's pages become `no_page`.
///
/// Fails for tables of another size than the plan's, with nothing changed, and when the allocator refuses to release a
/// page, which one that keeps its counts does not.
template <page_allocator Allocator>
[[nodiscard]] status commit_page_moves(Allocator& allocator, page_moves& moves, const page_tables& tables) noexcept {
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (tables.ids.extent(axis) == moves.ids.extent(axis)) continue;
    return status::error(errc::shape_mismatch, "tables.ids has extent %lld on axis %zu, the plan %lld",
                         static_cast<long long>(tables.ids.extent(axis)), axis,
                         static_cast<long long>(moves.ids.extent(axis)));
  }
  for (index_t b = 0; b < tables.batch(); ++b) {
    for (index_t t = 0; t < tables.tables(); ++t) {
      for (index_t i = 0; i < tables.most_pages(); ++i) tables.ids(b, t, i) = moves.ids(b, t, i);
      tables.lengths(b, t) = moves.lengths(b, t);
    }
  }
  std::size_t count = 0;
  for (const page_t page : moves.released) {
    bool freed = false;
    RESTKV_RETURN_IF_FAILED(allocator.release(page, freed));
    if (freed) moves.released[count++] = page;
  }
  moves.freed = moves.released.first(count);
  return {};
}

namespace detail {

[[nodiscard]] inline status check_separate_tensors() noexcept { return {}; }
template <class First, class... Rest>
[[nodiscard]] status check_separate_tensors(const tensor_view<First, 4>& first,
                                            const tensor_view<Rest, 4>&... rest) noexcept {
  status outcome;
  [[maybe_unused]] const auto with = [&](const auto& other) {
    if (!outcome.ok() || !may_overlap(first, other)) return;
    outcome = overlap_error("one tensor of pages", "another", touched_bytes(first), touched_bytes(other));
  };
  (with(rest), ...);
  RESTKV_RETURN_IF_FAILED(outcome);
  return check_separate_tensors(rest...);
}

}  // namespace detail

/// Moves the kept tokens of a paged cache to the front of their tables and frees the pages behind them: afterwards slot
/// i of head h holds what was at position kept.positions(b, h, i), in every tensor, and `tables` says where.
///
/// kept: [batch, tables * heads_per_page], one set per KV head. tables: of all sequences that are compacted, or
/// `tables.sequence(b)` for one. pages: keys, values, and arrays beside them, each [pages, heads_per_page, page_size,
/// channels]. `moves.freed` says which pages are free again; the allocator has been told. memory: `page_moves_bytes`.
///
/// Pages of other sequences and shared pages keep their bytes; see `page_moves.hpp`. A table shared by heads of
/// different lengths is as long as the longest; use a table per head to free more.
///
/// Fails, with nothing changed, as `plan_page_moves` and `move_tokens` do, and when two tensors share memory.
///
/// Cost: one read and one write of the tokens that move.
template <page_allocator Allocator, class First, class... Rest>
  requires(detail::copyable_bytes<First> && (detail::copyable_bytes<Rest> && ...))
[[nodiscard]] status compact_pages(Allocator& allocator, const const_kept_tokens& kept, const page_tables& tables,
                                   workspace memory, page_moves& moves, const tensor_view<First, 4>& pages,
                                   const tensor_view<Rest, 4>&... more_pages) noexcept {
  RESTKV_RETURN_IF_FAILED(detail::check_separate_tensors(pages, more_pages...));
  page_moves made;
  RESTKV_RETURN_IF_FAILED(
      plan_page_moves(allocator, {&kept, 1}, tables, pages.extent(2), pages.extent(1), memory, made));
  status outcome;
  const auto check = [&](const auto& tensor) {
    if (outcome.ok()) outcome = detail::check_paged_tensor(made, tables, kept, tensor);
    if (outcome.ok()) {
      outcome = detail::check_equal("pages", "pages", tensor.extent(0), "the allocator",
                                    static_cast<index_t>(allocator.pages()));
    }
  };
  check(pages);
  (check(more_pages), ...);
  if (!outcome.ok()) {
    RESTKV_RETURN_IF_FAILED(cancel_page_moves(allocator, made));
    return outcome;
  }
  const auto move = [&](const auto& tensor) {
    for (index_t row = 0; row < kept.batch() * kept.heads(); ++row) {
      detail::move_tokens_of_head(made, kept, tables, tensor, row);
    }
  };
  move(pages);
  (move(more_pages), ...);
  RESTKV_RETURN_IF_FAILED(commit_page_moves(allocator, made, tables));
  moves = made;
  return {};
}

}  // namespace restkv
