// SPDX-License-Identifier: Apache-2.0
// What a quantised cache should be like, the memory that takes, and the view of it.
#pragma once

#include <restkv/cache/quantised_view.hpp>

#include <array>

namespace restkv_test {

using restkv::index_t;

/// A quantised cache, but for its numbers.
struct quantised_recipe {
  index_t batch = 1, heads = 1, tokens = 1, channels = 1, tokens_per_group = 1, channels_per_group = 1;
  restkv::code_format format{};
  restkv::quantisation_kind kind = restkv::quantisation_kind::symmetric;

  [[nodiscard]] static index_t groups(index_t count, index_t of) { return (count + of - 1) / of; }
  /// Extents of the codes.
  [[nodiscard]] std::array<index_t, 4> codes() const {
    const bool along_channels = format.packed == restkv::cache_axis::channels;
    const index_t count = 8 / format.bits;
    return {batch, heads, along_channels ? tokens : groups(tokens, count),
            along_channels ? groups(channels, count) : channels};
  }
  /// Extents of the scales, and of zeros or offsets.
  [[nodiscard]] std::array<index_t, 4> parameters() const {
    return {batch, heads, groups(tokens, tokens_per_group), groups(channels, channels_per_group)};
  }
};

/// The cache in some memory; `second` holds its zeros or offsets.
template <class Scale>
[[nodiscard]] restkv::quantised_view<Scale> quantised_view_of(const quantised_recipe& how,
                                                              const restkv::tensor_view<std::uint8_t, 4>& codes,
                                                              const restkv::tensor_view<Scale, 4>& scale,
                                                              const restkv::tensor_view<Scale, 4>& second) {
  restkv::quantised_view<Scale> made{.codes = codes,
                                     .scale = scale,
                                     .tokens = how.tokens,
                                     .channels = how.channels,
                                     .tokens_per_group = how.tokens_per_group,
                                     .channels_per_group = how.channels_per_group,
                                     .format = how.format};
  if (how.kind == restkv::quantisation_kind::zero) made.zero = second;
  if (how.kind == restkv::quantisation_kind::offset) made.offset = second;
  return made;
}

}  // namespace restkv_test
