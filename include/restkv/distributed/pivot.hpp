// SPDX-License-Identifier: Apache-2.0
/// @file
/// Radix selection over ranks: the pivot of keys that lie in many places, from histograms of their digits.
#pragma once

#include <restkv/distributed/communicator.hpp>
#include <restkv/selection/top_k.hpp>

#include <concepts>
#include <span>

namespace restkv::distributed {

/// Counts of a histogram: digits are bytes where nothing else is said, 4 of them in a float key, 8 in a double.
inline constexpr index_t digits = 256;

/// A search for the k-th largest of the keys of all ranks.
template <std::unsigned_integral Key>
struct pivot_search {
  index_t k = 0;             ///< which one; the same on every rank
  top_k_pivot<Key> found{};  ///< as `find_pivot` of all keys together

  Key prefix = 0;      ///< digits that are known
  index_t wanted = 0;  ///< the rank that is left to find among the keys that share them
  bool open = false;   ///< whether digits are to be found
};

/// Finds searches[i].found for the keys that for_each_key(i, visit) visits on each rank; excluded keys (0) never count.
/// The pivots are those of `restkv::find_pivot` over all keys. `histograms` is room for 2^Bits counts a search;
/// `reduce` adds such spans up over the ranks. Never sends a key: with digits of 8 bits sizeof(Key) all_reduces of 2 KB
/// a search, with 4 bits twice as many of 128 bytes. Cost: as many passes over the keys.
template <int Bits = 8, std::unsigned_integral Key, std::invocable<std::span<std::uint64_t>> Reduce, class ForEachKey>
[[nodiscard]] status find_pivots(std::span<pivot_search<Key>> searches, std::span<std::uint64_t> histograms,
                                 const Reduce& reduce, const ForEachKey& for_each_key) {
  for (auto& search : searches) {
    search.prefix = 0;
    search.wanted = search.k;
    search.open = search.k > 0;
    search.found = {static_cast<Key>(~Key(0)), 0, 0};
  }
  constexpr int key_bits = 8 * static_cast<int>(sizeof(Key));
  constexpr std::size_t values = std::size_t(1) << Bits;
  const std::span<std::uint64_t> counts = histograms.first(searches.size() * values);
  for (int low = key_bits - Bits; low >= 0; low -= Bits) {
    const Key known = low + Bits < key_bits ? static_cast<Key>(~Key(0) << (low + Bits)) : Key(0);
    std::fill(counts.begin(), counts.end(), 0u);
    for (std::size_t i = 0; i < searches.size(); ++i) {
      if (!searches[i].open) continue;
      std::uint64_t* const histogram = counts.data() + i * values;
      const Key prefix = searches[i].prefix;
      for_each_key(static_cast<index_t>(i), [&](Key key) {
        if ((key & known) == prefix && key != excluded_key) ++histogram[(key >> low) & (values - 1)];
      });
    }
    RESTKV_RETURN_IF_FAILED(reduce(counts));
    for (std::size_t i = 0; i < searches.size(); ++i) {
      pivot_search<Key>& search = searches[i];
      if (!search.open) continue;
      const std::uint64_t* const histogram = counts.data() + i * values;
      auto digit = static_cast<index_t>(values) - 1;
      for (; digit > 0 && static_cast<index_t>(histogram[digit]) < search.wanted; --digit) {
        search.wanted -= static_cast<index_t>(histogram[digit]);
      }
      if (const auto lowest = static_cast<index_t>(histogram[digit]); lowest < search.wanted) {
        search.found = {0, search.k - search.wanted + lowest, 0};  // fewer than k keys
        search.open = false;
        continue;
      }
      search.prefix = static_cast<Key>(search.prefix | (static_cast<Key>(digit) << low));
      search.found = {search.prefix, search.k - search.wanted, search.wanted};
    }
  }
  return {};
}

}  // namespace restkv::distributed
