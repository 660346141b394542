// SPDX-License-Identifier: Apache-2.0
/// @file
/// The memory of a selection on a bulk backend, and which policies it serves.
#pragma once

#include <restkv/backend/bulk.hpp>
#include <restkv/selection/kept_tokens.hpp>
#include <restkv/selection/pruning.hpp>

namespace restkv::detail {

/// True where `select` takes all rows of a policy at once: on a bulk backend, for a score of tokens, a spatial smoother
/// that can be run in parts, and no rescorer. Other policies run row by row where the backend's memory is the host's.
template <class Backend, class Policy>
inline constexpr bool selects_in_bulk =
    bulk_backend<Backend>&& token_score<decltype(Policy::score)>&& parted_spatial_smoother<decltype(Policy::spatial)> &&
    !rescores<decltype(Policy::rescoring)>;

/// Rows that one sequence may have: what the host knows of them lies on its stack.
inline constexpr index_t most_bulk_rows = 1024;

/// Mask words of `tokens` tokens, one bit each.
[[nodiscard]] constexpr index_t mask_words(index_t tokens) noexcept { return (tokens + 31) / 32; }

/// What certified pruning needs besides; null where it does not run.
template <memory_space Space>
struct bulk_pruning_memory {
  tensor_view<token_state, 3, Space> states{};          // [batch, heads, tokens]
  std::uint32_t* keys = nullptr;                        // [batch * heads, tokens], of scores and bounds
  std::uint32_t* settled = nullptr;                     // likewise, of scores alone
  index_t* wanted = nullptr;                            // [batch * heads], chosen units of each row
  top_k_pivot<std::uint32_t>* pooled_pivots = nullptr;  // [batch]

  bulk_pruning_memory() = default;
  template <class Plan>
  bulk_pruning_memory(const Plan& p, workspace& from)
      : states(from.take<token_state>(p.shape.batch, p.heads, p.shape.tokens),
               {p.shape.batch, p.heads, p.shape.tokens}),
        keys(from.take<std::uint32_t>(p.shape.batch, p.heads, p.shape.tokens)),
        settled(from.take<std::uint32_t>(p.shape.batch, p.heads, p.shape.tokens)),
        wanted(from.take<index_t>(p.shape.batch, p.heads)),
        pooled_pivots(from.take<top_k_pivot<std::uint32_t>>(p.shape.batch)) {}
};

/// True where bounds pay and nothing but the layer stands in the way of pruning: a key is that of one token of one row,
/// and which keys decide about the budgets is known.
template <class Backend, class Plan>
[[nodiscard]] bool prunes_in_bulk([[maybe_unused]] const Backend& backend, [[maybe_unused]] const Plan& p) noexcept {
  using policy_t = std::remove_cvref_t<decltype(p.policy)>;
  if constexpr (may_prune<Backend, policy_t>) {
    return backend.bounds_pay(make_score_request(p.policy, p.shape)) && p.policy.granularity.tokens == 1 &&
           !p.policy.granularity.shared;
  } else {
    return false;
  }
}

/// Everything a selection writes, in the backend's memory; carved by the same code when planning and when running.
template <class Backend, class Plan>
struct bulk_memory {
  static constexpr memory_space space = space_of<Backend>();

  tensor_view<position_t, 3, space> positions;  // [batch, heads, capacity]
  tensor_view<position_t, 2, space> lengths;    // [batch, heads]
  tensor_view<float, 3, space> score;           // [batch, heads, tokens]; later the rows' order keys
  tensor_view<float, 3, space> smoothed;        // [batch, heads, tokens]
  double* drift;                                // [batch * rows]
  bulk_span* spans;                             // [batch * rows], or [batch] where heads do not differ
  index_t* candidates;                          // [batch * rows], in units
  index_t* counts;                              // [batch * rows]
  index_t* pooled;                              // [batch]
  double* shares;                               // [batch * rows]
  top_k_pivot<std::uint32_t>* pivots;           // [batch * rows]
  std::uint32_t* mask;                          // [batch, mask_words(tokens)]
  typename Backend::top_k_scratch top_k;
  bulk_pruning_memory<space> pruning;

  bulk_memory(const Backend& backend, const Plan& p, workspace& from)
      : positions(from.take<position_t>(p.shape.batch, p.heads, p.capacity), {p.shape.batch, p.heads, p.capacity}),
        lengths(from.take<position_t>(p.shape.batch, p.heads), {p.shape.batch, p.heads}),
        score(from.take<float>(p.shape.batch, p.heads, p.shape.tokens), {p.shape.batch, p.heads, p.shape.tokens}),
        smoothed(from.take<float>(p.shape.batch, p.heads, p.shape.tokens), {p.shape.batch, p.heads, p.shape.tokens}),
        drift(from.take<double>(p.shape.batch, p.rows)),
        spans(from.take<bulk_span>(p.shape.batch, p.rows)),
        candidates(from.take<index_t>(p.shape.batch, p.rows)),
        counts(from.take<index_t>(p.shape.batch, p.rows)),
        pooled(from.take<index_t>(p.shape.batch)),
        shares(from.take<double>(p.shape.batch, p.rows)),
        pivots(from.take<top_k_pivot<std::uint32_t>>(p.shape.batch, p.rows)),
        mask(from.take<std::uint32_t>(p.shape.batch, mask_words(p.shape.tokens))),
        top_k(backend, bulk_shape{p.shape.batch * p.rows, p.shape.tokens}, from) {
    if (prunes_in_bulk(backend, p)) pruning = bulk_pruning_memory<space>(p, from);
  }
};

}  // namespace restkv::detail
