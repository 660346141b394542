// SPDX-License-Identifier: Apache-2.0
/// @file
/// `page_pool`: which pages of a paged cache are free, and how many sequences refer to each of the others.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/core/workspace.hpp>

#include <concepts>
#include <cstdint>
#include <cstring>

namespace restkv {

/// The number of a page in its pool, as block tables of engines hold it.
using page_t = std::int32_t;

/// What a table holds where it has no page.
inline constexpr page_t no_page = -1;

namespace detail {

template <class A>
concept has_page_counts = requires(const A& allocator, page_t page) {
  { allocator.pages() } -> std::convertible_to<index_t>;
  { allocator.available() } -> std::convertible_to<index_t>;
  { allocator.references(page) } -> std::convertible_to<index_t>;
};

template <class A>
concept has_page_changes = requires(A& allocator, page_t page, page_t& taken, bool& freed) {
  { allocator.allocate(taken) } -> std::same_as<status>;
  { allocator.share(page) } -> std::same_as<status>;
  { allocator.release(page, freed) } -> std::same_as<status>;
};

}  // namespace detail

/// Who owns the pages of a cache. `page_pool` is one; an engine with a block manager of its own writes five lines
/// around that.
///
/// `pages()`: pages are numbered [0, pages()). `available()`: how many are free. `references(page)`: how many tables
/// hold the page, 0 for a free one; at least 2 for every page that must not be written, which is also how a page that a
/// prefix cache retains is protected. `allocate(page)`: takes a free page, with one reference; succeeds available()
/// times. `share(page)`: one reference more. `release(page, freed)`: one reference less; `freed` says whether that was
/// the last and the page is free again; succeeds for a page with references.
template <class A>
concept page_allocator = detail::has_page_counts<A> && detail::has_page_changes<A>;

/// A `page_allocator` over memory of the caller: a count of references for every page, and a stack of free pages. Pages
/// are handed out in the order 0, 1, 2 .. at first, later the last one freed first: the same calls give the same pages.
///
/// Not copyable, since a copy would hand out the same pages again. Not for several threads at once.
class page_pool {
 public:
  constexpr page_pool() noexcept = default;
  page_pool(const page_pool&) = delete;
  page_pool& operator=(const page_pool&) = delete;

  /// Bytes that `reset` needs for a pool of this size.
  [[nodiscard]] static std::size_t required_bytes(index_t pages) noexcept {
    workspace counted;
    counted.take<std::int32_t>(pages);
    counted.take<page_t>(pages);
    return counted.required_bytes();
  }

  /// A pool of `pages` pages, all free, whose book-keeping lies in `memory` from now on. Fails when that is smaller
  /// than `required_bytes(pages)`, and for a number of pages outside [0, 2^31); the pool is then as it was.
  [[nodiscard]] status reset(index_t pages, workspace memory) noexcept {
    if (pages < 0 || pages > most_pages) {
      return status::error(errc::invalid_argument, "a pool of %lld pages: must be within [0, %lld]",
                           static_cast<long long>(pages), static_cast<long long>(most_pages));
    }
    auto* const references = memory.take<std::int32_t>(pages);
    auto* const free = memory.take<page_t>(pages);
    RESTKV_RETURN_IF_FAILED(memory.check());
    references_ = references;
    free_ = free;
    pages_ = available_ = pages;
    if (pages > 0) std::memset(references_, 0, static_cast<std::size_t>(pages) * sizeof *references_);
    for (page_t page = 0; page < pages; ++page) free_[pages - 1 - page] = page;
    return {};
  }

  /// Pages of the pool, free or not.
  [[nodiscard]] constexpr index_t pages() const noexcept { return pages_; }
  /// Free pages.
  [[nodiscard]] constexpr index_t available() const noexcept { return available_; }
  /// How many tables hold a page; 0 when it is free or no page of this pool.
  [[nodiscard]] constexpr index_t references(page_t page) const noexcept {
    return contains(page) ? references_[page] : 0;
  }

  /// Takes a free page, with one reference. Fails with errc::workspace_too_small when there is none.
  [[nodiscard]] status allocate(page_t& page) noexcept {
    if (available_ == 0) {
      return status::error(errc::workspace_too_small, "no page is free: all %lld pages are in use",
                           static_cast<long long>(pages_));
    }
    page = free_[--available_];
    references_[page] = 1;
    return {};
  }

  /// One more table holds a page. Fails for a page that is free or not of this pool.
  [[nodiscard]] status share(page_t page) noexcept {
    RESTKV_RETURN_IF_FAILED(check_used(page));
    if (references_[page] == most_references) {
      return status::error(errc::invalid_argument, "page %lld has %lld references, no more can be counted",
                           static_cast<long long>(page), static_cast<long long>(references_[page]));
    }
    ++references_[page];
    return {};
  }

  /// One table less holds a page; `freed`: it was the last, and the page is free again. Fails for a page that is free
  /// already or not of this pool.
  [[nodiscard]] status release(page_t page, bool& freed) noexcept {
    RESTKV_RETURN_IF_FAILED(check_used(page));
    freed = --references_[page] == 0;
    if (freed) free_[available_++] = page;
    return {};
  }

 private:
  static constexpr index_t most_pages = 0x7fffffff;
  static constexpr std::int32_t most_references = 0x7fffffff;

  [[nodiscard]] constexpr bool contains(page_t page) const noexcept { return page >= 0 && page < pages_; }

  [[nodiscard]] status check_used(page_t page) const noexcept {
    if (!contains(page)) {
      return status::error(errc::invalid_argument, "page %lld is not one of the pool's %lld pages",
                           static_cast<long long>(page), static_cast<long long>(pages_));
    }
    if (references_[page] > 0) return {};
    return status::error(errc::invalid_argument, "page %lld of %lld is free: it has no reference to share or release",
                         static_cast<long long>(page), static_cast<long long>(pages_));
  }

  std::int32_t* references_ = nullptr;  // [pages]
  page_t* free_ = nullptr;              // [pages], the first `available_` are free
  index_t pages_ = 0;
  index_t available_ = 0;
};

namespace detail {

[[nodiscard]] inline status check_available(index_t needed, index_t available) noexcept {
  if (needed <= available) return {};
  return status::error(errc::workspace_too_small, "%lld pages are needed, %lld are free",
                       static_cast<long long>(needed), static_cast<long long>(available));
}

}  // namespace detail

}  // namespace restkv
