// SPDX-License-Identifier: Apache-2.0
/// @file
/// Kept tokens copied from one cache to another.
#pragma once

#include <restkv/kernel/gather_rows.hpp>

namespace restkv::kernel {

/// out.row(b, h, i) = source.row(b, h / group, kept.position(b, h, i)) for i < kept.length(b, h), bit by bit. Blocks:
/// [rows of the kept set, tiles of `tile` slots]. Cost: one read and one write of the kept tokens.
template <int Bytes>
struct gather_tokens {
  static constexpr int threads = 256;
  static constexpr int tile = 64;
  struct shared {
    index_t from[tile];
    index_t to[tile];
  };

  kept_rows kept;
  index_t group;  ///< rows of the kept set for a head of the source
  token_rows source;
  token_rows out;
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
      group_of.write(memory.from[i], source.offset(b, h / group, kept.position(b, h, first + i)));
      group_of.write(memory.to[i], out.offset(b, h, first + i));
    });
    group_of.sync();
    using cell = moved_bytes<Bytes>;
    constexpr int at_once = 4;
    const auto channels = static_cast<std::uint32_t>(source.channels);
    const std::uint32_t cells = static_cast<std::uint32_t>(count) * channels;
    group_of.for_each_thread([&](int t) {
      for (std::uint32_t i = static_cast<std::uint32_t>(t); i < cells; i += at_once * threads) {
        cell held[at_once];
        for (std::uint32_t j = 0; j < at_once; ++j) {
          const std::uint32_t at = i + j * threads;
          if (at >= cells) continue;
          const index_t place = group_of.read(memory.from[at / channels]) + at % channels * source.of_channel;
          held[j] = *reinterpret_cast<const cell*>(source.data + place);
        }
        for (std::uint32_t j = 0; j < at_once; ++j) {
          const std::uint32_t at = i + j * threads;
          if (at >= cells) continue;
          const index_t place = group_of.read(memory.to[at / channels]) + at % channels * out.of_channel;
          group_of.write(*reinterpret_cast<cell*>(out.data + place), held[j]);
        }
      }
    });
  }
};

/// Copies kept tokens, see `restkv::gather_tokens`; what that checks has been checked. `group`: rows of the kept set
/// for a head of the source. Source and output do not overlap.
template <class Executor>
void gather(Executor& executor, const kept_rows& kept, index_t group, const token_rows& source, const token_rows& out) {
  if (source.channels <= 0 || kept.capacity <= 0) return;
  with_moved_bytes(source.element_bytes, source.moves_by(16) && out.moves_by(16), [&](auto bytes) {
    using body = gather_tokens<decltype(bytes)::value>;
    const index_t tiles = (kept.capacity + body::tile - 1) / body::tile;
    const auto as = [&](const token_rows& rows) { return bytes == 16 ? rows.moved_by(16) : rows; };
    executor.launch(body{kept, group, as(source), as(out), tiles}, kept.count() * tiles);
  });
}

}  // namespace restkv::kernel
