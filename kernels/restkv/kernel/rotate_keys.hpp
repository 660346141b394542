// SPDX-License-Identifier: Apache-2.0
/// @file
/// Keys turned to new positions, where they lie or on their way to another cache.
#pragma once

#include <restkv/cache/rope.hpp>
#include <restkv/kernel/gather_rows.hpp>

namespace restkv::kernel {

/// out.row(b, h, i) = source.row(b, h / group, i or kept.position(b, h, i)), turned by
/// (position(b, h, i) - kept.position(b, h, i)) * frequencies[pair], see `restkv::rotate_keys`. Blocks: [rows of the
/// kept set, tiles of `tile` slots]. A key that does not move keeps its bits; channels behind the pairs are copied.
/// Cost: one read and one write of the keys, a sine and a cosine a pair and slot.
template <element T, new_position NewPosition>
struct rotate_keys {
  static constexpr int threads = 256;
  static constexpr int tile = 32;
  struct shared {
    index_t from[tile];
    index_t to[tile];
    double shift[tile];
  };
  using real = std::conditional_t<std::is_same_v<T, double>, double, float>;

  kept_rows kept;     ///< the positions that the keys carry
  index_t group;      ///< rows of the kept set for a head of the source
  token_rows source;  ///< `out` itself where `gathers` is false
  token_rows out;
  bool gathers;               ///< keys lie at their positions and go to their slots; else they are in their slots
  const double* frequencies;  ///< [pairs]
  index_t pairs;
  rotary_pairs pairing;
  NewPosition position;
  index_t tiles;

  template <class Group>
  RESTKV_HD void operator()(Group& group_of, shared& memory, index_t block) const {
    const index_t row = block / tiles;
    const index_t b = row / kept.heads;
    const index_t h = row % kept.heads;
    const index_t first = block % tiles * tile;
    const index_t left = kept.length(b, h) - first;
    const index_t count = left < tile ? left : tile;
    if (count <= 0) return;
    group_of.for_each(count, [&](index_t i) {
      const index_t slot = first + i;
      const index_t old = kept.position(b, h, slot);
      group_of.write(memory.from[i], gathers ? source.offset(b, h / group, old) : source.offset(b, h, slot));
      group_of.write(memory.to[i], out.offset(b, h, slot));
      group_of.write(memory.shift[i], static_cast<double>(position(b, h, slot)) - static_cast<double>(old));
    });
    group_of.sync();
    const detail::rotary_channels channels(pairing, static_cast<std::size_t>(pairs));
    const auto of_pairs = static_cast<std::uint32_t>(pairs);
    const auto items = static_cast<std::uint32_t>(count) * of_pairs;
    group_of.for_each(items, [&](index_t item) {
      const std::uint32_t i = static_cast<std::uint32_t>(item) / of_pairs;
      const std::uint32_t pair = static_cast<std::uint32_t>(item) % of_pairs;
      const double shift = group_of.read(memory.shift[i]);
      if (shift == 0 && !gathers) return;
      const index_t c0 = channels.first(pair);
      const index_t c1 = channels.second(pair);
      T x = cell(source, group_of.read(memory.from[i]), c0);
      T y = cell(source, group_of.read(memory.from[i]), c1);
      if (shift != 0) {
        const sine_and_cosine turned = group_of.sine_cosine(shift * frequencies[pair]);
        detail::rotate_pair(x, y, static_cast<real>(turned.cosine), static_cast<real>(turned.sine));
      }
      group_of.write(cell(out, group_of.read(memory.to[i]), c0), x);
      group_of.write(cell(out, group_of.read(memory.to[i]), c1), y);
    });
    if (!gathers) return;
    const auto rest = static_cast<std::uint32_t>(source.channels) - 2 * of_pairs;
    group_of.for_each(static_cast<std::uint32_t>(count) * rest, [&](index_t item) {
      const std::uint32_t i = static_cast<std::uint32_t>(item) / rest;
      const index_t c = 2 * pairs + static_cast<std::uint32_t>(item) % rest;
      group_of.write(cell(out, group_of.read(memory.to[i]), c), T(cell(source, group_of.read(memory.from[i]), c)));
    });
  }

 private:
  [[nodiscard]] RESTKV_HD static T& cell(const token_rows& rows, index_t row, index_t channel) noexcept {
    return *reinterpret_cast<T*>(rows.data + row + channel * rows.of_channel);
  }
};

/// Turns keys in their slots, see `restkv::rotate_keys`; what that checks has been checked. frequencies: in the
/// executor's memory.
template <element T, class Executor, new_position NewPosition = slot_position>
void rotate(Executor& executor, const kept_rows& old, const token_rows& keys, const double* frequencies, index_t pairs,
            rotary_pairs pairing, const NewPosition& position = {}) {
  using body = rotate_keys<T, NewPosition>;
  if (pairs <= 0 || old.capacity <= 0) return;
  const index_t tiles = (old.capacity + body::tile - 1) / body::tile;
  executor.launch(body{old, 1, keys, keys, false, frequencies, pairs, pairing, position, tiles}, old.count() * tiles);
}

/// Copies kept keys and turns them on their way: `gather`, then `rotate` of what it made, in one read and one write.
template <element T, class Executor, new_position NewPosition = slot_position>
void gather_rotated(Executor& executor, const kept_rows& kept, index_t group, const token_rows& source,
                    const token_rows& out, const double* frequencies, index_t pairs, rotary_pairs pairing,
                    const NewPosition& position = {}) {
  using body = rotate_keys<T, NewPosition>;
  if (source.channels <= 0 || kept.capacity <= 0) return;
  const index_t tiles = (kept.capacity + body::tile - 1) / body::tile;
  executor.launch(body{kept, group, source, out, true, frequencies, pairs, pairing, position, tiles},
                  kept.count() * tiles);
}

}  // namespace restkv::kernel
