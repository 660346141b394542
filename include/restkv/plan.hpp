// SPDX-License-Identifier: Apache-2.0
/// @file
/// `plan`: a policy validated for a shape, with the workspace it needs.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/core/workspace.hpp>
#include <restkv/policy.hpp>
#include <restkv/selection/kept_tokens.hpp>
#include <restkv/selection/pruning.hpp>

#include <limits>

namespace restkv {

/// What `select` needs to know, computed once. A plain value: copy it, keep it for the life of the model.
template <class Policy>
struct plan {
  Policy policy{};
  problem_shape shape{};
  index_t heads = 0;                ///< rows of a kept set per sequence: KV heads, or query heads without group reduction
  index_t capacity = 0;             ///< most tokens one head can keep
  std::size_t workspace_bytes = 0;  ///< what `select` needs, its result included
};

/// What the selection saw, for inspection: every member is filled, over the tokens of each sequence counted from its
/// beginning. Asking for it costs the memory of one more row per head and turns certified pruning off.
template <std::floating_point Real>
struct selection_details {
  tensor_view<Real, 3> score{};     ///< before spatial smoothing, [batch, heads, tokens]; defined below `past`
  tensor_view<Real, 3> smoothed{};  ///< after it, [batch, heads, tokens]
  tensor_view<double, 2> drift{};   ///< [batch, heads]; 0 unless the spatial smoother needs it
};

namespace detail {

/// The memory of one selection, carved from a workspace by the same code when planning and when running.
template <class Backend, class Policy>
struct selection_memory {
  using real = typename Backend::score_type;
  using key = order_key_t<real>;

  tensor_view<position_t, 3> positions;  // [batch, heads, capacity]
  tensor_view<position_t, 2> lengths;    // [batch, heads]
  tensor_view<real, 3> score;            // [batch, heads, tokens]
  tensor_view<real, 3> smoothed;         // [batch, heads, tokens]
  tensor_view<double, 2> drift;          // [batch, heads]
  index_t* counts;                       // [batch * heads]
  double* shares;                        // [batch * heads]
  token_state* states = nullptr;         // [batch, heads, tokens]; only where certified pruning may run
  std::uint8_t* settled = nullptr;       // likewise
  pruning_row<key>* rows = nullptr;      // [batch * heads], likewise

  selection_memory(const Backend& backend, const plan<Policy>& p, workspace& space) noexcept {
    const index_t count = p.shape.batch * p.heads;
    positions = {space.take<position_t>(count * p.capacity), {p.shape.batch, p.heads, p.capacity}};
    lengths = {space.take<position_t>(count), {p.shape.batch, p.heads}};
    score = {space.take<real>(count * p.shape.tokens), {p.shape.batch, p.heads, p.shape.tokens}};
    smoothed = {space.take<real>(count * p.shape.tokens), {p.shape.batch, p.heads, p.shape.tokens}};
    drift = {space.take<double>(count), {p.shape.batch, p.heads}};
    counts = space.take<index_t>(count);
    shares = space.take<double>(count);
    if constexpr (may_prune<Backend, Policy>) {
      if (!backend.bounds_pay(make_score_request(p.policy, p.shape))) return;
      states = space.take<token_state>(count * p.shape.tokens);
      settled = space.take<std::uint8_t>(count * p.shape.tokens);
      rows = space.take<pruning_row<key>>(count);
    }
  }
};

}  // namespace detail
}  // namespace restkv
