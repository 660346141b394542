// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a `kernel_backend` compacts from and to: tensors, rows of ragged heads and pages in its memory, and what the
/// host checks of them before anything is launched.
///
/// What the host can see is checked: shapes, null pointers, room for the kept set's capacity, and memory that overlaps.
/// What lies in a device's memory is not: a kept set must come from `select` or have passed `check_kept`, tables of
/// pages must have passed `paged_layout::check` on the host, and each writable page must be in them once.
#pragma once

#include <restkv/backend/kernel_backend.hpp>
#include <restkv/cache/compact.hpp>
#include <restkv/cache/paged_layout.hpp>
#include <restkv/kernel/gather_rows.hpp>

namespace restkv {

/// Keys or values of all heads behind each other, as variable-length attention kernels take them, in a backend's
/// memory: head h of sequence b has rows offsets(b * heads + h) .. offsets(b * heads + h + 1). `ragged_offsets` fills
/// in the offsets.
template <class T, memory_space Space>
struct ragged_rows {
  tensor_view<T, 2, Space> rows{};                      ///< [total_tokens, head_dim]
  tensor_view<const std::int64_t, 1, Space> offsets{};  ///< [batch * heads + 1] (cu_seqlens)
};

namespace detail {

/// The kept set that an executor works on; a mutable one converts.
template <class Executor>
using kept_of = std::type_identity_t<basic_kept_tokens<const position_t, Executor::space>>;

/// What a kind of rows is made of.
template <class Rows>
struct rows_traits;
template <class T, memory_space Space>
struct rows_traits<tensor_view<T, 4, Space>> {
  using element_type = T;
  static constexpr memory_space space = Space;
  static constexpr bool readable = true;
};
template <class T, memory_space Space>
struct rows_traits<ragged_rows<T, Space>> {
  using element_type = T;
  static constexpr memory_space space = Space;
  static constexpr bool readable = false;
};
template <class T, memory_space Space>
struct rows_traits<paged_layout<T, Space>> {
  using element_type = T;
  static constexpr memory_space space = Space;
  static constexpr bool readable = true;
};

/// The type of the elements of rows, never const.
template <class Rows>
using rows_value_t = std::remove_const_t<typename rows_traits<Rows>::element_type>;

/// Rows that kernels write.
template <class Rows, memory_space Space>
concept output_rows = rows_traits<Rows>::space == Space && !std::is_const_v<typename rows_traits<Rows>::element_type>;
/// Rows that kernels read: [batch, heads, tokens, channels], or pages.
template <class Rows, memory_space Space>
concept source_rows = rows_traits<Rows>::space == Space && rows_traits<Rows>::readable;
/// Rows that a source's tokens can be copied to.
template <class Rows, class Source>
concept takes_rows_of =
    output_rows<Rows, rows_traits<Source>::space> && std::same_as<rows_value_t<Rows>, rows_value_t<Source>>;

///@{
/// The memory of rows.
template <class T, memory_space Space>
[[nodiscard]] constexpr const tensor_view<T, 4, Space>& memory_of(const tensor_view<T, 4, Space>& rows) noexcept {
  return rows;
}
template <class T, memory_space Space>
[[nodiscard]] constexpr const tensor_view<T, 2, Space>& memory_of(const ragged_rows<T, Space>& rows) noexcept {
  return rows.rows;
}
template <class T, memory_space Space>
[[nodiscard]] constexpr const tensor_view<T, 4, Space>& memory_of(const paged_layout<T, Space>& rows) noexcept {
  return rows.pages;
}
///@}

template <class Rows>
[[nodiscard]] constexpr index_t channels_of(const Rows& rows) noexcept {
  const auto& memory = memory_of(rows);
  return memory.extent(memory.rank - 1);
}

///@{
/// Sequences and heads of a source.
template <class Source>
[[nodiscard]] constexpr index_t batch_of(const Source& source) noexcept {
  if constexpr (requires { source.tables; }) {
    return source.batch();
  } else {
    return source.extent(0);
  }
}
template <class Source>
[[nodiscard]] constexpr index_t heads_of(const Source& source) noexcept {
  if constexpr (requires { source.tables; }) {
    return source.heads();
  } else {
    return source.extent(1);
  }
}
///@}

/// That a source is consistent, as far as the host can see. Pages that can be written are distinct.
template <class Source>
[[nodiscard]] status check_rows(const char* name, const Source& source) noexcept {
  if constexpr (requires { source.tables; }) {
    return source.check_shapes();
  } else {
    return check_view(name, source);
  }
}

/// That values have the sequences and heads of their keys, and their tokens where no table has them.
template <class Key, class Value>
[[nodiscard]] status check_beside_rows(const Key& key, const Value& value) noexcept {
  if constexpr (requires { key.extent(2), value.extent(2); }) {
    return check_beside(key, value);
  } else {
    RESTKV_RETURN_IF_FAILED(check_equal("value", "sequences", batch_of(value), "key", batch_of(key)));
    return check_equal("value", "heads", heads_of(value), "key", heads_of(key));
  }
}

[[nodiscard]] inline status check_room(const char* name, index_t room, index_t capacity) noexcept {
  if (room >= capacity) return {};
  return status::error(errc::shape_mismatch, "%s has room for %lld tokens a head, the kept set holds up to %lld", name,
                       static_cast<long long>(room), static_cast<long long>(capacity));
}

///@{
/// That an output has a place for every token that a kept set may hold, and no place twice.
template <class Kept, class T, memory_space Space>
[[nodiscard]] status check_places(const Kept& kept, const char* name, const tensor_view<T, 4, Space>& out) noexcept {
  RESTKV_RETURN_IF_FAILED(check_view(name, out));
  RESTKV_RETURN_IF_FAILED(check_distinct(name, out));
  RESTKV_RETURN_IF_FAILED(check_equal(name, "sequences", out.extent(0), "the kept set", kept.batch()));
  RESTKV_RETURN_IF_FAILED(check_equal(name, "heads", out.extent(1), "the kept set", kept.heads()));
  return check_room(name, out.extent(2), kept.capacity());
}
template <class Kept, class T, memory_space Space>
[[nodiscard]] status check_places(const Kept& kept, const char* name, const ragged_rows<T, Space>& out) noexcept {
  RESTKV_RETURN_IF_FAILED(check_view(name, out.rows));
  RESTKV_RETURN_IF_FAILED(check_view("offsets", out.offsets));
  RESTKV_RETURN_IF_FAILED(check_ragged_entries(out.offsets.extent(0), kept.batch(), kept.heads()));
  RESTKV_RETURN_IF_FAILED(check_distinct(name, out.rows));
  RESTKV_RETURN_IF_FAILED(check_disjoint(name, touched_bytes(out.rows), "offsets", touched_bytes(out.offsets)));
  const index_t most = kept.batch() * kept.heads() * kept.capacity();
  if (out.rows.extent(0) >= most) return {};
  return status::error(errc::shape_mismatch, "%s has %lld rows, the kept set holds up to %lld tokens", name,
                       static_cast<long long>(out.rows.extent(0)), static_cast<long long>(most));
}
template <class Kept, class T, memory_space Space>
[[nodiscard]] status check_places(const Kept& kept, const char* name, const paged_layout<T, Space>& out) noexcept {
  RESTKV_RETURN_IF_FAILED(out.check_shapes());
  RESTKV_RETURN_IF_FAILED(check_equal(name, "sequences", out.batch(), "the kept set", kept.batch()));
  RESTKV_RETURN_IF_FAILED(check_equal(name, "heads", out.heads(), "the kept set", kept.heads()));
  return check_room(name, out.tables.most_pages() * out.page_size(), kept.capacity());
}
///@}

/// Two paged tensors of one pool with tables of their own: which pages they share only the tables say.
template <class First, class Second>
[[nodiscard]] constexpr bool apart_by_tables(const First& first, const Second& second) noexcept {
  if constexpr (requires {
                  first.tables;
                  second.tables;
                }) {
    const auto& a = first.pages;
    const auto& b = second.pages;
    return static_cast<const void*>(a.data) == static_cast<const void*>(b.data) && a.extents == b.extents &&
           a.strides == b.strides && first.tables.ids.data != second.tables.ids.data;
  } else {
    return false;
  }
}

/// That writing to `out` leaves a source alone. By bounds, but for two sets of tables of one pool.
template <class Source, class Out>
[[nodiscard]] status check_source_untouched(const char* from, const Source& source, const char* to,
                                            const Out& out) noexcept {
  const byte_range written = touched_bytes(memory_of(out));
  if constexpr (requires { source.tables; }) {
    RESTKV_RETURN_IF_FAILED(check_disjoint(to, written, "the source's tables", touched_bytes(source.tables.ids)));
    RESTKV_RETURN_IF_FAILED(check_disjoint(to, written, "the source's tables", touched_bytes(source.tables.lengths)));
  }
  if (apart_by_tables(source, out)) return {};
  return check_disjoint(to, written, from, touched_bytes(memory_of(source)));
}

/// That two outputs share no element, as far as the host can see.
template <class First, class Second>
[[nodiscard]] status check_outputs_apart(const char* first, const First& a, const char* second,
                                         const Second& b) noexcept {
  const auto& of_first = memory_of(a);
  const auto& of_second = memory_of(b);
  bool overlap = touched_bytes(of_first).overlaps(touched_bytes(of_second));
  if constexpr (requires { may_overlap(of_first, of_second); }) overlap = may_overlap(of_first, of_second);
  if (!overlap || apart_by_tables(a, b)) return {};
  return overlap_error(first, second, touched_bytes(of_first), touched_bytes(of_second));
}

/// Everything that `gather_tokens` checks.
template <class Kept, class Source, class Out>
[[nodiscard]] status check_gather_rows(const Kept& kept, const char* from, const Source& source, const char* to,
                                       const Out& out) noexcept {
  RESTKV_RETURN_IF_FAILED(check_rows(from, source));
  RESTKV_RETURN_IF_FAILED(check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(check_kept_shape(kept, batch_of(source), heads_of(source)));
  RESTKV_RETURN_IF_FAILED(check_places(kept, to, out));
  RESTKV_RETURN_IF_FAILED(check_apart_from_kept(kept, to, touched_bytes(memory_of(out))));
  RESTKV_RETURN_IF_FAILED(check_equal(to, "channels", channels_of(out), from, channels_of(source)));
  return check_source_untouched(from, source, to, out);
}

///@{
/// Rows for kernels; heads: of the kept set.
template <class Rows>
[[nodiscard]] kernel::token_rows kernel_rows(const Rows& rows, index_t) noexcept {
  return kernel::rows_of(rows);
}
template <class T, memory_space Space>
[[nodiscard]] kernel::token_rows kernel_rows(const ragged_rows<T, Space>& ragged, index_t heads) noexcept {
  kernel::token_rows rows =
      kernel::rows_of(tensor_view<T, 4, Space>(ragged.rows.data, {1, 1, ragged.rows.extent(0), ragged.rows.extent(1)},
                                               {0, 0, ragged.rows.stride(0), ragged.rows.stride(1)}));
  rows.offsets = ragged.offsets.data;
  rows.of_offset = ragged.offsets.stride(0);
  rows.heads = heads;
  return rows;
}
///@}

}  // namespace detail

}  // namespace restkv
