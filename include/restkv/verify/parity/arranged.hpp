// SPDX-License-Identifier: Apache-2.0
/// @file
/// Tensors arranged in memory as a problem says, with something that must not be read or written all around.
#pragma once

#include <restkv/core/tensor_view.hpp>
#include <restkv/verify/parity/problem.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

namespace restkv::parity {

/// Owns a tensor [batch, heads, tokens, channels] of any trivially copyable type. Its gaps, and some elements before
/// and behind it, hold `filler`. Not copyable: views point into it.
template <class T>
class arranged_tensor {
 public:
  /// Elements are unset, gaps and guards hold `filler`.
  arranged_tensor(memory_order order, const std::array<index_t, 4>& extents, T filler) : filler_(filler) {
    const auto [batch, heads, tokens, channels] = extents;
    const index_t row = order == memory_order::gaps ? channels + 3 : channels;
    std::array<index_t, 4> strides{heads * tokens * row, tokens * row, row, 1};
    if (order == memory_order::tokens_heads) strides = {tokens * heads * channels, channels, heads * channels, 1};
    memory_.assign(static_cast<std::size_t>(batch * heads * tokens * row + 2 * margin), filler);
    T* first = memory_.data() + margin;
    if (order == memory_order::reversed && tokens > 0) {
      first += (tokens - 1) * row;
      strides[2] = -row;
    }
    view_ = {first, extents, strides};
  }
  arranged_tensor(const arranged_tensor&) = delete;
  arranged_tensor& operator=(const arranged_tensor&) = delete;

  /// All of it. [batch, heads, tokens, channels]
  [[nodiscard]] const tensor_view<T, 4>& view() const noexcept { return view_; }
  /// The same, to be read.
  [[nodiscard]] tensor_view<const T, 4> read() const noexcept { return view_; }

  /// Calls use(b, h, n, c, element).
  template <class Use>
  void for_each(const Use& use) const {
    for (index_t b = 0; b < view_.extent(0); ++b) {
      for (index_t h = 0; h < view_.extent(1); ++h) {
        for (index_t n = 0; n < view_.extent(2); ++n) {
          for (index_t c = 0; c < view_.extent(3); ++c) use(b, h, n, c, view_(b, h, n, c));
        }
      }
    }
  }

  /// True when nothing but the tensor's own elements was written.
  [[nodiscard]] bool surroundings_intact() const {
    std::vector<bool> own(memory_.size());
    for_each([&](index_t, index_t, index_t, index_t, const T& element) {
      own[static_cast<std::size_t>(&element - memory_.data())] = true;
    });
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if (!own[i] && std::memcmp(&memory_[i], &filler_, sizeof(T)) != 0) return false;
    }
    return true;
  }

 private:
  static constexpr index_t margin = 32;  // a multiple of the widest vector load, so that dense tensors stay aligned

  T filler_;
  std::vector<T> memory_;
  tensor_view<T, 4> view_;
};

}  // namespace restkv::parity
