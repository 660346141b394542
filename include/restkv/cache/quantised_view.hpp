// SPDX-License-Identifier: Apache-2.0
/// @file
/// `quantised_view`: keys or values as codes with scales, over memory somebody else owns.
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/cache/quantisation.hpp>
#include <restkv/core/tensor_view.hpp>

#include <type_traits>

namespace restkv {

/// A cache tensor of quantised numbers: [batch, heads, tokens, channels] codes, in groups of tokens_per_group tokens by
/// channels_per_group channels, each with parameters of its own (`quantisation.hpp`). The groups begin at token 0 and
/// channel 0; the last of an axis may be smaller.
///
/// | cache | bits | tokens_per_group | channels_per_group |
/// |---|---|---|---|
/// | int8, a scale for each token and head | 8 | 1 | channels |
/// | 4 bits, groups along channels | 4 | 1 | 32, say |
/// | fp8 (`e4m3`), a scale for the tensor | 8 | tokens, or 1 with strides of 0 | channels |
/// | KIVI's keys (arXiv 2402.02750): for each channel, groups along tokens | 2 or 4 | 32, say | 1 |
///
/// Scale: float, half, bfloat16 or double, const for a cache that is only read. A missing `zero` or `offset` is 0; a
/// cache has one of them at most. Strides of 0 repeat a scale, in a cache that is only read.
template <class Scale, memory_space Space = memory_space::host>
  requires element<Scale>
struct quantised_view {
  using scale_type = std::remove_const_t<Scale>;  ///< of scales, zero points and offsets
  /// const where the scales are
  using byte_type = std::conditional_t<std::is_const_v<Scale>, const std::uint8_t, std::uint8_t>;

  tensor_view<byte_type, 4, Space> codes{};  ///< [batch, heads, tokens, channels], the packed axis in bytes
  tensor_view<Scale, 4, Space> scale{};      ///< [batch, heads, token groups, channel groups]
  tensor_view<Scale, 4, Space> zero{};       ///< the same; optional
  tensor_view<Scale, 4, Space> offset{};     ///< the same; optional
  index_t tokens = 0;                        ///< tokens of the cache
  index_t channels = 0;                      ///< channels of a token
  index_t tokens_per_group = 1;              ///< 1: each token has parameters of its own
  index_t channels_per_group = 1;            ///< `channels`: all channels share them
  code_format format{};                      ///< how codes lie in bytes

  /// A cache that may be written is one that may be read.
  template <class Other>
    requires(!std::is_const_v<Scale> && std::is_same_v<Other, quantised_view<const Scale, Space>>)
  constexpr operator Other() const noexcept {  // NOLINT(google-explicit-constructor)
    return {codes, scale, zero, offset, tokens, channels, tokens_per_group, channels_per_group, format};
  }

  /// Sequences.
  [[nodiscard]] constexpr index_t batch() const noexcept { return codes.extent(0); }
  /// KV heads.
  [[nodiscard]] constexpr index_t heads() const noexcept { return codes.extent(1); }
  /// What is stored beside the scales.
  [[nodiscard]] constexpr quantisation_kind kind() const noexcept {
    return zero.data != nullptr     ? quantisation_kind::zero
           : offset.data != nullptr ? quantisation_kind::offset
                                    : quantisation_kind::symmetric;
  }

  /// The code of a number. Bounds are the caller's.
  [[nodiscard]] constexpr int code(index_t b, index_t h, index_t n, index_t c) const noexcept {
    const index_t count = format.per_byte();
    return format.packed == cache_axis::channels ? format.read(codes(b, h, n, c / count), c % count)
                                                 : format.read(codes(b, h, n / count, c), n % count);
  }
  /// Stores a code; the others of its byte stay.
  constexpr void set_code(index_t b, index_t h, index_t n, index_t c, int number) const noexcept
    requires(!std::is_const_v<Scale>)
  {
    const index_t count = format.per_byte();
    const bool along_channels = format.packed == cache_axis::channels;
    std::uint8_t& byte = along_channels ? codes(b, h, n, c / count) : codes(b, h, n / count, c);
    byte = format.write(byte, (along_channels ? c : n) % count, number);
  }
  /// The parameters of a group.
  [[nodiscard]] constexpr group_parameters<scale_type> group(index_t b, index_t h, index_t token_group,
                                                             index_t channel_group) const noexcept {
    group_parameters<scale_type> made;
    made.scale = scale(b, h, token_group, channel_group);
    if (zero.data != nullptr) made.zero = zero(b, h, token_group, channel_group);
    if (offset.data != nullptr) made.offset = offset(b, h, token_group, channel_group);
    return made;
  }
  /// Stores the parameters of a group, those that the cache has.
  constexpr void set_group(index_t b, index_t h, index_t token_group, index_t channel_group,
                           const group_parameters<scale_type>& made) const noexcept
    requires(!std::is_const_v<Scale>)
  {
    scale(b, h, token_group, channel_group) = made.scale;
    if (zero.data != nullptr) zero(b, h, token_group, channel_group) = made.zero;
    if (offset.data != nullptr) offset(b, h, token_group, channel_group) = made.offset;
  }
  /// The number of channel c of token n: scale * (code - zero) + offset.
  template <std::floating_point Real = float>
  [[nodiscard]] constexpr Real value(index_t b, index_t h, index_t n, index_t c) const noexcept {
    const index_t count = format.per_byte();
    const bool along_channels = format.packed == cache_axis::channels;
    const std::uint8_t byte = along_channels ? codes(b, h, n, c / count) : codes(b, h, n / count, c);
    return group(b, h, n / tokens_per_group, c / channels_per_group)
        .value_at(format.number<Real>(byte, (along_channels ? c : n) % count));
  }

  /// Fails on codes or parameters of another shape than tokens, channels and groups say, on null pointers, on codes of
  /// another number of bits than 2, 4 or 8, on groups of less than 1, and on a cache with both zero points and offsets.
  [[nodiscard]] status check() const noexcept {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    RESTKV_RETURN_IF_FAILED(format.check());
    if (tokens < 0 || channels < 0) {
      return status::error(errc::invalid_argument, "%lld tokens of %lld channels: must not be negative", ll(tokens),
                           ll(channels));
    }
    if (tokens_per_group < 1 || channels_per_group < 1) {
      return status::error(errc::invalid_argument, "groups of %lld tokens by %lld channels: must be at least 1 by 1",
                           ll(tokens_per_group), ll(channels_per_group));
    }
    const bool along_channels = format.packed == cache_axis::channels;
    RESTKV_RETURN_IF_FAILED(check_shape("codes", codes, along_channels ? tokens : format.bytes(tokens),
                                        along_channels ? format.bytes(channels) : channels));
    const index_t token_groups = groups(tokens, tokens_per_group);
    const index_t channel_groups = groups(channels, channels_per_group);
    RESTKV_RETURN_IF_FAILED(check_shape("scale", scale, token_groups, channel_groups));
    if (zero.data != nullptr || zero.size() > 0) {
      RESTKV_RETURN_IF_FAILED(check_shape("zero", zero, token_groups, channel_groups));
    }
    if (offset.data != nullptr || offset.size() > 0) {
      RESTKV_RETURN_IF_FAILED(check_shape("offset", offset, token_groups, channel_groups));
    }
    if (zero.data != nullptr && offset.data != nullptr) {
      return status::error(errc::unsupported, "there are %lld zero points and %lld offsets: a cache has one of them",
                           ll(zero.size()), ll(offset.size()));
    }
    return {};
  }

 private:
  [[nodiscard]] static constexpr index_t groups(index_t count, index_t of) noexcept {
    return count / of + (count % of != 0 ? 1 : 0);
  }
  template <class U>
  [[nodiscard]] status check_shape(const char* name, const tensor_view<U, 4, Space>& view, index_t third,
                                   index_t fourth) const noexcept {
    RESTKV_RETURN_IF_FAILED(detail::check_view(name, view));
    RESTKV_RETURN_IF_FAILED(detail::check_equal(name, "sequences", view.extent(0), "codes", batch()));
    RESTKV_RETURN_IF_FAILED(detail::check_equal(name, "heads", view.extent(1), "codes", heads()));
    RESTKV_RETURN_IF_FAILED(detail::check_equal(name, "entries on axis 2", view.extent(2), "the cache", third));
    return detail::check_equal(name, "entries on axis 3", view.extent(3), "the cache", fourth);
  }
};

}  // namespace restkv
