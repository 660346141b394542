// SPDX-License-Identifier: Apache-2.0
/// @file
/// `split_kept`: one kept set for a cache that lies in two parts.
#pragma once

#include <restkv/cache/gather.hpp>

#include <array>
#include <utility>

namespace restkv {

/// Splits a kept set at a token of the cache: `front` becomes the positions below `boundary`, `back` those from it on,
/// counted from it. For caches whose beginning lies elsewhere or in another form than their end: quantised tokens and
/// the newest ones that are not yet (the residual of KIVI, arXiv 2402.02750), a shared prompt and a sequence's own
/// tokens.
///
/// front, back: memory for positions [batch, heads, capacity] and lengths [batch, heads]; a capacity of that of `kept`
/// always suffices.
///
/// Fails, before anything is written: a kept set whose lengths exceed its capacity, a negative boundary, other shapes,
/// too little room (with both numbers), and memory that overlaps. Cost: one read of the kept set.
[[nodiscard]] inline status split_kept(const const_kept_tokens& kept, index_t boundary, const kept_tokens& front,
                                       const kept_tokens& back) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(detail::check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(
      detail::check_equal("kept.positions", "sequences", kept.positions.extent(0), "kept.lengths", kept.batch()));
  RESTKV_RETURN_IF_FAILED(
      detail::check_equal("kept.positions", "heads", kept.positions.extent(1), "kept.lengths", kept.heads()));
  RESTKV_RETURN_IF_FAILED(detail::check_lengths(kept));
  if (boundary < 0) {
    return status::error(errc::invalid_argument,
                         "a kept set of capacity %lld is split at token %lld, must be at least 0", ll(kept.capacity()),
                         ll(boundary));
  }
  const auto below = [&](index_t b, index_t h) {
    index_t count = 0;
    while (count < kept.lengths(b, h) && kept.positions(b, h, count) < boundary) ++count;
    return count;
  };
  for (const kept_tokens* const part : {&front, &back}) {
    const char* const name = part == &front ? "front" : "back";
    RESTKV_RETURN_IF_FAILED(detail::check_kept_memory(*part));
    for (const auto& [has, want] :
         {std::pair(part->batch(), kept.batch()), std::pair(part->heads(), kept.heads()),
          std::pair(part->positions.extent(0), kept.batch()), std::pair(part->positions.extent(1), kept.heads())}) {
      RESTKV_RETURN_IF_FAILED(detail::check_equal(name, "sequences or heads", has, "the kept set", want));
    }
    RESTKV_RETURN_IF_FAILED(detail::check_distinct(name, part->positions));
    RESTKV_RETURN_IF_FAILED(detail::check_distinct(name, part->lengths));
    for (index_t b = 0; b < kept.batch(); ++b) {
      for (index_t h = 0; h < kept.heads(); ++h) {
        const index_t count = part == &front ? below(b, h) : kept.lengths(b, h) - below(b, h);
        if (count <= part->capacity()) continue;
        return status::error(errc::shape_mismatch,
                             "%s gets %lld positions of head %lld of sequence %lld, its capacity is %lld", name,
                             ll(count), ll(h), ll(b), ll(part->capacity()));
      }
    }
  }
  const std::array<byte_range, 6> memory{touched_bytes(front.positions), touched_bytes(front.lengths),
                                         touched_bytes(back.positions),  touched_bytes(back.lengths),
                                         touched_bytes(kept.positions),  touched_bytes(kept.lengths)};
  constexpr std::array<const char*, 6> names{"front.positions", "front.lengths",  "back.positions",
                                             "back.lengths",    "kept.positions", "kept.lengths"};
  for (std::size_t written = 0; written < 4; ++written) {
    for (std::size_t other = written + 1; other < 6; ++other) {
      RESTKV_RETURN_IF_FAILED(detail::check_disjoint(names[written], memory[written], names[other], memory[other]));
    }
  }
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      const index_t first = below(b, h);
      const index_t length = kept.lengths(b, h);
      for (index_t i = 0; i < first; ++i) front.positions(b, h, i) = kept.positions(b, h, i);
      for (index_t i = first; i < length; ++i) {
        back.positions(b, h, i - first) = static_cast<position_t>(kept.positions(b, h, i) - boundary);
      }
      front.lengths(b, h) = static_cast<position_t>(first);
      back.lengths(b, h) = static_cast<position_t>(length - first);
    }
  }
  return {};
}

}  // namespace restkv
