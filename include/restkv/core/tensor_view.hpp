// SPDX-License-Identifier: Apache-2.0
/// @file
/// `tensor_view`: a pointer, extents and strides over memory somebody else owns.
#pragma once

#include <restkv/core/config.hpp>
#include <restkv/core/saturation.hpp>

#include <array>
#include <cassert>
#include <concepts>
#include <cstdint>
#include <type_traits>

namespace restkv {

/// Where the memory of a view lies. Part of the type, so that a host pointer handed to a kernel does not compile.
enum class memory_space { host, device };

/// A non-owning view of a strided tensor. Trivially copyable; passed by value.
///
/// Extents and strides are in elements. Any strides work, so [batch, heads, tokens, head_dim] and
/// [batch, tokens, heads, head_dim] are the same view type with other strides. A stride of 0 repeats.
template <class T, std::size_t Rank, memory_space Space = memory_space::host>
struct tensor_view {
  using element_type = T;                       ///< const where the elements are
  using value_type = std::remove_cv_t<T>;       ///< never const
  static constexpr std::size_t rank = Rank;     ///< number of axes
  static constexpr memory_space space = Space;  ///< where the elements lie

  T* data = nullptr;                    ///< the element at index 0 of every axis
  std::array<index_t, Rank> extents{};  ///< elements along each axis
  std::array<index_t, Rank> strides{};  ///< from one element of an axis to the next, in elements; may be negative

  constexpr tensor_view() = default;

  /// A dense, row-major view: the last axis is contiguous.
  constexpr tensor_view(T* pointer, const std::array<index_t, Rank>& sizes) noexcept : data(pointer), extents(sizes) {
    index_t stride = 1;
    for (std::size_t axis = Rank; axis-- > 0;) {
      strides[axis] = stride;
      stride = detail::saturated_product(stride, sizes[axis]);
    }
  }

  /// Any strides.
  constexpr tensor_view(T* pointer, const std::array<index_t, Rank>& sizes,
                        const std::array<index_t, Rank>& steps) noexcept
      : data(pointer), extents(sizes), strides(steps) {}

  /// A view of mutable elements is a view of const ones; the memory space never changes.
  template <class U>
    requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>)
  constexpr tensor_view(const tensor_view<U, Rank, Space>& other) noexcept  // NOLINT(google-explicit-constructor)
      : data(other.data), extents(other.extents), strides(other.strides) {}

  /// Elements along an axis.
  [[nodiscard]] RESTKV_HD constexpr index_t extent(std::size_t axis) const noexcept { return extents[axis]; }
  /// Elements from one index of an axis to the next.
  [[nodiscard]] RESTKV_HD constexpr index_t stride(std::size_t axis) const noexcept { return strides[axis]; }

  /// Number of elements; 0 when any extent is 0 or below, 2^63 - 1 where there would be more: see `check_view`.
  [[nodiscard]] RESTKV_HD constexpr index_t size() const noexcept {
    index_t n = 1;
    bool some = true;
    for (std::size_t axis = 0; axis < Rank; ++axis) {
      some = some && extents[axis] > 0;
      n = detail::saturated_product(n, extents[axis]);
    }
    return some ? n : 0;
  }
  /// True without elements or without memory.
  [[nodiscard]] RESTKV_HD constexpr bool empty() const noexcept { return data == nullptr || size() == 0; }

  /// Offset of an element from `data`, in elements.
  template <std::convertible_to<index_t>... Index>
    requires(sizeof...(Index) == Rank)
  [[nodiscard]] RESTKV_HD constexpr index_t offset(Index... index) const noexcept {
    std::size_t axis = 0;
    index_t sum = 0;
    ((sum += static_cast<index_t>(index) * strides[axis++]), ...);
    return sum;
  }

  /// The element at an index. Bounds are the caller's, checked in debug builds.
  template <std::convertible_to<index_t>... Index>
    requires(sizeof...(Index) == Rank)
  [[nodiscard]] RESTKV_HD constexpr T& operator()(Index... index) const noexcept {
    assert(contains(index...));
    return data[offset(index...)];
  }

  /// True when every index lies within its extent.
  template <std::convertible_to<index_t>... Index>
    requires(sizeof...(Index) == Rank)
  [[nodiscard]] RESTKV_HD constexpr bool contains(Index... index) const noexcept {
    std::size_t axis = 0;
    bool inside = true;
    ((inside = inside && static_cast<index_t>(index) >= 0 && static_cast<index_t>(index) < extents[axis], ++axis), ...);
    return inside;
  }

  /// The part [begin, begin + count) of one axis.
  [[nodiscard]] RESTKV_HD constexpr tensor_view slice(std::size_t axis, index_t begin, index_t count) const noexcept {
    tensor_view part = *this;
    if (part.data != nullptr) part.data += begin * strides[axis];
    part.extents[axis] = count;
    return part;
  }

  /// The view of rank one less at `index` on the first axis.
  [[nodiscard]] RESTKV_HD constexpr tensor_view<T, Rank - 1, Space> operator[](index_t index) const noexcept
    requires(Rank > 1)
  {
    tensor_view<T, Rank - 1, Space> part;
    part.data = data == nullptr ? nullptr : data + index * strides[0];
    for (std::size_t axis = 1; axis < Rank; ++axis) {
      part.extents[axis - 1] = extents[axis];
      part.strides[axis - 1] = strides[axis];
    }
    return part;
  }

  /// True when elements follow each other without gaps in row-major order.
  [[nodiscard]] RESTKV_HD constexpr bool dense() const noexcept {
    index_t expected = 1;
    for (std::size_t axis = Rank; axis-- > 0;) {
      if (extents[axis] != 1 && strides[axis] != expected) return false;
      expected = detail::saturated_product(expected, extents[axis]);
    }
    return true;
  }
};

namespace detail {

/// More bytes than a view can have: no machine addresses so many, and sums of a few such distances fit 63 bits.
inline constexpr index_t most_view_bytes = index_t(1) << 60;

/// Distances from a view's `data` to its first element in memory and to behind its last, in bytes.
struct byte_span {
  index_t low = 0;   ///< 0 or below
  index_t high = 0;  ///< above 0
};

/// The span of a view that is not empty. False where the elements' bytes, or the memory they lie in, pass
/// `most_view_bytes` or the end of the addresses.
template <class T, std::size_t Rank, memory_space Space>
[[nodiscard]] bool find_byte_span(const tensor_view<T, Rank, Space>& view, byte_span& out) noexcept {
  constexpr index_t size = sizeof(T);
  constexpr index_t most = most_view_bytes / size;  // elements
  index_t below = 0;
  index_t above = 0;
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    const index_t stride = view.strides[axis];
    if (view.extents[axis] == 1) continue;  // its stride leads nowhere
    if (stride < -most || stride > most) return false;
    index_t& way = stride < 0 ? below : above;
    way = saturated_sum(way, saturated_product(view.extents[axis] - 1, stride < 0 ? -stride : stride));
  }
  if (view.size() > most || below > most || above >= most - below) return false;
  out = {-below * size, (above + 1) * size};
  if (view.data == nullptr) return true;
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  return address >= static_cast<std::uintptr_t>(-out.low) &&
         UINTPTR_MAX - address >= static_cast<std::uintptr_t>(out.high);
}

}  // namespace detail

/// The bytes a view can touch, [first, last); equal pointers for an empty view. For aliasing checks.
struct byte_range {
  const unsigned char* first = nullptr;  ///< the first byte
  const unsigned char* last = nullptr;   ///< one behind the last byte

  /// True when both have a byte in common; an empty range has none.
  [[nodiscard]] constexpr bool overlaps(const byte_range& other) const noexcept {
    return first != last && other.first != other.last && first < other.last && other.first < last;
  }
};

/// The bounds of the elements of a view, strides of either sign considered; all addresses where they cannot be told,
/// for extents and strides that no memory can have (see `check_view`).
template <class T, std::size_t Rank, memory_space Space>
[[nodiscard]] byte_range touched_bytes(const tensor_view<T, Rank, Space>& view) noexcept {
  if (view.empty()) return {};
  detail::byte_span span;
  if (!detail::find_byte_span(view, span)) {
    return {nullptr, reinterpret_cast<const unsigned char*>(UINTPTR_MAX)};
  }
  const auto* const data = reinterpret_cast<const unsigned char*>(view.data);
  return {data + span.low, data + span.high};
}

/// A tensor whose token axis (axis 2 of [batch, heads, tokens, head_dim]) is split over several views, as a prompt
/// that arrived in chunks leaves it. One view converts to it, so code that has a single buffer never notices.
///
/// All chunks have the same batch, heads and head_dim. The views are referenced, not copied: they must outlive this.
template <class T, memory_space Space = memory_space::host>
class chunked_tensor_view {
 public:
  using view_type = tensor_view<T, 4, Space>;  ///< of one chunk
  using value_type = std::remove_cv_t<T>;      ///< never const

  constexpr chunked_tensor_view() = default;
  /// One chunk.
  constexpr chunked_tensor_view(const view_type& whole) noexcept  // NOLINT(google-explicit-constructor)
      : single_(whole), count_(1) {}
  /// One chunk of mutable elements, to be read only.
  template <class U>
    requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>)
  constexpr chunked_tensor_view(const tensor_view<U, 4, Space>& whole) noexcept  // NOLINT(google-explicit-constructor)
      : single_(whole), count_(1) {}
  /// `count` views, in token order. They are looked at once, so fill them in before.
  constexpr chunked_tensor_view(const view_type* chunks, index_t count) noexcept : chunks_(chunks), count_(count) {
    if (count < 2 || chunks[0].extents[2] <= 0) return;
    for (index_t i = 1; i < count - 1; ++i) {
      if (chunks[i].extents[2] != chunks[0].extents[2]) return;
    }
    equal_tokens_ = chunks[0].extents[2];
  }

  /// Number of chunks; 0 where there is no tensor.
  [[nodiscard]] constexpr index_t chunks() const noexcept { return count_; }
  /// Chunk `i`, in token order.
  [[nodiscard]] constexpr const view_type& chunk(index_t i) const noexcept {
    return chunks_ != nullptr ? chunks_[i] : single_;
  }
  /// Extent of an axis; that of the token axis is the sum over the chunks.
  [[nodiscard]] constexpr index_t extent(std::size_t axis) const noexcept {
    if (count_ == 0) return 0;
    if (axis != 2) return chunk(0).extents[axis];
    index_t tokens = 0;
    for (index_t i = 0; i < count_; ++i) tokens = detail::saturated_sum(tokens, chunk(i).extents[2]);
    return tokens;
  }
  /// True where there is no tensor at all.
  [[nodiscard]] constexpr bool missing() const noexcept { return count_ == 0; }

  /// The chunk that holds token `token`, as a view whose token axis starts at that token.
  [[nodiscard]] constexpr view_type from_token(index_t token) const noexcept {
    index_t first = 0;
    if (equal_tokens_ > 0) {
      first = token / equal_tokens_ < count_ ? token / equal_tokens_ : count_ - 1;
      token -= first * equal_tokens_;
    }
    for (index_t i = first; i < count_; ++i) {
      const view_type& part = chunk(i);
      if (token < part.extents[2]) return part.slice(2, token, part.extents[2] - token);
      token -= part.extents[2];
    }
    return {};
  }

 private:
  view_type single_{};
  const view_type* chunks_ = nullptr;
  index_t count_ = 0;
  index_t equal_tokens_ = 0;  // of every chunk but the last, where they agree: pages
};

}  // namespace restkv
