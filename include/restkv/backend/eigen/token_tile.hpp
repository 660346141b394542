// SPDX-License-Identifier: Apache-2.0
/// @file
/// Reading a cache tile by tile: any element type, any strides, any chunks, as rows of floats.
#pragma once

#include <restkv/backend/eigen/packet.hpp>
#include <restkv/core/layer.hpp>

#include <algorithm>

namespace restkv::eigen {

/// Tokens of a tile. A multiple of every tile_rows; a tile of 128 channels and its logits stay in the second-level
/// cache. The grid of tiles starts at the sequence's first token, so results do not depend on how a prompt was chunked.
inline constexpr index_t tile_tokens = 96;

/// Rows of floats: row n at data + n * stride.
struct float_rows {
  const float* data;
  index_t stride;
};

/// `count` tokens of one head from token `first` of the token axis on. A float cache with contiguous channels is
/// returned as it lies when `width` (the channels a reader may touch, padded) equals its channels; everything else is
/// widened into `staging` [count, width], the padding zero.
template <element T>
[[nodiscard]] float_rows load_tokens(const chunked_tensor_view<const T>& cache, index_t batch, index_t head,
                                     index_t first, index_t count, index_t width, float* staging) noexcept {
  index_t written = 0;
  while (written < count) {
    const auto part = cache.from_token(first + written);
    const index_t here = std::min(count - written, part.extent(2));
    const index_t channels = part.extent(3);
    const T* const base = part.data + part.offset(batch, head, 0, 0);
    if constexpr (std::is_same_v<std::remove_cv_t<T>, float>) {
      if (here == count && part.stride(3) == 1 && channels == width) return {base, part.stride(2)};
    }
    for (index_t n = 0; n < here; ++n) {
      const T* const source = base + n * part.stride(2);
      float* const row = staging + (written + n) * width;
      if (part.stride(3) == 1) {
        for (index_t c = 0; c < channels; ++c) row[c] = widen<float>(source[c]);
      } else {
        for (index_t c = 0; c < channels; ++c) row[c] = widen<float>(source[c * part.stride(3)]);
      }
      for (index_t c = channels; c < width; ++c) row[c] = 0.0f;
    }
    written += here;
  }
  return {staging, width};
}

}  // namespace restkv::eigen
