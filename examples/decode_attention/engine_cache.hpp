// SPDX-License-Identifier: Apache-2.0
/// @file
/// A cache as an engine holds it after compaction, ragged and in pages, both of which grow by a token a step.
#pragma once

#include <restkv/cache/compact.hpp>
#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_sequence.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

/// Keys and values [batch, kv_heads, tokens, head_dim]; of sequence b, the first lengths[b] tokens are there.
template <class T>
struct cache_tensors {
  restkv::tensor_view<const T, 4> key;
  restkv::tensor_view<const T, 4> value;
};

/// The heads of all sequences one behind the other, without gaps.
template <class T>
struct ragged_cache {
  restkv::index_t kv_heads = 0;
  restkv::index_t head_dim = 0;
  std::vector<T> key;                    ///< [total_tokens, head_dim]
  std::vector<T> value;                  ///< [total_tokens, head_dim]
  std::vector<std::int64_t> cu_seqlens;  ///< [batch * kv_heads + 1]

  /// The kept tokens of a prompt.
  ragged_cache(const restkv::const_kept_tokens& kept, const cache_tensors<T>& prompt)
      : kv_heads(kept.heads()),
        head_dim(prompt.key.extent(3)),
        key(static_cast<std::size_t>(kept.total() * head_dim)),
        value(key.size()),
        cu_seqlens(static_cast<std::size_t>(kept.batch() * kept.heads() + 1)) {
    const auto rows = static_cast<restkv::index_t>(cu_seqlens.size());
    restkv::throw_if_failed(restkv::ragged_offsets(kept, {cu_seqlens.data(), {rows}}));
    const auto layout = [&](std::vector<T>& buffer) {
      return restkv::ragged_layout<T>{.rows = {buffer.data(), {kept.total(), head_dim}},
                                      .offsets = {cu_seqlens.data(), {rows}},
                                      .sequences = kept.batch(),
                                      .heads_per_sequence = kept.heads()};
    };
    restkv::throw_if_failed(restkv::compact(kept, prompt.key, prompt.value, layout(key), layout(value)));
  }

  /// Appends tokens [from[b], to[b]) of `more` to each head of sequence b. A cache without gaps is copied for that;
  /// engines that decode keep a tail for new tokens beside it, or pages.
  void append(const cache_tensors<T>& more, std::span<const std::int32_t> from, std::span<const std::int32_t> to) {
    std::vector<T> keys;
    std::vector<T> values;
    std::vector<std::int64_t> offsets{0};
    for (std::size_t row = 0; row + 1 < cu_seqlens.size(); ++row) {
      const auto b = static_cast<restkv::index_t>(row) / kv_heads;
      const auto h = static_cast<restkv::index_t>(row) % kv_heads;
      const restkv::index_t begin = from[static_cast<std::size_t>(b)];
      const restkv::index_t end = to[static_cast<std::size_t>(b)];
      const auto join = [&](const std::vector<T>& old, const restkv::tensor_view<const T, 4>& fresh,
                            std::vector<T>& out) {
        out.insert(out.end(), old.begin() + cu_seqlens[row] * head_dim, old.begin() + cu_seqlens[row + 1] * head_dim);
        for (restkv::index_t n = begin; n < end; ++n) {
          const restkv::tensor_view<const T, 1> token = fresh[b][h][n];
          for (restkv::index_t c = 0; c < head_dim; ++c) out.push_back(token(c));
        }
      };
      join(key, more.key, keys);
      join(value, more.value, values);
      offsets.push_back(offsets.back() + cu_seqlens[row + 1] - cu_seqlens[row] + end - begin);
    }
    key = std::move(keys);
    value = std::move(values);
    cu_seqlens = std::move(offsets);
  }
};

/// A pool of pages of one head's tokens, and a table for each KV head of each sequence.
template <class T>
struct paged_cache {
  restkv::index_t batch;
  restkv::index_t kv_heads;
  restkv::index_t head_dim;
  restkv::index_t page_size;
  restkv::index_t most_pages;               ///< entries of a table
  restkv::index_t pages;                    ///< of the pool
  std::vector<T> key;                       ///< [pages, page_size, head_dim]
  std::vector<T> value;                     ///< [pages, page_size, head_dim]
  std::vector<restkv::page_t> ids;          ///< [batch * kv_heads, most_pages]
  std::vector<restkv::position_t> lengths;  ///< [batch * kv_heads]
  std::vector<std::byte> pool_memory;
  restkv::page_pool pool;

  /// An empty pool in which every head may have `most_tokens` tokens. What no token was written to holds 1000: far from
  /// any key or value, so that a kernel that looks there shows it.
  paged_cache(restkv::index_t sequences, restkv::index_t heads, restkv::index_t channels,
              restkv::index_t tokens_in_page, restkv::index_t most_tokens)
      : batch(sequences),
        kv_heads(heads),
        head_dim(channels),
        page_size(tokens_in_page),
        most_pages(restkv::pages_of(most_tokens, page_size)),
        pages(batch * kv_heads * most_pages),
        key(static_cast<std::size_t>(pages * page_size * head_dim), T(1000.0f)),
        value(key),
        ids(static_cast<std::size_t>(batch * kv_heads * most_pages), restkv::no_page),
        lengths(static_cast<std::size_t>(batch * kv_heads)),
        pool_memory(restkv::page_pool::required_bytes(pages)) {
    restkv::throw_if_failed(pool.reset(pages, restkv::workspace(pool_memory)));
  }

  [[nodiscard]] restkv::page_tables tables() noexcept {
    return {{ids.data(), {batch, kv_heads, most_pages}}, {lengths.data(), {batch, kv_heads}}};
  }
  /// [pages, 1, page_size, head_dim]
  [[nodiscard]] restkv::tensor_view<T, 4> view(std::vector<T>& tensor) noexcept {
    return {tensor.data(), {pages, 1, page_size, head_dim}};
  }

  /// Appends tokens [from[b], to[b]) of `more` to each head of sequence b.
  void append(const cache_tensors<T>& more, std::span<const std::int32_t> from, std::span<const std::int32_t> to) {
    const restkv::paged_layout<T> keys{view(key), tables()};
    const restkv::paged_layout<T> values{view(value), tables()};
    for (restkv::index_t b = 0; b < batch; ++b) {
      const restkv::index_t begin = from[static_cast<std::size_t>(b)];
      const restkv::index_t count = to[static_cast<std::size_t>(b)] - begin;
      restkv::throw_if_failed(restkv::extend_sequence(pool, tables(), b, count, keys.pages, values.pages));
      for (restkv::index_t h = 0; h < kv_heads; ++h) {
        const restkv::index_t old = keys.length(b, h) - count;
        for (restkv::index_t n = 0; n < count; ++n) {
          for (restkv::index_t c = 0; c < head_dim; ++c) {
            keys.row(b, h, old + n)(c) = more.key(b, h, begin + n, c);
            values.row(b, h, old + n)(c) = more.value(b, h, begin + n, c);
          }
        }
      }
    }
  }

  /// Keeps only what `kept` names, in place. Pages behind it are free again.
  void keep(const restkv::const_kept_tokens& kept) {
    std::vector<std::byte> memory(restkv::page_moves_bytes(tables()));
    restkv::page_moves moves;
    restkv::throw_if_failed(
        restkv::compact_pages(pool, kept, tables(), restkv::workspace(memory), moves, view(key), view(value)));
  }
};
