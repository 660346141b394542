// SPDX-License-Identifier: Apache-2.0
/// @file
/// Kept tokens moved to the front of their own heads.
#pragma once

#include <restkv/kernel/gather_rows.hpp>

namespace restkv::kernel {

/// to.row(b, h, i) = from.row(b, h, kept.position(b, h, i)) for i < kept.length(b, h), within one memory, bit by bit.
/// Blocks: [rows, parts of the channels]. Positions ascend, so slot <= position: a block walks its head's slots in
/// tiles and reads a tile before it writes it; what later tiles read lies behind. Blocks of one head have other
/// channels. Tokens that do not move are not touched. Cost: one read and one write of the tokens that move.
template <int Bytes>
struct gather_in_place {
  static constexpr int threads = 512;
  static constexpr int most_slots = 1024;
  static constexpr int of_thread = 8;                        ///< cells that a thread holds
  static constexpr int part = Bytes >= 64 ? 1 : 64 / Bytes;  ///< channels of a block: 64 bytes of each token
  struct shared {
    index_t from[most_slots];
    index_t to[most_slots];
  };

  kept_rows kept;
  token_rows from;  ///< where tokens lie
  token_rows to;    ///< where they go: the same rows, or a paged cache with other tables
  index_t parts;    ///< of the channels

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    using cell = moved_bytes<Bytes>;
    const index_t row = block / parts;
    const index_t b = row / kept.heads;
    const index_t h = row % kept.heads;
    const index_t first_channel = block % parts * part;
    const index_t channels_left = from.channels - first_channel;
    const auto channels = static_cast<std::uint32_t>(channels_left < part ? channels_left : part);
    const std::uint32_t room = static_cast<std::uint32_t>(threads * of_thread) / channels;
    const index_t tile = room < most_slots ? room : most_slots;
    const index_t length = kept.length(b, h);
    for (index_t first = 0; first < length; first += tile) {
      const index_t count = length - first < tile ? length - first : tile;
      const std::uint32_t cells = static_cast<std::uint32_t>(count) * channels;
      group.for_each(count, [&](index_t i) {
        group.write(memory.from[i], from.offset(b, h, kept.position(b, h, first + i)));
        group.write(memory.to[i], to.offset(b, h, first + i));
      });
      group.sync();
      auto held = group.template locals<cell, of_thread>();
      group.for_each_thread([&](int t) {
        for (std::uint32_t j = 0; j < of_thread; ++j) {
          const std::uint32_t at = static_cast<std::uint32_t>(t) + j * threads;
          if (at >= cells) continue;
          const index_t place = group.read(memory.from[at / channels]);
          if (place == group.read(memory.to[at / channels])) continue;
          held(t)[j] = group.read(
              *reinterpret_cast<const cell*>(from.data + place + (first_channel + at % channels) * from.of_channel));
        }
      });
      group.sync();
      group.for_each_thread([&](int t) {
        for (std::uint32_t j = 0; j < of_thread; ++j) {
          const std::uint32_t at = static_cast<std::uint32_t>(t) + j * threads;
          if (at >= cells) continue;
          const index_t place = group.read(memory.to[at / channels]);
          if (place == group.read(memory.from[at / channels])) continue;
          group.write(*reinterpret_cast<cell*>(to.data + place + (first_channel + at % channels) * to.of_channel),
                      held(t)[j]);
        }
      });
      group.sync();
    }
  }
};

/// Moves kept tokens within one memory, see `restkv::compact_in_place` and, with the tables before and after as `from`
/// and `to`, `restkv::move_tokens`; what those check has been checked.
template <class Executor>
void compact_in_place(Executor& executor, const kept_rows& kept, const token_rows& from, const token_rows& to) {
  if (from.channels <= 0) return;
  with_moved_bytes(from.element_bytes, from.moves_by(16) && to.moves_by(16), [&](auto bytes) {
    using body = gather_in_place<decltype(bytes)::value>;
    const auto as = [&](const token_rows& rows) { return bytes == 16 ? rows.moved_by(16) : rows; };
    const index_t parts = (as(from).channels + body::part - 1) / body::part;
    executor.launch(body{kept, as(from), as(to), parts}, kept.count() * parts);
  });
}

/// The same where tokens stay in the rows that they have.
template <class Executor>
void compact_in_place(Executor& executor, const kept_rows& kept, const token_rows& cache) {
  compact_in_place(executor, kept, cache, cache);
}

}  // namespace restkv::kernel
