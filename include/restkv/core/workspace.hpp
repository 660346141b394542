// SPDX-License-Identifier: Apache-2.0
/// @file
/// `workspace`: a bump allocator over bytes the caller owns, and the same code counting instead of handing out.
///
/// Planning runs the carving code once with a counting workspace; running repeats it over real memory. The size is
/// therefore right by construction.
#pragma once

#include <restkv/core/config.hpp>
#include <restkv/core/saturation.hpp>
#include <restkv/core/status.hpp>

#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

namespace restkv {

/// Hands out aligned pieces of a buffer. A counting workspace (default constructed) hands out null pointers and only
/// adds up. Pieces are never freed one by one: the whole is dropped with the buffer.
class workspace {
 public:
  static constexpr std::size_t alignment = 64;  ///< a cache line, and the widest vector load

  /// Counts only.
  constexpr workspace() noexcept = default;
  /// Hands out pieces of [data, data + bytes); the buffer may start anywhere, alignment comes out of the size. A null
  /// pointer is a buffer of 0 bytes.
  workspace(void* data, std::size_t bytes) noexcept
      : base_(static_cast<unsigned char*>(data)), capacity_(data == nullptr ? 0 : bytes), counting_(false) {
    const auto misalignment = reinterpret_cast<std::uintptr_t>(data) % alignment;
    if (misalignment != 0) begin_ = alignment - misalignment;
  }
  /// The same for a span.
  explicit workspace(std::span<std::byte> bytes) noexcept : workspace(bytes.data(), bytes.size()) {}

  /// `count` elements of T, aligned, not initialised. Null when counting, when count is 0, or when the rest is too
  /// small: `check()` tells.
  template <class T>
  T* take(index_t count) noexcept {
    static_assert(std::is_trivially_destructible_v<T>);
    if (count <= 0) {
      if (count < 0) overflow_ = true;
      return nullptr;
    }
    const auto elements = static_cast<std::size_t>(count);
    if (elements > (std::numeric_limits<std::size_t>::max() - used_ - 3 * alignment) / sizeof(T)) {
      overflow_ = true;
      return nullptr;
    }
    const std::size_t bytes = (elements * sizeof(T) + alignment - 1) / alignment * alignment;
    const std::size_t begin = begin_ + used_;
    used_ += bytes;
    if (counting_ || overflow_ || too_small()) return nullptr;
    return reinterpret_cast<T*>(base_ + begin);
  }
  /// The product of several sizes, which may pass 64 bits: `check()` tells.
  template <class T, std::convertible_to<index_t>... More>
    requires(sizeof...(More) > 0)
  T* take(index_t size, More... more) noexcept {
    bool negative = size < 0;
    ((negative = negative || more < 0, size = detail::saturated_product(size, more)), ...);
    return take<T>(negative || size == detail::too_many ? -1 : size);
  }

  /// Bytes asked for so far, alignment included.
  [[nodiscard]] constexpr std::size_t used() const noexcept { return used_; }
  /// True for a workspace that only adds up.
  [[nodiscard]] constexpr bool counting() const noexcept { return counting_; }

  /// What a caller must own for the pieces taken so far, wherever their buffer starts.
  [[nodiscard]] constexpr std::size_t required_bytes() const noexcept { return used_ == 0 ? 0 : used_ + alignment; }

  /// Fails when the buffer is too small for the pieces taken so far, or their size overflows; says both numbers.
  [[nodiscard]] status check() const noexcept {
    if (overflow_) return status::error(errc::invalid_argument, "the workspace size overflows 64 bits");
    if (!counting_ && too_small()) {
      return status::error(errc::workspace_too_small, "the workspace%s has %zu bytes, the plan needs %zu",
                           base_ == nullptr ? ", a null pointer," : "", capacity_, required_bytes());
    }
    return {};
  }

 private:
  [[nodiscard]] constexpr bool too_small() const noexcept { return used_ > 0 && begin_ + used_ > capacity_; }

  unsigned char* base_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t begin_ = 0;  // of the first piece: where the buffer is first aligned
  std::size_t used_ = 0;
  bool counting_ = true;
  bool overflow_ = false;
};

}  // namespace restkv
