// SPDX-License-Identifier: Apache-2.0
/// @file
/// Rows of a cache whose numbers lie in memory as codes with scales: read as numbers where a kernel reads them, so that
/// no copy of the cache is made.
#pragma once

#include <restkv/cache/quantised_view.hpp>
#include <restkv/kernel/attention_problem.hpp>

namespace restkv::kernel {

/// What a layer's keys and values lie in where that is not the layer itself: codes, in the executor's memory.
template <element Scale, memory_space S>
struct coded_caches {
  quantised_view<const Scale, S> key;    ///< [batch, kv_heads, tokens, head_dim]
  quantised_view<const Scale, S> value;  ///< likewise
};

template <class T, class Scale, memory_space S>
struct cached_trait<T, coded_caches<Scale, S>> {
  using type = coded<T, Scale>;
};

/// a b + c with both operations rounded, as on the CPU: never as one.
[[nodiscard]] RESTKV_HD inline float multiply_then_add(float a, float b, float c) noexcept {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

/// One token's channels, as the numbers of type T that `dequantise` makes of them.
template <element T, element Scale>
struct token_row<coded<T, Scale>> {
  const token_chunks<coded<T, Scale>>* cache = nullptr;
  const std::uint8_t* codes = nullptr;
  index_t place = 0;  ///< of the token's codes in their bytes, where tokens share these
  int first = 0;      ///< channel that counts as 0
  const Scale* scale = nullptr;
  const Scale* zero = nullptr;
  const Scale* offset = nullptr;

  [[nodiscard]] RESTKV_HD bool exists() const noexcept { return codes != nullptr; }
  [[nodiscard]] RESTKV_HD T number(index_t c) const noexcept {
    const int channel = first + static_cast<int>(c);
    const int shift = cache->shift;
    const bool shared = cache->channels_share_bytes;
    const std::uint8_t byte = codes[(shared ? channel >> shift : channel) * cache->code_strides[3]];
    const float code = cache->format.template number<float>(byte, shared ? channel & ((1 << shift) - 1) : place);
    const int group = channel < cache->channels_per_group ? 0 : channel / cache->channels_per_group;
    const auto parameter = [&](const Scale* of, const index_t* strides) {
      return of == nullptr ? 0.0f : widen<float>(of[group * strides[3]]);
    };
    return narrow<T>(multiply_then_add(parameter(scale, cache->scale_strides),
                                       code - parameter(zero, cache->zero_strides),
                                       parameter(offset, cache->offset_strides)));
  }
  [[nodiscard]] RESTKV_HD float operator[](index_t c) const noexcept { return widen<float>(number(c)); }
  /// The channels from c on.
  [[nodiscard]] RESTKV_HD token_row from(index_t c) const noexcept {
    token_row made = *this;
    made.first += static_cast<int>(c);
    return made;
  }
};

/// A `quantised_view` as kernels are handed it.
template <element T, element Scale>
struct token_chunks<coded<T, Scale>> {
  const std::uint8_t* codes = nullptr;
  const Scale* scale = nullptr;
  const Scale* zero = nullptr;    ///< null: 0
  const Scale* offset = nullptr;  ///< null: 0
  index_t code_strides[4] = {};
  index_t scale_strides[4] = {};
  index_t zero_strides[4] = {};
  index_t offset_strides[4] = {};
  index_t tokens_per_group = 1;
  int channels_per_group = 1;
  int shift = 0;  ///< codes of a byte are 1 << shift
  bool channels_share_bytes = true;
  code_format format{};

  /// The row of a token that exists.
  [[nodiscard]] RESTKV_HD token_row<coded<T, Scale>> row(index_t batch, index_t head, index_t token) const noexcept {
    const index_t byte = channels_share_bytes ? token : token >> shift;
    const index_t group = tokens_per_group == 1 ? token : token / tokens_per_group;
    const auto at = [&](const auto* data, const index_t* strides, index_t n) {
      return data == nullptr ? data : data + batch * strides[0] + head * strides[1] + n * strides[2];
    };
    return {this,
            at(codes, code_strides, byte),
            channels_share_bytes ? 0 : token & ((index_t(1) << shift) - 1),
            0,
            at(scale, scale_strides, group),
            at(zero, zero_strides, group),
            at(offset, offset_strides, group)};
  }

  /// Of a cache that was checked.
  template <memory_space S>
  [[nodiscard]] status assign(const char*, const quantised_view<const Scale, S>& cache) noexcept {
    codes = cache.codes.data;
    scale = cache.scale.data;
    zero = cache.zero.data;
    offset = cache.offset.data;
    for (std::size_t axis = 0; axis < 4; ++axis) {
      code_strides[axis] = cache.codes.strides[axis];
      scale_strides[axis] = cache.scale.strides[axis];
      zero_strides[axis] = cache.zero.strides[axis];
      offset_strides[axis] = cache.offset.strides[axis];
    }
    tokens_per_group = cache.tokens_per_group;
    channels_per_group = static_cast<int>(std::min(cache.channels_per_group, std::max<index_t>(cache.channels, 1)));
    format = cache.format;
    shift = format.bits == 8 ? 0 : format.bits == 4 ? 1 : 2;
    channels_share_bytes = format.packed == cache_axis::channels;
    return {};
  }
};

}  // namespace restkv::kernel
