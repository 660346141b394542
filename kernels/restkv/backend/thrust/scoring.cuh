// SPDX-License-Identifier: Apache-2.0
/// @file
/// The stages of `token_scores` on a Thrust system, slab by slab.
#pragma once

#include <restkv/backend/thrust/scratch.cuh>

namespace restkv::on_thrust {

/// One call of `token_scores`. Host loops go over slabs alone; what a slab holds is one call of an algorithm.
template <class System, class Request, element T, memory_space Space>
class scoring {
  using needs = needs_of<Request>;
  using score = typename needs::score;
  using temporal = typename needs::temporal;
  using problem_t = problem<T, Space>;

 public:
  scoring(const instance<System>& system, const Request& request, const problem_t& p, scratch<Request, Space>& memory)
      : system_(system), request_(request), p_(p), memory_(memory) {}

  void run(const tensor_view<float, 3, Space>& out) {
    if constexpr (needs::window) {
      loop(policy(), p_.batch * (p_.query_heads / p_.group) * p_.lanes,
           fill_weights<temporal>{request_.temporal, memory_.spans, memory_.weights, p_.lanes});
    }
    if constexpr (has(needs::set, feature::mean_distance)) {
      loop(policy(), p_.batch * (p_.query_heads / p_.group) * channel_blocks(p_.head_dim),
           mean_values<problem_t>{p_, memory_.mean});
      loop(policy(), p_.heads() * channel_blocks(p_.head_dim),
           map_means<problem_t>{p_, memory_.mean, memory_.mean_image});
    }
    if constexpr (needs::local) {
      if (streams(request_)) {
        stream_queries(system_, p_, request_, memory_.slab(), memory_.parts_at_once(bytes_of_streamed_row(p_.tokens)),
                       memory_.weights, memory_.scores);
        return reduce(out);
      }
    }
    if constexpr (needs::window) {
      const bool after = order_of(request_.score) == query_order::after;
      observe_queries(!after);
      if (after) {
        smooth_attention();
        score_tokens(true);
      } else {
        score_tokens(false);
      }
    } else {
      score_tokens(true);
    }
    reduce(out);
  }

 private:
  [[nodiscard]] auto policy() const { return system_.policy(); }

  /// States of all queries; their outputs where those are scored.
  void observe_queries(bool with_outputs) {
    for_slabs(
        p_.heads(), p_.lanes, memory_.parts_at_once(bytes_of_streamed_row(p_.tokens)), [&](const lane_slab& slab) {
          workspace space = memory_.slab();
          const lane_memory lanes(slab.rows(), p_.tokens, space);
          const index_t first = slab.first_head * p_.lanes + slab.first_lane;
          lane_state* const states = memory_.states + first;
          observe(system_, p_, slab, lanes, states, p_.lanes);
          if (!needs::output && memory_.pool_scale == nullptr) return;
          if (!with_outputs && memory_.pool_scale == nullptr) return;
          loop(policy(), slab.rows() * p_.tokens,
               logits_to_shares<problem_t>{p_, slab, states, p_.lanes, lanes.logits});
          if (memory_.pool_scale != nullptr) {
            loop(
                policy(), slab.rows(),
                scale_pools<problem_t>{p_, slab, lanes.logits, memory_.pool_scale + first, 2 * reach_of(request_) + 1});
          }
          if constexpr (needs::output) {
            if (with_outputs) {
              loop(policy(), slab.rows() * channel_blocks(p_.head_dim),
                   weigh_values<problem_t>{p_, slab, lanes.logits, states, nullptr, nullptr, p_.lanes,
                                           memory_.outputs.whole + first * p_.head_dim,
                                           memory_.outputs.less_top + first * p_.head_dim});
            }
          }
        });
    if constexpr (needs::output) {
      if (with_outputs) map_outputs(system_, p_, p_.lanes, memory_.outputs);
    }
  }

  /// Order `after`: attention over the past, reduced over the window's queries, and 1 less it, which is not a
  /// subtraction: as the queries' rests r are 1 - a, 1 - S(1 - r) = -S(-r) for every smoother S that does not mind a
  /// constant.
  void smooth_attention() {
    for_token_slabs([&](const token_slab& slab, const token_memory& memory) {
      loop(policy(), slab.items() * p_.lanes, cells<cell_kind::share>(slab, memory));
      loop(policy(), slab.items(), reducer(slab, memory, memory_.smoothed, 1.0));
      loop(policy(), slab.items() * p_.lanes, cells<cell_kind::rest>(slab, memory));
      loop(policy(), slab.items(), reducer(slab, memory, memory_.rests, -1.0));
    });
    if constexpr (needs::output) {
      reduce_rows(policy(), p_.heads(), p_.tokens, peak_of_share<problem_t>{p_, memory_.smoothed}, memory_.partial_tops,
                  memory_.tops, join_peaks{});
      loop(policy(), p_.heads() * channel_blocks(p_.head_dim),
           weigh_values<problem_t>{p_, lane_slab{0, p_.heads(), 0, 1}, memory_.smoothed, nullptr, memory_.tops,
                                   memory_.rests, 1, memory_.outputs.whole, memory_.outputs.less_top});
      map_outputs(system_, p_, 1, memory_.outputs);
    }
  }

  /// The heads' scores; `once` a token, or under every query.
  void score_tokens(bool once) {
    for_token_slabs([&](const token_slab& slab, const token_memory& memory) {
      if constexpr (needs::images) {
        loop(policy(), slab.items() * channel_blocks(p_.head_dim), map_values<problem_t>{p_, slab, memory.images});
      }
      if constexpr (!needs::local) {
        loop(policy(), slab.items(),
             find_facts<problem_t, needs::set>{p_, slab, memory.images, memory_.mean_image, memory.facts});
      }
      if (once) {
        loop(policy(), slab.items(),
             score_once<problem_t, score>{p_, slab, parts(), memory, memory_.smoothed, memory_.rests,
                                          needs::output ? memory_.tops : nullptr, memory_.scores});
        return;
      }
      if constexpr (needs::window) {
        const index_t reach = reach_of(request_);
        if (reach > 0) {
          loop(policy(), slab.heads * (slab.tokens + 2 * reach) * p_.lanes,
               fill_shares<problem_t>{p_, slab, memory_.states, memory.shares, reach});
        }
        loop(policy(), slab.items() * p_.lanes, cells<cell_kind::score>(slab, memory));
        loop(policy(), slab.items(), reducer(slab, memory, memory_.scores, 1.0));
      }
    });
  }

  void reduce(const tensor_view<float, 3, Space>& out) {
    loop(policy(), p_.batch * request_.heads() * p_.tokens,
         reduce_groups<problem_t, Space>{p_, request_.group, p_.query_heads / request_.heads(), memory_.scores, out});
  }

  [[nodiscard]] score_parts<score> parts() const { return {request_.score, memory_.outputs, request_.shape.layer}; }
  template <cell_kind Kind>
  [[nodiscard]] fill_cells<problem_t, score, Kind> cells(const token_slab& slab, const token_memory& memory) const {
    return {p_, slab, parts(), memory, memory_.states, memory_.pool_scale, reach_of(request_)};
  }
  template <class Out>
  [[nodiscard]] reduce_cells<problem_t, temporal, Out> reducer(const token_slab& slab, const token_memory& memory,
                                                               Out* to, double sign) const {
    return {p_, slab, request_.temporal, memory.cells, memory_.weights, to, is_linear(request_.temporal), sign};
  }

  /// Calls body(slab, its memory) for all tokens of all heads.
  template <class Body>
  void for_token_slabs(const Body& body) {
    const index_t reach = reach_of(request_);
    const index_t width = needs::images ? p_.head_dim : 0;
    const index_t at_once = memory_.parts_at_once(token_memory::bytes_of_token(p_.lanes, reach, width));
    for_slabs(p_.heads(), p_.tokens, at_once, [&](const lane_slab& part) {
      const token_slab slab{part.first_head, part.heads, part.first_lane, part.lanes};
      workspace space = memory_.slab();
      body(slab, token_memory(slab, p_.lanes, reach, width, space));
    });
  }

  const instance<System>& system_;
  const Request& request_;
  const problem_t& p_;
  scratch<Request, Space>& memory_;
};

}  // namespace restkv::on_thrust
