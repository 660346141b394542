// SPDX-License-Identifier: Apache-2.0
/// @file
/// Spatial smoothing of rows whose tokens lie on several ranks.
#pragma once

#include <restkv/distributed/token_parts.hpp>
#include <restkv/smoothing/spatial.hpp>

namespace restkv::distributed::detail {

/// Neighbours that a rank needs of others: `halo` on both sides, or all where `whole`.
struct smoothing_need {
  index_t halo = 0;
  bool whole = false;
};

/// What a smoother needs for a row; the same on every rank, which all know the row's context. Direct sums are the same
/// wherever a row begins; running sums and what says nothing of its reach are not.
template <spatial_smoother Smoother>
[[nodiscard]] smoothing_need need_of(const Smoother& smoother, const row_context& row) noexcept {
  if constexpr (monotone_spatial_smoother<Smoother>) {
    const token_reach reach = smoother.reach(row);
    if (reach.first <= 0 && reach.last >= 0 && reach.last - reach.first < widest_direct_reach) {
      return {std::max(-reach.first, reach.last), false};
    }
  }
  return {0, true};
}

/// Smooths the rows of one sequence, in place. `rows` are this rank's parts, each of counts[rank] scores, one row
/// behind the other; row r has contexts[r]. Says nothing where no row needs a neighbour; gathers 2 `halo` scores a row,
/// or whole rows.
template <spatial_smoother Smoother, communicator Ranks>
void smooth_rows(const Smoother& smoother, std::span<const row_context> contexts, std::span<const index_t> counts,
                 index_t rank, std::span<double> rows, token_parts<Ranks>& parts) {
  smoothing_need need;
  for (const row_context& row : contexts) {
    const smoothing_need more = need_of(smoother, row);
    need = {std::max(need.halo, more.halo), need.whole || more.whole};
  }
  index_t longest = 0;
  for (const index_t count : counts) longest = std::max(longest, count);
  const auto own = static_cast<std::size_t>(counts[static_cast<std::size_t>(rank)]);
  // What each rank shows of a row: its first tokens and its last ones, all of them where it has not so many.
  const auto shown = static_cast<std::size_t>(need.whole ? longest : std::min(need.halo, longest));
  const std::size_t sides = need.whole ? 1 : 2;
  std::vector<double> shows(contexts.size() * sides * shown);
  for (std::size_t r = 0; r < contexts.size(); ++r) {
    const std::size_t few = std::min(shown, own);
    const double* const row = rows.data() + r * own;
    std::copy_n(row, few, shows.data() + r * sides * shown);
    if (sides == 2) std::copy_n(row + own - few, few, shows.data() + (r * sides + 1) * shown);
  }
  const std::vector<double> all = shown > 0 ? parts.template gather<double>(shows) : std::vector<double>();
  const auto show_of = [&](std::size_t q, std::size_t r, std::size_t side) {
    const double* const first = all.data() + ((q * contexts.size() + r) * sides + side) * shown;
    return std::span<const double>(first, std::min(shown, static_cast<std::size_t>(counts[q])));
  };
  const std::size_t wanted = need.whole ? ~std::size_t(0) : static_cast<std::size_t>(need.halo);
  std::vector<double> in;
  std::vector<double> out;
  for (std::size_t r = 0; r < contexts.size() && own > 0; ++r) {
    in.clear();
    std::size_t before = 0;  // tokens in front of this rank's
    if (shown > 0) {
      // Of the ranks before, as many of the last tokens as are needed.
      std::size_t q = static_cast<std::size_t>(rank);
      for (std::size_t missing = wanted; q > 0 && missing > 0;) {
        const auto last = show_of(--q, r, sides - 1);
        const std::size_t taken = std::min(missing, last.size());
        in.insert(in.begin(), last.end() - static_cast<std::ptrdiff_t>(taken), last.end());
        missing -= taken;
      }
    }
    before = in.size();
    in.insert(in.end(), rows.begin() + static_cast<std::ptrdiff_t>(r * own),
              rows.begin() + static_cast<std::ptrdiff_t>((r + 1) * own));
    if (shown > 0) {
      std::size_t missing = wanted;
      for (std::size_t q = static_cast<std::size_t>(rank) + 1; q < counts.size() && missing > 0; ++q) {
        const auto first = show_of(q, r, 0);
        const std::size_t taken = std::min(missing, first.size());
        in.insert(in.end(), first.begin(), first.begin() + static_cast<std::ptrdiff_t>(taken));
        missing -= taken;
      }
    }
    out.resize(in.size());
    smoother(std::span<const double>(in), std::span<double>(out), contexts[r]);
    std::copy_n(out.begin() + static_cast<std::ptrdiff_t>(before), own,
                rows.begin() + static_cast<std::ptrdiff_t>(r * own));
  }
}

}  // namespace restkv::distributed::detail
