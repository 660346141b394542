// SPDX-License-Identifier: Apache-2.0
/// @file
/// Compaction of quantised caches: kept tokens take their codes and their parameters along.
///
/// Where each token has parameters of its own (tokens_per_group 1) that is a copy. Where groups run along tokens, as in
/// KIVI's keys (arXiv 2402.02750), kept tokens of several old groups meet in a new one:
///
/// - a new group all of whose tokens come from one old group keeps codes and parameters, bit by bit (sinks, chunks, and
///   whatever did not move);
/// - any other is quantised again, from the numbers that the codes stand for. That adds at most half a step of the new
///   group to the error of each number: |new - original| <= s_old / 2 + s_new / 2 (and the roundings that
///   `quantisation.hpp` names), where the range of the new group is at most that of all kept numbers in it.
///
/// The alternative, to carry old groups' parameters along with a group number for each token, would be exact, and would
/// keep as many parameters as there are old groups with a kept token: at a tenth of the tokens more memory than the
/// codes. Repeated compaction adds up, so compact once for many tokens rather than often for few.
#pragma once

#include <restkv/cache/quantise.hpp>

namespace restkv {

namespace detail {

/// Copies a token's codes: whole bytes where these are of one token.
template <element Scale>
void copy_codes(const quantised_view<const Scale>& in, const quantised_view<Scale>& out, index_t b, index_t from_head,
                index_t to_head, index_t from, index_t to) noexcept {
  if (in.format.packed == cache_axis::channels && out.format.packed == cache_axis::channels) {
    for (index_t i = 0; i < in.codes.extent(3); ++i) out.codes(b, to_head, to, i) = in.codes(b, from_head, from, i);
    return;
  }
  for (index_t c = 0; c < in.channels; ++c) out.set_code(b, to_head, to, c, in.code(b, from_head, from, c));
}

/// Fills the slots of one head in ascending order. In place no token is read after it was written, since slot <=
/// position, and no group's parameters after they were: the tokens of an old group move to groups up to its own number.
template <element Scale>
void gather_quantised_head(const const_kept_tokens& kept, const quantised_view<const Scale>& in,
                           const quantised_view<Scale>& out, index_t row) noexcept {
  const index_t b = row / kept.heads();
  const index_t h = row % kept.heads();
  const index_t kv_head = h / (kept.heads() / in.heads());
  const index_t length = kept.lengths(b, h);
  const index_t size = in.tokens_per_group;
  const auto position = [&](index_t slot) -> index_t { return kept.positions(b, h, slot); };
  for (index_t first = 0; first < length; first += size) {
    const index_t last = std::min(length, first + size);
    const index_t old_group = position(first) / size;
    if (old_group == position(last - 1) / size) {
      for (index_t slot = first; slot < last; ++slot) copy_codes(in, out, b, kv_head, h, position(slot), slot);
      for (index_t g = 0; g < in.scale.extent(3); ++g) {
        out.set_group(b, h, first / size, g, in.group(b, kv_head, old_group, g));
      }
      continue;
    }
    const auto number = [&](index_t slot, index_t c) {
      return in.template value<double>(b, kv_head, position(slot), c);
    };
    for (index_t from = 0; from < in.channels; from += in.channels_per_group) {
      quantise_group(out, b, h, first, last, from, std::min(in.channels, from + in.channels_per_group), number);
    }
  }
}

/// What `gather_tokens` of quantised caches asks of their shapes and memory, wherever these lie.
template <class Position, element Scale, memory_space Space>
[[nodiscard]] status check_quantised_gather(const basic_kept_tokens<Position, Space>& kept,
                                            const quantised_view<const Scale, Space>& in,
                                            const quantised_view<Scale, Space>& out) noexcept {
  RESTKV_RETURN_IF_FAILED(in.check());
  RESTKV_RETURN_IF_FAILED(check_quantised_output(out));
  RESTKV_RETURN_IF_FAILED(check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(check_kept_shape(kept, in.batch(), in.heads()));
  RESTKV_RETURN_IF_FAILED(check_equal("out", "sequences", out.batch(), "the kept set", kept.batch()));
  RESTKV_RETURN_IF_FAILED(check_equal("out", "heads", out.heads(), "the kept set", kept.heads()));
  RESTKV_RETURN_IF_FAILED(check_equal("out", "channels", out.channels, "source", in.channels));
  RESTKV_RETURN_IF_FAILED(check_equal("out", "tokens per group", out.tokens_per_group, "source", in.tokens_per_group));
  RESTKV_RETURN_IF_FAILED(
      check_equal("out", "channels per group", out.channels_per_group, "source", in.channels_per_group));
  if (out.format.bits != in.format.bits || out.format.is_signed != in.format.is_signed ||
      out.format.e4m3 != in.format.e4m3 || out.kind() != in.kind()) {
    return status::error(errc::shape_mismatch,
                         "out has codes of %d bits from %d and parameters of kind %d, source of %d from %d and kind %d",
                         out.format.bits, out.format.lowest(), static_cast<int>(out.kind()), in.format.bits,
                         in.format.lowest(), static_cast<int>(in.kind()));
  }
  if (in.tokens_per_group > 1)
    RESTKV_RETURN_IF_FAILED(check_integer_codes("a cache with groups along tokens", in.format));
  const auto apart = [&](const char* name, const byte_range& bytes) {
    return check_quantised_apart("out", out, name, bytes);
  };
  RESTKV_RETURN_IF_FAILED(apart("source.codes", touched_bytes(in.codes)));
  RESTKV_RETURN_IF_FAILED(apart("source.scale", touched_bytes(in.scale)));
  RESTKV_RETURN_IF_FAILED(apart("source.zero", touched_bytes(in.zero)));
  RESTKV_RETURN_IF_FAILED(apart("source.offset", touched_bytes(in.offset)));
  RESTKV_RETURN_IF_FAILED(apart("kept.positions", touched_bytes(kept.positions)));
  return apart("kept.lengths", touched_bytes(kept.lengths));
}

/// What `compact_in_place` of quantised caches asks of their shapes and memory, wherever these lie.
template <class Position, element Scale, memory_space Space>
[[nodiscard]] status check_quantised_in_place(const basic_kept_tokens<Position, Space>& kept,
                                              const quantised_view<Scale, Space>& cache) noexcept {
  RESTKV_RETURN_IF_FAILED(check_quantised_output(cache));
  if (cache.tokens_per_group > 1) {
    RESTKV_RETURN_IF_FAILED(check_integer_codes("a cache with groups along tokens", cache.format));
  }
  RESTKV_RETURN_IF_FAILED(check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(check_kept_shape(kept, cache.batch(), cache.heads()));
  RESTKV_RETURN_IF_FAILED(check_one_set(kept.heads(), "the cache", cache.heads()));
  const auto positions = touched_bytes(kept.positions);
  RESTKV_RETURN_IF_FAILED(check_quantised_apart("the cache", cache, "kept.positions", positions));
  return check_quantised_apart("the cache", cache, "kept.lengths", touched_bytes(kept.lengths));
}

}  // namespace detail

/// Copies kept tokens of a quantised cache: slot i of head h of `out` becomes token kept.positions(b, h, i) of head
/// h / group of `source`, where group = kept.heads() / source.heads().
///
/// source, out: caches with the same channels, groups, bits and parameters; out has kept.heads() heads and at least as
/// many tokens as each head keeps. What is behind a head's length stays as it is, but for the parameters of a group
/// that is partly filled. Bytes may be packed along either axis. The top of this file says what becomes of groups along
/// tokens.
///
/// Fails, before anything is written: a kept set that does not fit, inconsistent or different caches, too few slots,
/// and memory that overlaps (errc::aliasing). Cost: one read and one write of the kept tokens; two reads and the
/// arithmetic for groups that are quantised again.
template <element Scale, element OutScale, parallel_loop ParallelFor = serial_for>
  requires(std::is_same_v<std::remove_const_t<Scale>, OutScale>)
[[nodiscard]] status gather_tokens(const const_kept_tokens& kept, const quantised_view<Scale>& source,
                                   const quantised_view<OutScale>& out, const ParallelFor& parallel_for = {}) {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const quantised_view<const OutScale> in = source;
  RESTKV_RETURN_IF_FAILED(detail::check_quantised_gather(kept, in, out));
  RESTKV_RETURN_IF_FAILED(check_kept(kept, in.batch(), in.heads(), in.tokens));
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      if (kept.lengths(b, h) <= out.tokens) continue;
      return status::error(errc::shape_mismatch, "head %lld of sequence %lld keeps %lld tokens, out has room for %lld",
                           ll(h), ll(b), ll(kept.lengths(b, h)), ll(out.tokens));
    }
  }
  parallel_for(kept.batch() * kept.heads(),
               [&](index_t row) { detail::gather_quantised_head<OutScale>(kept, in, out, row); });
  return {};
}

/// Moves the kept tokens of a quantised cache to the front of their own heads, as `gather_tokens` would to another
/// cache, with the same outcome bit by bit. Keys and values are one call each.
///
/// Fails, before anything is moved: as `gather_tokens` does, and for a kept set per query head (errc::unsupported).
template <element Scale, parallel_loop ParallelFor = serial_for>
  requires(!std::is_const_v<Scale>)
[[nodiscard]] status compact_in_place(const const_kept_tokens& kept, const quantised_view<Scale>& cache,
                                      const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_quantised_in_place(kept, cache));
  RESTKV_RETURN_IF_FAILED(check_kept(kept, cache.batch(), cache.heads(), cache.tokens));
  const quantised_view<const Scale> in = cache;
  parallel_for(kept.batch() * kept.heads(),
               [&](index_t row) { detail::gather_quantised_head<Scale>(kept, in, cache, row); });
  return {};
}

}  // namespace restkv
