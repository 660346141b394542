// SPDX-License-Identifier: Apache-2.0
/// @file
/// Ranks agree that all of them can go on, on the same problem, before they begin to wait for each other.
#pragma once

#include <restkv/distributed/communicator.hpp>

#include <bit>

namespace restkv::distributed {

/// A part of an axis that the ranks divide: heads, or tokens.
struct axis_part {
  index_t first = 0;  ///< index on the whole axis of this rank's first
  index_t whole = 0;  ///< length of the whole axis
};

/// The part of rank `rank` where `size` ranks divide an axis as evenly as whole blocks of `block` allow: the first
/// ranks get one block more, the last what is left. `count` is how many it has.
[[nodiscard]] constexpr axis_part even_part(index_t whole, index_t rank, index_t size, index_t& count,
                                            index_t block = 1) noexcept {
  const index_t blocks = (whole + block - 1) / block;
  const auto begin_of = [&](index_t r) {
    const index_t before = r * (blocks / size) + (r < blocks % size ? r : blocks % size);
    return before * block < whole ? before * block : whole;
  };
  count = begin_of(rank + 1) - begin_of(rank);
  return {begin_of(rank), whole};
}

namespace detail {

/// What the ranks must have in common, mixed into one number.
class digest {
 public:
  constexpr digest& add(std::uint64_t value) noexcept {
    state_ = (std::rotl(state_, 23) ^ value) * 0x9e3779b97f4a7c15u;
    state_ ^= state_ >> 32;
    return *this;
  }
  constexpr digest& add(index_t value) noexcept { return add(static_cast<std::uint64_t>(value)); }
  [[nodiscard]] constexpr std::uint64_t value() const noexcept { return state_; }

 private:
  std::uint64_t state_ = 0x243f6a8885a308d3u;
};

/// What a rank says of itself.
struct rank_facts {
  std::uint64_t digest = 0;  ///< of the problem
  std::uint64_t first = 0;   ///< of its part of the axis
  std::uint64_t count = 0;
  std::uint64_t whole = 0;
};

/// One all_gather of `rank_facts`. Fails on every rank where their problems differ, and where their parts of the axis
/// do not lie behind each other or do not make the whole. `all` has room for the facts of every rank.
template <communicator C>
[[nodiscard]] status agree_on_problem(C& ranks, std::uint64_t problem, const char* axis, const axis_part& part,
                                      index_t count, std::span<rank_facts> all) {
  const auto u64 = [](index_t n) { return static_cast<std::uint64_t>(n); };
  const rank_facts mine{problem, u64(part.first), u64(count), u64(part.whole)};
  RESTKV_RETURN_IF_FAILED(gather_all(ranks, std::span(&mine, 1), all));
  const auto ull = [](std::size_t n) { return static_cast<unsigned long long>(n); };
  std::uint64_t end = 0;
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].whole != all[0].whole) {
      return status::error(errc::shape_mismatch, "rank %llu divides %llu %s, rank 0 %llu", ull(r), ull(all[r].whole),
                           axis, ull(all[0].whole));
    }
    if (all[r].first != end) {
      return status::error(errc::shape_mismatch, "rank %llu begins at %llu of the %s, the one before it ends at %llu",
                           ull(r), ull(all[r].first), axis, ull(end));
    }
    end += all[r].count;
  }
  if (end != all[0].whole) {
    return status::error(errc::shape_mismatch, "the ranks have %llu %s together, the layer has %llu", ull(end), axis,
                         ull(all[0].whole));
  }
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].digest == all[0].digest) continue;
    return status::error(errc::shape_mismatch,
                         "rank %llu has another problem than rank 0: policy, shape, lengths and mask must be the same",
                         ull(r));
  }
  return {};
}

/// Whether all ranks can go on: an all_reduce of 8 bytes. Fails on every rank where one cannot.
template <communicator C>
[[nodiscard]] status all_ok(C& ranks, const status& own) {
  // The largest failed rank, counted from 1.
  std::uint64_t failed = own.ok() ? 0 : static_cast<std::uint64_t>(ranks.rank()) + 1;
  const status said = ranks.all_reduce(std::span(&failed, 1), reduction::max);
  if (!own.ok()) return own;
  RESTKV_RETURN_IF_FAILED(said);
  if (failed == 0) return {};
  return status::error(errc::communication_failure, "rank %llu of %lld cannot go on: see its own error",
                       static_cast<unsigned long long>(failed - 1), static_cast<long long>(ranks.size()));
}

}  // namespace detail

}  // namespace restkv::distributed
