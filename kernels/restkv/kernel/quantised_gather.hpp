// SPDX-License-Identifier: Apache-2.0
/// @file
/// Kept tokens of quantised caches: copied where each token has parameters of its own, quantised again where kept
/// tokens of several groups meet in one.
#pragma once

#include <restkv/cache/quantised_view.hpp>
#include <restkv/kernel/gather_in_place.hpp>
#include <restkv/kernel/gather_tokens.hpp>

#include <numeric>

namespace restkv::kernel {

/// The tokens of groups along the token axis, see `restkv::gather_tokens` of quantised caches. Items: [rows of the kept
/// set, parts of the slots, ranges of channels], `threads` of them a block. An item has whole groups of channels and
/// whole bytes, and walks its slots as the host does, so it meets no other, in place neither.
template <element Scale, memory_space S>
struct gather_quantised {
  static constexpr int threads = 128;
  struct shared {};

  kept_rows kept;
  index_t group;                ///< rows of the kept set for a head of the source
  quantised_view<Scale, S> in;  ///< only read, where it is not `out`
  quantised_view<Scale, S> out;
  index_t channels_of_item;
  index_t ranges;  ///< of channels
  index_t slots_of_part;
  index_t parts;

  template <class Group>
  RESTKV_HD void operator()(Group& group_of, shared&, index_t block) const {
    group_of.for_each(threads, [&](index_t i) {
      const index_t item = block * threads + i;
      if (item >= kept.count() * parts * ranges) return;
      const index_t row = item / (parts * ranges);
      const place at{row / kept.heads, row % kept.heads, row % kept.heads / group, item % ranges * channels_of_item,
                     least((item % ranges + 1) * channels_of_item, in.channels)};
      const index_t size = in.tokens_per_group;
      const index_t begin = item / ranges % parts * slots_of_part;
      const index_t length = least(kept.length(at.b, at.h), begin + slots_of_part);
      for (index_t first = begin; first < length; first += size) {
        const index_t last = least(length, first + size);
        const index_t old_group = kept.position(at.b, at.h, first) / size;
        if (old_group == kept.position(at.b, at.h, last - 1) / size) {
          for (index_t slot = first; slot < last; ++slot) copy_codes(group_of, at, slot);
          for (index_t c = at.from; c < at.to; c += in.channels_per_group) {
            set_group(group_of, at, first, c, parameters(group_of, at, old_group, c));
          }
        } else {
          for (index_t c = at.from; c < at.to; c += in.channels_per_group) {
            quantise(group_of, at, first, last, c, least(at.to, c + in.channels_per_group));
          }
        }
      }
    });
  }

 private:
  /// A head and a range of channels.
  struct place {
    index_t b, h, kv_head, from, to;
  };

  [[nodiscard]] RESTKV_HD static index_t least(index_t a, index_t b) noexcept { return a < b ? a : b; }

  template <class Group>
  [[nodiscard]] RESTKV_HD int code(const Group& group_of, const place& at, index_t n, index_t c) const {
    const index_t count = in.format.per_byte();
    return in.format.packed == cache_axis::channels
               ? in.format.read(group_of.read(in.codes(at.b, at.kv_head, n, c / count)), c % count)
               : in.format.read(group_of.read(in.codes(at.b, at.kv_head, n / count, c)), n % count);
  }
  template <class Group>
  RESTKV_HD void set_code(const Group& group_of, const place& at, index_t n, index_t c, int number) const {
    const index_t count = out.format.per_byte();
    const bool along_channels = out.format.packed == cache_axis::channels;
    std::uint8_t& byte = along_channels ? out.codes(at.b, at.h, n, c / count) : out.codes(at.b, at.h, n / count, c);
    group_of.write(byte, out.format.write(group_of.read(byte), (along_channels ? c : n) % count, number));
  }
  template <class Group>
  [[nodiscard]] RESTKV_HD group_parameters<Scale> parameters(const Group& group_of, const place& at,
                                                             index_t token_group, index_t c) const {
    const index_t channel_group = c / in.channels_per_group;
    group_parameters<Scale> made;
    made.scale = group_of.read(in.scale(at.b, at.kv_head, token_group, channel_group));
    if (in.zero.data != nullptr) made.zero = group_of.read(in.zero(at.b, at.kv_head, token_group, channel_group));
    if (in.offset.data != nullptr) made.offset = group_of.read(in.offset(at.b, at.kv_head, token_group, channel_group));
    return made;
  }
  template <class Group>
  RESTKV_HD void set_group(const Group& group_of, const place& at, index_t first, index_t c,
                           const group_parameters<Scale>& made) const {
    const index_t token_group = first / out.tokens_per_group;
    const index_t channel_group = c / out.channels_per_group;
    group_of.write(out.scale(at.b, at.h, token_group, channel_group), made.scale);
    if (out.zero.data != nullptr) group_of.write(out.zero(at.b, at.h, token_group, channel_group), made.zero);
    if (out.offset.data != nullptr) group_of.write(out.offset(at.b, at.h, token_group, channel_group), made.offset);
  }
  template <class Group>
  RESTKV_HD void copy_codes(const Group& group_of, const place& at, index_t slot) const {
    const index_t n = kept.position(at.b, at.h, slot);
    if (in.format.packed == cache_axis::channels && out.format.packed == cache_axis::channels) {
      const index_t count = in.format.per_byte();
      for (index_t i = at.from / count; i < (at.to + count - 1) / count; ++i) {
        group_of.write(out.codes(at.b, at.h, slot, i), group_of.read(in.codes(at.b, at.kv_head, n, i)));
      }
      return;
    }
    for (index_t c = at.from; c < at.to; ++c) set_code(group_of, at, slot, c, code(group_of, at, n, c));
  }
  /// One new group: every number is looked at twice, the second time just before its code is written; parameters last.
  template <class Group>
  RESTKV_HD void quantise(const Group& group_of, const place& at, index_t first, index_t last, index_t from,
                          index_t to) const {
    const auto number = [&](index_t slot, index_t c) {
      const index_t n = kept.position(at.b, at.h, slot);
      return parameters(group_of, at, n / in.tokens_per_group, c).template value<double>(code(group_of, at, n, c));
    };
    number_range range;
    for (index_t slot = first; slot < last; ++slot) {
      for (index_t c = from; c < to; ++c) range.include(number(slot, c));
    }
    const auto made = fit_group<Scale>(range, out.format, out.kind());
    for (index_t slot = first; slot < last; ++slot) {
      for (index_t c = from; c < to; ++c) {
        set_code(group_of, at, slot, c, quantise_number(number(slot, c), made, out.format, out.kind()));
      }
    }
    set_group(group_of, at, first, from, made);
  }
};

/// Copies kept tokens of a quantised cache, or, where `out` is the source itself, moves them to the front of their
/// heads: see `restkv::gather_tokens` and `restkv::compact_in_place` of quantised caches; what those check has been
/// checked.
template <element Scale, class Executor, memory_space S>
void gather_codes(Executor& executor, const kept_rows& kept, index_t group, const quantised_view<Scale, S>& in,
                  const quantised_view<Scale, S>& out) {
  if (kept.count() <= 0 || kept.capacity <= 0 || in.channels <= 0) return;
  const bool in_place = out.codes.data == in.codes.data;
  const auto along_channels = [](const code_format& format) {
    return format.packed == cache_axis::channels || format.per_byte() == 1;
  };
  if (in.tokens_per_group == 1 && along_channels(in.format) && along_channels(out.format)) {
    const auto move = [&](const auto& from, const auto& to) {
      if (to.data == nullptr) return;
      if (in_place) return compact_in_place(executor, kept, rows_of(to));
      gather(executor, kept, group, rows_of(from), rows_of(to));
    };
    move(in.codes, out.codes);
    move(in.scale, out.scale);
    move(in.zero, out.zero);
    move(in.offset, out.offset);
    return;
  }
  const index_t count = in.format.per_byte();
  const bool shares_channels = !(in.format.packed == cache_axis::tokens && out.format.packed == cache_axis::tokens);
  const bool shares_tokens = !(in.format.packed == cache_axis::channels && out.format.packed == cache_axis::channels);
  const index_t of_group = std::min(in.channels_per_group, in.channels);
  const index_t of_item = std::min(in.channels, shares_channels ? std::lcm(of_group, count) : of_group);
  const index_t ranges = (in.channels + of_item - 1) / of_item;
  const index_t slots_of_part = in_place ? kept.capacity : std::lcm(in.tokens_per_group, shares_tokens ? count : 1);
  const index_t parts = (kept.capacity + slots_of_part - 1) / slots_of_part;
  using body = gather_quantised<Scale, S>;
  const index_t items = kept.count() * parts * ranges;
  executor.launch(body{kept, group, in, out, of_item, ranges, slots_of_part, parts},
                  (items + body::threads - 1) / body::threads);
}

}  // namespace restkv::kernel
