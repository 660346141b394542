// SPDX-License-Identifier: Apache-2.0
/// @file
/// The element types of arrays.
#pragma once

namespace restkv::python {

/// The element types that are read as numbers. Anything else can only be copied.
enum class number { float32, float64, float16, bfloat16, other };

/// Its name, as frameworks have it.
[[nodiscard]] constexpr const char* name_of(number type) noexcept {
  switch (type) {
    case number::float32: return "float32";
    case number::float64: return "float64";
    case number::float16: return "float16";
    case number::bfloat16: return "bfloat16";
    case number::other: break;
  }
  return "another type";
}

}  // namespace restkv::python
