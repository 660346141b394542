// SPDX-License-Identifier: Apache-2.0
/// @file
/// Float numbers as sums of 16-bit ones, so that tensor cores multiply them without losing digits.
#pragma once

#include <restkv/kernel/attention_problem.hpp>

namespace restkv::kernel {

/// Summands of T that hold a float's 24 bits, as far as T's exponents reach: 2 of half (22 bits), 3 of bfloat16; 1 of
/// float.
template <element T>
inline constexpr int pieces_of = std::is_same_v<T, restkv::half> ? 2
                                 : sizeof(T) == 2                ? 3
                                                                 : 1;

/// piece(I, x_I) for the summands of x, the largest first.
template <element T, class Piece>
RESTKV_HD void split_float(float x, const Piece& piece) {
  unrolled<pieces_of<T>>([&](auto i) {
    const T part = narrow<T>(x);
    piece(i, part);
    x -= widen<float>(part);
  });
}

}  // namespace restkv::kernel
