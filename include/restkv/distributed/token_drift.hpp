// SPDX-License-Identifier: Apache-2.0
/// @file
/// The drift of attention over a sequence whose tokens lie on several ranks.
#pragma once

#include <restkv/distributed/pivot.hpp>
#include <restkv/distributed/token_parts.hpp>
#include <restkv/score/features.hpp>

namespace restkv::distributed::detail {

/// The drift of one query head: see `adaptive_window`. The `most_attended` tokens of each query are found by 16
/// histograms of 16 counts, their positions added up as whole numbers, so that every rank gets the bits of one process.
template <element T, communicator Ranks>
[[nodiscard]] double window_drift(const layer_view<T>& layer, index_t batch, index_t head,
                                  const reference::token_range& tokens, index_t window, index_t most_attended,
                                  token_parts<Ranks>& parts) {
  const index_t pairs = window / 2;
  const index_t count = std::min(most_attended, tokens.length);
  if (pairs == 0 || count <= 0) return 0.0;
  const std::vector<reference::attention_row> rows =
      reference::window_attention(layer, batch, head, tokens, window, 0, 2 * pairs, head_perturbation{}, parts);
  std::vector<pivot_search<std::uint64_t>> searches(rows.size());
  for (auto& search : searches) search.k = count;
  std::vector<std::uint64_t> histograms(rows.size() * 16);
  parts.note(find_pivots<4>(
      std::span(searches), std::span(histograms), [&](std::span<std::uint64_t> counts) { return parts.add_up(counts); },
      [&](index_t i, const auto& visit) {
        for (const double share : rows[static_cast<std::size_t>(i)].share) visit(order_key(share));
      }));
  std::vector<std::uint64_t> equal(rows.size());
  std::vector<index_t> wanted;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (const double share : rows[i].share) equal[i] += order_key(share) == searches[i].found.key ? 1 : 0;
    wanted.push_back(searches[i].found.equal);
  }
  std::vector<index_t> equal_left = parts.share_in_order(equal, wanted);
  std::vector<std::uint64_t> sums(rows.size());  // of the most attended tokens' positions
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::size_t n = 0; n < rows[i].share.size(); ++n) {
      const std::uint64_t key = order_key(rows[i].share[n]);
      const bool chosen = key > searches[i].found.key || (key == searches[i].found.key && equal_left[i]-- > 0);
      if (chosen) sums[i] += static_cast<std::uint64_t>(tokens.first) + n;
    }
  }
  static_cast<void>(parts.add_up(sums));
  double drift = 0;
  const auto mean = [&](index_t i) {
    return static_cast<double>(sums[static_cast<std::size_t>(i)]) / static_cast<double>(count);
  };
  for (index_t pair = 0; pair < pairs; ++pair) drift += mean(pair) - mean(pairs + pair);
  return drift / static_cast<double>(pairs);
}

}  // namespace restkv::distributed::detail
