// SPDX-License-Identifier: Apache-2.0
/// @file
/// How a session's running scores take in one more query.
#pragma once

#include <restkv/session/session_memory.hpp>

#include <algorithm>

namespace restkv {

namespace detail {

/// The newest token of a layer counts, and its query [query_heads, 1, head_dim] is asked for running scores.
template <tensor_backend Backend, class SessionPolicy, element T>
[[nodiscard]] status count_token(Backend& backend, const session_plan<SessionPolicy>& plan,
                                 const session_memory<Backend, SessionPolicy, T>& memory, index_t layer,
                                 const tensor_view<const T, 3>& query) {
  session_layer<T>& s = memory.layers[layer];
  ++s.seen;
  ++s.since_eviction;
  if constexpr (runs<typename SessionPolicy::running_type>) {
    if (s.seen % plan.policy.refresh != 0) return {};
    problem_shape shape = plan.shape;
    shape.layer = layer;
    const auto request = make_observation_request(plan.policy, shape);
    workspace space(memory.selection, plan.selection_bytes);
    typename Backend::template scratch<observation_request<SessionPolicy>> scratch(backend, request, space);
    layer_view<T> view = s.view(0);
    view.query = with_batch(query);
    const tensor_view<typename Backend::score_type, 3> scores(memory.scores, {1, shape.query_heads, shape.tokens});
    RESTKV_RETURN_IF_FAILED(backend.token_scores(request, view, scratch, scores));
    s.fold(plan.policy.running, [&](index_t h, index_t slot) { return static_cast<double>(scores(0, h, slot)); },
           [&](index_t h) { return request.past_of(s.lengths(0, h)); });
  }
  return {};
}

/// The newest token of a layer counts, and what its query paid, row(query head, slot), is scored.
template <class SessionPolicy, class T, class Row>
void count_token_with(const session_plan<SessionPolicy>& plan, session_layer<T>& s, index_t layer,
                      const Row& row) noexcept {
  ++s.seen;
  ++s.since_eviction;
  if constexpr (runs<typename SessionPolicy::running_type> && reads_attention_rows<session_score<SessionPolicy>>) {
    if (s.seen % plan.policy.refresh != 0) return;
    const auto score_of = [&](index_t h, index_t slot) {
      token_features<double> f;
      f.attention = row(h, slot);
      f.odds = f.attention / std::max(1.0 - f.attention, least_rest);
      f.position = slot;
      f.length = s.lengths(0, h / plan.shape.group());
      f.head = h;
      f.layer = layer;
      return static_cast<double>(plan.policy.policy.score(f));
    };
    s.fold(plan.policy.running, score_of, [&](index_t h) -> index_t { return s.lengths(0, h); });
  }
}

}  // namespace detail

}  // namespace restkv
