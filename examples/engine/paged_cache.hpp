// SPDX-License-Identifier: Apache-2.0
/// @file
/// `paged_cache`: keys and values of all layers of all sequences in one pool of pages.
#pragma once

#include "model.hpp"

#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_gather.hpp>
#include <restkv/cache/paged_sequence.hpp>

#include <cstddef>
#include <span>
#include <vector>

namespace engine {

/// A sequence has tables of its own in every layer: one for all KV heads, or one for each of them. All of them take
/// their pages from one pool, so what one layer or head does not use, any other can.
class paged_cache {
 public:
  struct sizes {
    index_t sequences;  ///< at a time
    index_t layers;
    index_t kv_heads;
    index_t head_dim;
    index_t heads_per_page;  ///< kv_heads: one table a layer; 1: one a head, whose heads may keep different numbers
    index_t page_size;       ///< tokens
    index_t pages;           ///< of the pool
    index_t most_tokens;     ///< of a sequence
  };

  explicit paged_cache(const sizes& how)
      : size_(how),
        most_pages_(restkv::pages_of(how.most_tokens, how.page_size)),
        key_memory_(static_cast<std::size_t>(how.pages * how.heads_per_page * how.page_size * how.head_dim)),
        value_memory_(key_memory_.size()),
        ids_(static_cast<std::size_t>(how.sequences * tables_of_sequence() * most_pages_), restkv::no_page),
        lengths_(static_cast<std::size_t>(how.sequences * tables_of_sequence())),
        pool_memory_(restkv::page_pool::required_bytes(how.pages)),
        move_memory_(restkv::page_moves_bytes(tables())) {
    restkv::throw_if_failed(pool_.reset(how.pages, restkv::workspace(pool_memory_)));
  }
  paged_cache(const paged_cache&) = delete;
  paged_cache& operator=(const paged_cache&) = delete;

  [[nodiscard]] const sizes& size() const noexcept { return size_; }
  [[nodiscard]] const restkv::page_pool& pool() const noexcept { return pool_; }
  [[nodiscard]] index_t tables_of_layer() const noexcept { return size_.kv_heads / size_.heads_per_page; }
  [[nodiscard]] index_t tables_of_sequence() const noexcept { return size_.layers * tables_of_layer(); }

  /// All tables. [sequences, layers * tables_of_layer, most_pages]
  [[nodiscard]] restkv::page_tables tables() noexcept {
    return {{ids_.data(), {size_.sequences, tables_of_sequence(), most_pages_}},
            {lengths_.data(), {size_.sequences, tables_of_sequence()}}};
  }
  /// Those of one layer of one sequence, as a batch of one.
  [[nodiscard]] restkv::page_tables tables(index_t sequence, index_t layer) noexcept {
    const restkv::page_tables mine = tables().sequence(sequence);
    return {mine.ids.slice(1, layer * tables_of_layer(), tables_of_layer()),
            mine.lengths.slice(1, layer * tables_of_layer(), tables_of_layer())};
  }
  /// Keys of one layer of one sequence, row(0, head, slot).
  [[nodiscard]] restkv::paged_layout<float> keys(index_t sequence, index_t layer) noexcept {
    return {key_pages(), tables(sequence, layer)};
  }
  [[nodiscard]] restkv::paged_layout<float> values(index_t sequence, index_t layer) noexcept {
    return {value_pages(), tables(sequence, layer)};
  }

  /// Appends tokens to all layers of a sequence. A last page that is shared is copied before it is written.
  ///
  /// Fails, with nothing changed, when too few pages are free.
  [[nodiscard]] restkv::status append(index_t sequence, const model& recorded, std::span<const token> tokens) {
    const auto count = static_cast<index_t>(tokens.size());
    RESTKV_RETURN_IF_FAILED(restkv::extend_sequence(pool_, tables(), sequence, count, key_pages(), value_pages()));
    for (index_t l = 0; l < size_.layers; ++l) {
      const model_layer& source = recorded.layers[static_cast<std::size_t>(l)];
      const restkv::paged_layout<float> key = keys(sequence, l);
      const restkv::paged_layout<float> value = values(sequence, l);
      for (index_t h = 0; h < size_.kv_heads; ++h) {
        const index_t first = key.length(0, h) - count;
        for (index_t i = 0; i < count; ++i) {
          const token n = tokens[static_cast<std::size_t>(i)];
          for (index_t c = 0; c < size_.head_dim; ++c) {
            key.row(0, h, first + i)(c) = source.key(h, n, c);
            value.row(0, h, first + i)(c) = source.value(h, n, c);
          }
        }
      }
    }
    return {};
  }

  /// Makes an empty sequence hold what another holds, in the same pages.
  [[nodiscard]] restkv::status share(index_t from, index_t to) noexcept {
    return restkv::fork_sequence(pool_, tables(), size_.page_size, from, to);
  }

  /// Keeps of one layer what `kept` names; the other pages are free again. Shared pages are never written.
  ///
  /// Fails, with nothing changed, when it takes copies of shared pages and too few pages are free.
  [[nodiscard]] restkv::status keep(index_t sequence, index_t layer, const restkv::const_kept_tokens& kept) noexcept {
    restkv::page_moves moves;
    return restkv::compact_pages(pool_, kept, tables(sequence, layer), restkv::workspace(move_memory_), moves,
                                 key_pages(), value_pages());
  }

  /// Lets go of all pages of a sequence.
  [[nodiscard]] restkv::status release(index_t sequence) noexcept {
    return restkv::release_sequence(pool_, tables(), size_.page_size, sequence);
  }

 private:
  [[nodiscard]] tensor_view<float, 4> key_pages() noexcept { return pages(key_memory_); }
  [[nodiscard]] tensor_view<float, 4> value_pages() noexcept { return pages(value_memory_); }
  [[nodiscard]] tensor_view<float, 4> pages(std::vector<float>& memory) noexcept {
    return {memory.data(), {size_.pages, size_.heads_per_page, size_.page_size, size_.head_dim}};
  }

  sizes size_;
  index_t most_pages_;
  std::vector<float> key_memory_;            // [pages, heads_per_page, page_size, head_dim]
  std::vector<float> value_memory_;          // the same
  std::vector<restkv::page_t> ids_;          // [sequences, tables, most_pages]
  std::vector<restkv::position_t> lengths_;  // [sequences, tables]
  std::vector<std::byte> pool_memory_;
  std::vector<std::byte> move_memory_;
  restkv::page_pool pool_;
};

}  // namespace engine
