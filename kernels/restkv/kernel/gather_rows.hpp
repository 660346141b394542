// SPDX-License-Identifier: Apache-2.0
/// @file
/// Where the tokens of a cache lie, for kernels that copy bytes: dense, ragged and paged caches in one description.
#pragma once

#include <restkv/cache/paged_layout.hpp>
#include <restkv/kernel/group.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace restkv::kernel {

/// N bytes that are moved together, of whatever type: it may be read and written where elements of another type lie.
template <int N>
struct [[gnu::may_alias]] alignas(N) moved_bytes {
  using word = std::conditional_t<N == 1, std::uint8_t, std::conditional_t<N == 2, std::uint16_t, std::uint32_t>>;
  word words[static_cast<std::size_t>(N) / sizeof(word)];
};

/// The rows of a cache: `head_dim` elements of `element_bytes` bytes each, strides in bytes. What lies behind the
/// pointers is the executor's memory.
struct token_rows {
  std::byte* data = nullptr;
  index_t of_batch = 0;    ///< stride of sequences, or of pages
  index_t of_head = 0;     ///< of heads, within a page where there are pages
  index_t of_token = 0;    ///< of tokens, within a page where there are pages
  index_t of_channel = 0;  ///< of channels
  index_t channels = 0;
  int element_bytes = 1;
  const std::int64_t* offsets = nullptr;  ///< ragged: the first token of each (sequence, head)
  index_t of_offset = 1;                  ///< stride of `offsets`, in entries
  index_t heads = 1;                      ///< of a sequence, where ragged
  const page_t* ids = nullptr;            ///< paged: [batch, tables, pages], strides in entries
  index_t ids_of_batch = 0;
  index_t ids_of_table = 0;
  index_t ids_of_page = 1;
  index_t heads_per_page = 1;
  index_t page_size = 1;

  /// Where a token begins, in bytes from `data`.
  [[nodiscard]] RESTKV_HD constexpr index_t offset(index_t b, index_t h, index_t slot) const noexcept {
    if (ids != nullptr) {
      const page_t page = ids[b * ids_of_batch + h / heads_per_page * ids_of_table + slot / page_size * ids_of_page];
      return page * of_batch + h % heads_per_page * of_head + slot % page_size * of_token;
    }
    if (offsets != nullptr) return (offsets[(b * heads + h) * of_offset] + slot) * of_token;
    return b * of_batch + h * of_head + slot * of_token;
  }
  /// True where each row can be moved `bytes` bytes at a time, aligned.
  [[nodiscard]] bool moves_by(index_t bytes) const noexcept {
    const auto fits = [&](index_t stride) { return stride % bytes == 0; };
    return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(bytes) == 0 && fits(of_batch) &&
           fits(of_head) && fits(of_token) && (channels == 1 || of_channel == element_bytes) &&
           fits(channels * element_bytes);
  }
  /// The same rows in units of `bytes` bytes, where `moves_by(bytes)`.
  [[nodiscard]] constexpr token_rows moved_by(int bytes) const noexcept {
    token_rows made = *this;
    made.channels = channels * element_bytes / bytes;
    made.element_bytes = bytes;
    made.of_channel = bytes;
    return made;
  }
};

///@{
/// The rows of a cache [batch, heads, tokens, channels], or of a layout.
template <class T, memory_space S>
[[nodiscard]] token_rows rows_of(const tensor_view<T, 4, S>& cache) noexcept {
  static_assert(sizeof(T) <= 8 && sizeof(T) == alignof(T), "elements of 1, 2, 4 or 8 bytes are moved");
  constexpr auto size = static_cast<index_t>(sizeof(T));
  token_rows rows;
  rows.data = reinterpret_cast<std::byte*>(const_cast<std::remove_const_t<T>*>(cache.data));
  rows.of_batch = cache.stride(0) * size;
  rows.of_head = cache.stride(1) * size;
  rows.of_token = cache.stride(2) * size;
  rows.of_channel = cache.stride(3) * size;
  rows.channels = cache.extent(3);
  rows.element_bytes = static_cast<int>(size);
  return rows;
}
template <class T>
[[nodiscard]] token_rows rows_of(const dense_layout<T>& layout) noexcept {
  return rows_of(layout.rows);
}
template <class T>
[[nodiscard]] token_rows rows_of(const ragged_layout<T>& layout) noexcept {
  token_rows rows = rows_of(tensor_view<T, 4>(layout.rows.data, {1, 1, layout.rows.extent(0), layout.rows.extent(1)},
                                              {0, 0, layout.rows.stride(0), layout.rows.stride(1)}));
  rows.offsets = layout.offsets.data;
  rows.of_offset = layout.offsets.stride(0);
  rows.heads = layout.heads_per_sequence;
  return rows;
}
template <class T, memory_space S>
[[nodiscard]] token_rows rows_of(const paged_layout<T, S>& layout) noexcept {
  token_rows rows = rows_of(layout.pages);
  const auto& ids = layout.tables.ids;
  rows.ids = ids.data;
  rows.ids_of_batch = ids.stride(0);
  rows.ids_of_table = ids.stride(1);
  rows.ids_of_page = ids.stride(2);
  rows.heads_per_page = layout.pages.extent(1);
  rows.page_size = layout.page_size();
  return rows;
}
///@}

/// The kept tokens of a batch as kernels read them.
struct kept_rows {
  const position_t* positions = nullptr;
  const position_t* lengths = nullptr;
  index_t batch = 0;
  index_t heads = 0;
  index_t capacity = 0;
  index_t of_batch = 0;
  index_t of_head = 0;
  index_t of_slot = 0;
  index_t lengths_of_batch = 0;
  index_t lengths_of_head = 0;

  constexpr kept_rows() = default;
  template <memory_space S>
  explicit kept_rows(const basic_kept_tokens<const position_t, S>& kept) noexcept
      : positions(kept.positions.data),
        lengths(kept.lengths.data),
        batch(kept.batch()),
        heads(kept.heads()),
        capacity(kept.capacity()),
        of_batch(kept.positions.stride(0)),
        of_head(kept.positions.stride(1)),
        of_slot(kept.positions.stride(2)),
        lengths_of_batch(kept.lengths.stride(0)),
        lengths_of_head(kept.lengths.stride(1)) {}

  /// Rows in all.
  [[nodiscard]] RESTKV_HD constexpr index_t count() const noexcept { return batch * heads; }
  /// Kept tokens of a head.
  [[nodiscard]] RESTKV_HD constexpr index_t length(index_t b, index_t h) const noexcept {
    return lengths[b * lengths_of_batch + h * lengths_of_head];
  }
  /// The position that a slot of a head holds.
  [[nodiscard]] RESTKV_HD constexpr index_t position(index_t b, index_t h, index_t slot) const noexcept {
    return positions[b * of_batch + h * of_head + slot * of_slot];
  }
};

/// Calls run with the bytes that elements are moved by as a compile-time number: 16 where all rows allow it, else their
/// size.
template <class Run>
void with_moved_bytes(int element_bytes, bool by_16, const Run& run) {
  if (by_16) {
    run(std::integral_constant<int, 16>{});
  } else if (element_bytes == 1) {
    run(std::integral_constant<int, 1>{});
  } else if (element_bytes == 2) {
    run(std::integral_constant<int, 2>{});
  } else if (element_bytes == 4) {
    run(std::integral_constant<int, 4>{});
  } else {
    run(std::integral_constant<int, 8>{});
  }
}

}  // namespace restkv::kernel
