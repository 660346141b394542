// SPDX-License-Identifier: Apache-2.0
/// @file
/// `check_view`: whether a view that somebody handed over can be the view of a tensor at all.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

#include <algorithm>
#include <cstdio>
#include <limits>

namespace restkv::detail {

/// "[2, 8, 4096, 128]" of numbers, in memory of its own.
template <std::size_t Count>
class bracketed {
 public:
  explicit bracketed(const std::array<index_t, Count>& numbers) noexcept {
    std::size_t used = 0;
    for (std::size_t i = 0; i < Count; ++i) {
      const int written = std::snprintf(text_ + used, sizeof text_ - used, "%s%lld", i == 0 ? "[" : ", ",
                                        static_cast<long long>(numbers[i]));
      used += static_cast<std::size_t>(written);
    }
    std::snprintf(text_ + used, sizeof text_ - used, "]");
  }
  [[nodiscard]] const char* text() const noexcept { return text_; }

 private:
  static constexpr std::size_t longest_number = 22;  // with its sign, comma and space
  char text_[Count * longest_number + 2];
};

/// What must be so before anything else about a view can be computed: no extent is negative, elements have memory, and
/// neither they nor the memory between them passes 2^60 bytes; and a view without elements has no more than 2^31 - 1
/// rows to go through before that shows. Names `name`, extents and strides.
template <class T, std::size_t Rank, memory_space Space>
[[nodiscard]] status check_view(const char* name, const tensor_view<T, Rank, Space>& view) noexcept {
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    if (view.extents[axis] < 0) {
      return status::error(errc::shape_mismatch, "%s has extent %lld on axis %zu of %zu", name,
                           static_cast<long long>(view.extents[axis]), axis, Rank);
    }
  }
  if (view.data == nullptr && view.size() > 0) {
    return status::error(errc::missing_input, "%s has a null pointer and %lld elements", name,
                         static_cast<long long>(view.size()));
  }
  // An extent of 0 counts as 1: places in a view without elements are computed, too.
  tensor_view<T, Rank, Space> least = view;
  for (index_t& extent : least.extents) extent = std::max<index_t>(extent, 1);
  if (byte_span span; !find_byte_span(least, span)) {
    return status::error(errc::shape_mismatch,
                         "%s has extents %s and strides %s, with elements of %zu bytes: more than can be addressed",
                         name, bracketed(view.extents).text(), bracketed(view.strides).text(), sizeof(T));
  }
  if (view.size() > 0) return {};
  index_t rows = 1;
  for (std::size_t axis = 0; view.extents[axis] > 0; ++axis) rows = saturated_product(rows, view.extents[axis]);
  if (rows > std::numeric_limits<std::int32_t>::max()) {
    return status::error(errc::shape_mismatch, "%s has extents %s: no elements, and more rows than are looked at", name,
                         bracketed(view.extents).text());
  }
  return {};
}

}  // namespace restkv::detail
