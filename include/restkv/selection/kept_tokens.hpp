// SPDX-License-Identifier: Apache-2.0
/// @file
/// `kept_tokens`: the outcome of a selection.
#pragma once

#include <restkv/core/layer.hpp>

namespace restkv {

/// Which positions each head keeps. A view: the memory belongs to the workspace or to whoever made it.
///
/// `heads` is the number of KV heads, or of query heads when the policy does not reduce over the group. The first
/// lengths(b, h) entries of positions[b][h] are valid: unique, ascending, indices of the cache's token axis (so with
/// left padding the first is at least the padding). The rest of a row is unspecified.
template <class Position = position_t, memory_space Space = memory_space::host>
struct basic_kept_tokens {
  tensor_view<Position, 3, Space> positions{};  ///< [batch, heads, capacity]
  tensor_view<Position, 2, Space> lengths{};    ///< [batch, heads]

  constexpr basic_kept_tokens() = default;
  /// A view of positions and lengths in memory of your own.
  constexpr basic_kept_tokens(tensor_view<Position, 3, Space> kept, tensor_view<Position, 2, Space> counts) noexcept
      : positions(kept), lengths(counts) {}
  /// A set that may be written is one that may be read.
  template <class U>
    requires std::is_same_v<const U, Position>
  constexpr basic_kept_tokens(const basic_kept_tokens<U, Space>& other) noexcept  // NOLINT(google-explicit-constructor)
      : positions(other.positions), lengths(other.lengths) {}

  /// Sequences.
  [[nodiscard]] constexpr index_t batch() const noexcept { return lengths.extent(0); }
  /// Rows per sequence: KV heads, or query heads.
  [[nodiscard]] constexpr index_t heads() const noexcept { return lengths.extent(1); }
  /// Largest number of positions a head may hold.
  [[nodiscard]] constexpr index_t capacity() const noexcept { return positions.extent(2); }
  /// Kept tokens over all heads of all sequences.
  [[nodiscard]] constexpr index_t total() const noexcept
    requires(Space == memory_space::host)
  {
    index_t sum = 0;
    for (index_t b = 0; b < batch(); ++b) {
      for (index_t h = 0; h < heads(); ++h) sum += lengths(b, h);
    }
    return sum;
  }
};

/// What a selection fills in.
using kept_tokens = basic_kept_tokens<position_t>;
/// What compaction and verification read.
using const_kept_tokens = basic_kept_tokens<const position_t>;
///@{
/// The same in memory of a device.
using device_kept_tokens = basic_kept_tokens<position_t, memory_space::device>;
using const_device_kept_tokens = basic_kept_tokens<const position_t, memory_space::device>;
///@}

/// The part of `check_kept` that looks at shapes alone, for a set wherever it lies.
template <class Position, memory_space Space>
[[nodiscard]] status check_kept_shape(const basic_kept_tokens<Position, Space>& kept, index_t batch,
                                      index_t kv_heads) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (kept.positions.extent(0) != kept.batch() || kept.positions.extent(1) != kept.heads()) {
    return status::error(errc::shape_mismatch, "kept.positions is [%lld, %lld, ...], kept.lengths is [%lld, %lld]",
                         ll(kept.positions.extent(0)), ll(kept.positions.extent(1)), ll(kept.batch()),
                         ll(kept.heads()));
  }
  if (kept.batch() != batch) {
    return status::error(errc::shape_mismatch, "the kept set has %lld sequences, the cache has %lld", ll(kept.batch()),
                         ll(batch));
  }
  if (kv_heads <= 0 || kept.heads() % kv_heads != 0) {
    return status::error(errc::shape_mismatch,
                         "the kept set has %lld heads, the cache has %lld: a multiple of the cache's heads is needed",
                         ll(kept.heads()), ll(kv_heads));
  }
  return {};
}

/// Checks that a kept set can be applied to a cache of `tokens` tokens: ascending, unique, in range, and one row per
/// KV head or per query head (`heads` a multiple of `kv_heads`).
[[nodiscard]] inline status check_kept(const const_kept_tokens& kept, index_t batch, index_t kv_heads,
                                       index_t tokens) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(check_kept_shape(kept, batch, kv_heads));
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      const index_t length = kept.lengths(b, h);
      if (length < 0 || length > kept.capacity()) {
        return status::error(errc::invalid_argument, "head %lld of sequence %lld keeps %lld tokens, capacity is %lld",
                             ll(h), ll(b), ll(length), ll(kept.capacity()));
      }
      index_t previous = -1;
      for (index_t i = 0; i < length; ++i) {
        const index_t position = kept.positions(b, h, i);
        if (position <= previous || position >= tokens) {
          return status::error(
              errc::invalid_argument,
              "kept position %lld at slot %lld of head %lld, sequence %lld: must be above %lld and below %lld tokens",
              ll(position), ll(i), ll(h), ll(b), ll(previous), ll(tokens));
        }
        previous = position;
      }
    }
  }
  return {};
}

/// Checks that what each head keeps are tokens of its own sequence in `layer`, for a set that passed `check_kept`.
template <element T>
[[nodiscard]] status check_kept_sequences(const const_kept_tokens& kept, const layer_view<T>& layer) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      const index_t length = kept.lengths(b, h);
      if (length == 0) continue;
      const sequence_span span = sequence(layer, b, h * layer.key.extent(1) / kept.heads());
      const index_t first = kept.positions(b, h, 0);
      const index_t last = kept.positions(b, h, length - 1);
      if (first >= span.begin && last < span.begin + span.length) continue;
      return status::error(errc::invalid_argument,
                           "head %lld of sequence %lld keeps positions %lld to %lld, its tokens are %lld to %lld",
                           ll(h), ll(b), ll(first), ll(last), ll(span.begin), ll(span.begin + span.length - 1));
    }
  }
  return {};
}

}  // namespace restkv
