// SPDX-License-Identifier: Apache-2.0
/// @file
/// `scratch_rows`: a span of float or double, handed out piece by piece, some pieces as doubles.
#pragma once

#include <restkv/core/config.hpp>

#include <cassert>
#include <concepts>
#include <cstdint>
#include <new>
#include <span>
#include <type_traits>

namespace restkv {

/// Elements of a scratch span, of float or of double, that `count` doubles take, alignment included.
[[nodiscard]] constexpr index_t scratch_of_doubles(index_t count) noexcept { return 2 * count + 1; }

/// Hands out the memory of a span in order. Sums over many tokens are kept in double whatever the span's type is.
/// The caller has planned the span: its size is checked in debug builds only.
template <std::floating_point Real>
class scratch_rows {
 public:
  /// Begins at the span's first element.
  explicit scratch_rows(std::span<Real> memory) noexcept : next_(memory.data()), left_(memory.size()) {}

  /// `count` elements, not initialised.
  [[nodiscard]] Real* take(index_t count) noexcept {
    const auto elements = static_cast<std::size_t>(count);
    assert(elements <= left_);
    Real* const piece = next_;
    next_ += elements;
    left_ -= elements;
    return piece;
  }

  /// `count` doubles, not initialised. Takes `scratch_of_doubles(count)` elements at most.
  [[nodiscard]] double* take_doubles(index_t count) noexcept {
    if constexpr (std::is_same_v<Real, double>) {
      return take(count);
    } else {
      static_assert(sizeof(double) == 2 * sizeof(Real));
      if (reinterpret_cast<std::uintptr_t>(next_) % alignof(double) != 0) (void)take(1);
      Real* const memory = take(2 * count);
      double* piece = nullptr;
      // Begins the lifetime of each double; costs nothing.
      for (index_t i = count - 1; i >= 0; --i) piece = ::new (static_cast<void*>(memory + 2 * i)) double;
      return piece;
    }
  }

 private:
  Real* next_;
  std::size_t left_;
};

}  // namespace restkv
