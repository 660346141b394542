// SPDX-License-Identifier: Apache-2.0
/// @file
/// `gather_tokens`: copies the kept tokens of a cache, or of an array beside it, into a layout.
#pragma once

#include <restkv/cache/layout.hpp>
#include <restkv/cache/overlap.hpp>
#include <restkv/core/check_view.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <concepts>
#include <cstring>
#include <type_traits>

namespace restkv {

namespace detail {

struct loop_body_archetype {
  void operator()(index_t) const noexcept {}
};

template <class F>
concept takes_count_and_body = requires(const F& loop, index_t count, const loop_body_archetype& body) {
  loop(count, body);
};

}  // namespace detail

/// How the rows of a compaction are spread over threads: `loop(n, body)` runs body(0) .. body(n - 1), each once, in
/// any order, and returns when all are done. A backend's `parallel_for` is one.
template <class F>
concept parallel_loop = detail::takes_count_and_body<F>;

/// The loop of one thread.
struct serial_for {
  /// body(0) .. body(n - 1), in order.
  template <class Body>
  constexpr void operator()(index_t n, const Body& body) const {
    for (index_t i = 0; i < n; ++i) body(i);
  }
};

namespace detail {

/// What kept tokens can be copied of: anything whose bytes are its value (quantised codes, scales, positions).
template <class T>
concept copyable_bytes = std::is_trivially_copyable_v<T> && !std::is_const_v<T>;

[[nodiscard]] inline status check_equal(const char* name, const char* axis, index_t has, const char* other,
                                        index_t want) noexcept {
  if (has == want) return {};
  return status::error(errc::shape_mismatch, "%s has %lld %s, %s has %lld", name, static_cast<long long>(has), axis,
                       other, static_cast<long long>(want));
}

[[nodiscard]] inline status overlap_error(const char* first, const char* second, const byte_range& a,
                                          const byte_range& b) noexcept {
  return status::error(errc::aliasing, "%s spans %lld bytes and %s %lld, and they overlap", first,
                       static_cast<long long>(a.last - a.first), second, static_cast<long long>(b.last - b.first));
}

[[nodiscard]] inline status check_disjoint(const char* first, const byte_range& a, const char* second,
                                           const byte_range& b) noexcept {
  return a.overlaps(b) ? overlap_error(first, second, a, b) : status{};
}

template <class T, std::size_t Rank, memory_space Space>
[[nodiscard]] status check_distinct(const char* name, const tensor_view<T, Rank, Space>& view) noexcept {
  if (!may_overlap_itself(view)) return {};
  const byte_range bytes = touched_bytes(view);
  return status::error(errc::aliasing, "%s overlaps itself: %lld elements of %zu bytes within %lld bytes", name,
                       static_cast<long long>(view.size()), sizeof(T),
                       static_cast<long long>(bytes.last - bytes.first));
}

/// A layout to be written: consistent, and no two of its rows the same memory where it lets us see its rows.
template <cache_layout Layout>
[[nodiscard]] status check_output(const char* name, const Layout& out) noexcept {
  if constexpr (requires { check_view(name, out.rows); }) RESTKV_RETURN_IF_FAILED(check_view(name, out.rows));
  RESTKV_RETURN_IF_FAILED(out.check());
  if constexpr (requires { check_distinct(name, out.rows); }) RESTKV_RETURN_IF_FAILED(check_distinct(name, out.rows));
  return {};
}

template <class Position, memory_space Space>
[[nodiscard]] status check_kept_memory(const basic_kept_tokens<Position, Space>& kept) noexcept {
  RESTKV_RETURN_IF_FAILED(check_view("kept.lengths", kept.lengths));
  return check_view("kept.positions", kept.positions);
}

/// That a kept set's positions and lengths have the same rows.
template <class Position, memory_space Space>
[[nodiscard]] status check_kept_arrays(const basic_kept_tokens<Position, Space>& kept) noexcept {
  RESTKV_RETURN_IF_FAILED(
      check_equal("kept.positions", "sequences", kept.positions.extent(0), "kept.lengths", kept.lengths.extent(0)));
  return check_equal("kept.positions", "heads", kept.positions.extent(1), "kept.lengths", kept.lengths.extent(1));
}

template <class T>
[[nodiscard]] status check_source(const char* name, const chunked_tensor_view<const T>& source) noexcept {
  if (source.missing()) {
    return status::error(errc::missing_input, "%s has %lld chunks, at least 1 is needed", name,
                         static_cast<long long>(source.chunks()));
  }
  for (index_t i = 0; i < source.chunks(); ++i) {
    const auto& part = source.chunk(i);
    RESTKV_RETURN_IF_FAILED(check_view(name, part));
    RESTKV_RETURN_IF_FAILED(check_equal(name, "sequences in a chunk", part.extent(0), "the first", source.extent(0)));
    RESTKV_RETURN_IF_FAILED(check_equal(name, "heads in a chunk", part.extent(1), "the first", source.extent(1)));
    RESTKV_RETURN_IF_FAILED(check_equal(name, "channels in a chunk", part.extent(3), "the first", source.extent(3)));
  }
  return {};
}

/// That a KV head holds one kept set.
[[nodiscard]] inline status check_one_set(index_t kept_heads, const char* name, index_t heads) noexcept {
  if (kept_heads == heads) return {};
  return status::error(errc::unsupported,
                       "the kept set has %lld heads, %s has %lld: in place needs one set per KV head",
                       static_cast<long long>(kept_heads), name, static_cast<long long>(heads));
}

/// That some bytes hold nothing of a kept set.
template <class Position, memory_space Space>
[[nodiscard]] status check_apart_from_kept(const basic_kept_tokens<Position, Space>& kept, const char* name,
                                           const byte_range& bytes) noexcept {
  RESTKV_RETURN_IF_FAILED(check_disjoint(name, bytes, "kept.positions", touched_bytes(kept.positions)));
  return check_disjoint(name, bytes, "kept.lengths", touched_bytes(kept.lengths));
}

[[nodiscard]] inline status check_lengths(const const_kept_tokens& kept) noexcept {
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      if (kept.lengths(b, h) < 0 || kept.lengths(b, h) > kept.capacity()) {
        return status::error(errc::invalid_argument, "head %lld of sequence %lld keeps %lld tokens, capacity is %lld",
                             static_cast<long long>(h), static_cast<long long>(b),
                             static_cast<long long>(kept.lengths(b, h)), static_cast<long long>(kept.capacity()));
      }
    }
  }
  return {};
}

/// That a layout has a row for every token of a kept set whose lengths are in order.
template <cache_layout Layout>
[[nodiscard]] status check_room(const const_kept_tokens& kept, const char* name, const Layout& out) noexcept {
  RESTKV_RETURN_IF_FAILED(check_output(name, out));
  RESTKV_RETURN_IF_FAILED(check_equal(name, "sequences", out.batch(), "the kept set", kept.batch()));
  RESTKV_RETURN_IF_FAILED(check_equal(name, "heads", out.heads(), "the kept set", kept.heads()));
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      const index_t length = kept.lengths(b, h);
      const index_t room = out.capacity(b, h);
      if (length > room) {
        return status::error(errc::shape_mismatch, "head %lld of sequence %lld keeps %lld tokens, %s has room for %lld",
                             static_cast<long long>(h), static_cast<long long>(b), static_cast<long long>(length), name,
                             static_cast<long long>(room));
      }
      if (length > 0 && out.head_dim() > 0 && out.row(b, h, 0).data == nullptr) {
        return status::error(errc::missing_input,
                             "%s has a null row for head %lld of sequence %lld, which keeps %lld tokens", name,
                             static_cast<long long>(h), static_cast<long long>(b), static_cast<long long>(length));
      }
    }
  }
  return check_apart_from_kept(kept, name, out.touched());
}

/// That no byte the layout may write lies within the bounds of a source.
template <class T, cache_layout Layout>
[[nodiscard]] status check_untouched(const char* from, const chunked_tensor_view<const T>& source, const char* to,
                                     const Layout& out) noexcept {
  for (index_t i = 0; i < source.chunks(); ++i) {
    RESTKV_RETURN_IF_FAILED(check_disjoint(to, out.touched(), from, touched_bytes(source.chunk(i))));
  }
  return {};
}

template <cache_layout Layout>
[[nodiscard]] status check_gather(const const_kept_tokens& kept, const char* from,
                                  const chunked_tensor_view<const typename Layout::value_type>& source, const char* to,
                                  const Layout& out) noexcept {
  RESTKV_RETURN_IF_FAILED(check_source(from, source));
  RESTKV_RETURN_IF_FAILED(check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(check_kept(kept, source.extent(0), source.extent(1), source.extent(2)));
  RESTKV_RETURN_IF_FAILED(check_room(kept, to, out));
  RESTKV_RETURN_IF_FAILED(check_equal(to, "channels", out.head_dim(), from, source.extent(3)));
  return check_untouched(from, source, to, out);
}

/// Copies vectors of `channels` elements, contiguous ones that follow each other on both sides in one go. Copies take
/// effect in order, the last of them when `flush` is called.
template <copyable_bytes T>
class token_copier {
 public:
  constexpr explicit token_copier(index_t channels) noexcept : channels_(channels) {}

  void copy(const tensor_view<const T, 1>& from, const tensor_view<T, 1>& to) noexcept {
    if (channels_ > 1 && (from.stride(0) != 1 || to.stride(0) != 1)) {
      for (index_t c = 0; c < channels_; ++c) {
        std::memcpy(to.data + c * to.stride(0), from.data + c * from.stride(0), sizeof(T));
      }
      return;
    }
    if (run_ > 0 && from.data == from_ + run_ && to.data == to_ + run_) {
      run_ += channels_;
      return;
    }
    flush();
    from_ = from.data;
    to_ = to.data;
    run_ = channels_;
  }

  void flush() noexcept {
    if (run_ > 0 && from_ != to_) std::memmove(to_, from_, static_cast<std::size_t>(run_) * sizeof(T));
    run_ = 0;
  }

 private:
  index_t channels_;
  const T* from_ = nullptr;
  T* to_ = nullptr;
  index_t run_ = 0;  // elements waiting to be copied
};

/// Copies the kept tokens of one head, number b * heads + h. All checks have been made.
template <cache_layout Layout>
void gather_head(const const_kept_tokens& kept, const chunked_tensor_view<const typename Layout::value_type>& source,
                 const Layout& out, index_t row) noexcept {
  const index_t b = row / kept.heads();
  const index_t h = row % kept.heads();
  const index_t kv_head = h / (kept.heads() / source.extent(1));
  const index_t length = kept.lengths(b, h);
  token_copier<typename Layout::value_type> copier(source.extent(3));
  index_t chunk = 0;
  index_t first = 0;  // token at which the chunk begins
  for (index_t slot = 0; slot < length; ++slot) {
    const index_t position = kept.positions(b, h, slot);
    while (position - first >= source.chunk(chunk).extent(2)) first += source.chunk(chunk++).extent(2);
    copier.copy(source.chunk(chunk)[b][kv_head][position - first], out.row(b, h, slot));
  }
  copier.flush();
}

}  // namespace detail

/// Copies kept tokens: out.row(b, h, i) = source[b][h / group][kept.positions(b, h, i)] for i < kept.lengths(b, h),
/// bit by bit, where group = kept.heads() / kv_heads is 1 unless the set was made per query head.
///
/// source: [batch, kv_heads, tokens, head_dim], any strides, in one piece or in chunks; out: [batch, kept.heads()] rows
/// of head_dim channels. Elements are of any trivially copyable type. The slots of a head behind its length are left
/// as they are, and so is the memory between rows.
///
/// Fails, before anything is written: a kept set that does not fit the cache (`check_kept`), an inconsistent layout,
/// other heads or channels, too few slots, a null pointer, and an output whose bounds overlap those of the source or
/// of the kept set (errc::aliasing). Bounds count, not elements: to copy within one buffer use `compact_in_place`.
///
/// Cost: one read and one write of the kept tokens; contiguous tokens that stay neighbours are copied together.
template <cache_layout Layout, parallel_loop ParallelFor = serial_for>
  requires detail::copyable_bytes<typename Layout::value_type>
[[nodiscard]] status gather_tokens(const const_kept_tokens& kept,
                                   const chunked_tensor_view<const typename Layout::value_type>& source,
                                   const Layout& out, const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_gather(kept, "source", source, "out", out));
  parallel_for(kept.batch() * kept.heads(), [&](index_t row) { detail::gather_head(kept, source, out, row); });
  return {};
}

/// The same for an array that has one element per token, such as scales, zero points or RoPE positions:
/// out(b, h, i) = source(b, h / group, kept.positions(b, h, i)).
///
/// source: [batch, kv_heads, tokens]; out: [batch, kept.heads(), slots]. An array [batch, tokens] that all heads share
/// is a source with a head stride of 0. For a ragged output write it as a `ragged_layout` of one channel.
template <class T, class U, parallel_loop ParallelFor = serial_for>
  requires(detail::copyable_bytes<T> && std::is_same_v<std::remove_const_t<U>, T>)
[[nodiscard]] status gather_tokens(const const_kept_tokens& kept, const tensor_view<U, 3>& source,
                                   const tensor_view<T, 3>& out, const ParallelFor& parallel_for = {}) {
  const auto one_channel = [](const auto& view) {
    using pointer = decltype(view.data);
    return tensor_view<std::remove_pointer_t<pointer>, 4>(view.data,
                                                          {view.extent(0), view.extent(1), view.extent(2), 1},
                                                          {view.stride(0), view.stride(1), view.stride(2), 1});
  };
  return gather_tokens(kept, chunked_tensor_view<const T>(tensor_view<const T, 4>(one_channel(source))),
                       dense_layout<T>{one_channel(out)}, parallel_for);
}

}  // namespace restkv
