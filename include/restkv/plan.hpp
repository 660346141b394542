// SPDX-License-Identifier: Apache-2.0
/// @file
/// `plan` and `make_plan`: a policy validated for a shape, with the workspace it needs.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/core/workspace.hpp>
#include <restkv/policy.hpp>
#include <restkv/selection/bulk_memory.hpp>
#include <restkv/selection/kept_tokens.hpp>
#include <restkv/selection/pruning.hpp>

#include <algorithm>
#include <limits>

namespace restkv {

/// What `select` needs to know, computed once. A plain value: copy it, keep it for the life of the model.
template <class Policy>
struct plan {
  Policy policy{};                  ///< as it was given
  problem_shape shape{};            ///< the largest layer it serves
  index_t heads = 0;                ///< rows of a kept set per sequence: KV heads, or query heads without group reduction
  index_t rows = 0;                 ///< rows of scores per sequence: `heads`, or 1 where a layer's heads share
  index_t capacity = 0;             ///< most tokens one head can keep
  std::size_t workspace_bytes = 0;  ///< what `select` needs, its result included
};

/// What the selection saw, for inspection: every member is filled, over the tokens of each sequence counted from its
/// beginning. Asking for it costs the memory of one more row per head and turns certified pruning off.
template <std::floating_point Real, memory_space Space = memory_space::host>
struct selection_details {
  tensor_view<Real, 3, Space> score{};     ///< before spatial smoothing, [batch, heads, tokens]; defined below `past`
  tensor_view<Real, 3, Space> smoothed{};  ///< after it, [batch, heads, tokens]
  tensor_view<double, 2, Space> drift{};   ///< [batch, heads]; 0 unless the spatial smoother needs it

  /// That every member has room for `rows` heads of `tokens` tokens in each of `batch` sequences.
  [[nodiscard]] status check(index_t batch, index_t rows, index_t tokens) const noexcept {
    const auto check_room = [](const char* name, const auto& member, const auto& wanted) -> status {
      if (std::find(wanted.begin(), wanted.end(), 0) != wanted.end()) return {};  // nothing is written
      for (std::size_t axis = 0; axis < wanted.size(); ++axis) {
        if (member.extent(axis) < wanted[axis] || (member.data == nullptr && wanted[axis] > 0)) {
          return status::error(errc::shape_mismatch, "details.%s has room for %lld %s, %lld are needed", name,
                               static_cast<long long>(member.data == nullptr ? 0 : member.extent(axis)),
                               axis == 0   ? "sequences"
                               : axis == 1 ? "heads"
                                           : "tokens",
                               static_cast<long long>(wanted[axis]));
        }
      }
      return {};
    };
    RESTKV_RETURN_IF_FAILED(check_room("score", score, std::array{batch, rows, tokens}));
    RESTKV_RETURN_IF_FAILED(check_room("smoothed", smoothed, std::array{batch, rows, tokens}));
    return check_room("drift", drift, std::array{batch, rows});
  }
};

namespace detail {

/// A sequence of `length` tokens as an allocator sees it, when no mask protects more than the policy does.
template <class Policy>
[[nodiscard]] constexpr budget_problem budget_of_span(const Policy& policy, const problem_shape& shape, index_t rows,
                                                      index_t length) noexcept {
  const index_t unit = policy.granularity.tokens;
  const index_t end = std::max<index_t>(0, length - policy.recent()) / unit;  // of the units without a recent token
  const index_t first = (std::min(policy.protect.sink, length) + unit - 1) / unit;
  return {.heads = rows,
          .length = (length + unit - 1) / unit,
          .candidates = std::max<index_t>(0, end - first),
          .layer = shape.layer,
          .layers = shape.layers,
          .unit = unit};
}

/// What a rescorer's weights are asked for with: no queries, the mean over the query heads of a row.
template <class Policy>
[[nodiscard]] constexpr auto make_weight_request(const Policy& policy, const problem_shape& shape) noexcept {
  using weight = decltype(weight_of(policy.rescoring));
  static_assert(!needs_window<weight>(), "a rescorer's weight may not need queries");
  return score_request<weight, mean>{
      weight_of(policy.rescoring), {}, 0,
      policy.group == group_reduce::none ? group_reduce::none : group_reduce::mean, shape};
}

/// What the attention is asked for with that a rescorer looks at.
template <class Policy>
[[nodiscard]] constexpr auto make_attention_request(const Policy& policy, const problem_shape& shape) noexcept {
  return score_request<snap_kv, mean>{
      {}, {}, policy.window, policy.group == group_reduce::none ? group_reduce::none : group_reduce::mean, shape};
}

/// What a rescorer looks at besides the scores, computed by a backend.
template <class Backend, class Policy>
class rescoring_inputs {
  using rescoring_t = decltype(Policy::rescoring);
  using weights_t = decltype(make_weight_request(std::declval<const Policy&>(), problem_shape{}));
  using attention_t = decltype(make_attention_request(std::declval<const Policy&>(), problem_shape{}));
  static constexpr bool weighs = has_weight<rescoring_t>;
  static constexpr bool attends = rescoring_reads_attention<rescoring_t>();
  struct nothing {
    template <class... Arguments>
    explicit constexpr nothing(const Arguments&...) noexcept {}
  };

 public:
  rescoring_inputs(const Backend& backend, const Policy& policy, const problem_shape& shape, workspace& space)
      : weights_(make_weight_request(policy, shape)),
        attention_(make_attention_request(policy, shape)),
        weight_scratch_(backend, weights_, space),
        attention_scratch_(backend, attention_, space) {}

  /// Fills memory.weights and memory.attention, where the rescorer asks for them.
  template <class T, class Memory>
  [[nodiscard]] status compute(Backend& backend, const layer_view<T>& layer, Memory& memory) {
    if constexpr (weighs) {
      RESTKV_RETURN_IF_FAILED(backend.token_scores(weights_, layer, weight_scratch_, memory.weights));
      if constexpr (weights_are_shares<rescoring_t>()) {
        RESTKV_RETURN_IF_FAILED(divide_by_sum_over_heads(backend, layer, memory.weights));
      }
    }
    if constexpr (attends) {
      RESTKV_RETURN_IF_FAILED(backend.token_scores(attention_, layer, attention_scratch_, memory.attention));
    }
    return {};
  }

 private:
  /// Heads of different lengths: token n of each.
  template <class T, class Real>
  [[nodiscard]] static status divide_by_sum_over_heads(Backend& backend, const layer_view<T>& layer,
                                                       const tensor_view<Real, 3>& weights) {
    constexpr index_t most = 2048;  // tokens at a time, 16 KB
    std::array<double, most> sums;
    for (index_t b = 0; b < weights.extent(0); ++b) {
      const index_t length = shortest_head(layer, b);
      for (index_t first = 0; first < length; first += most) {
        const index_t count = std::min(most, length - first);
        sums.fill(0.0);
        RESTKV_RETURN_IF_FAILED(
            fold_heads(backend, std::span(sums).first(static_cast<std::size_t>(count)), [&](bool) {
              for (index_t n = 0; n < count; ++n) {
                for (index_t h = 0; h < weights.extent(1); ++h) {
                  sums[static_cast<std::size_t>(n)] += static_cast<double>(weights(b, h, first + n));
                }
              }
            }));
        for (index_t n = 0; n < count; ++n) {
          const double sum = sums[static_cast<std::size_t>(n)];
          for (index_t h = 0; h < weights.extent(1) && sum > 0; ++h) {
            Real& weight = weights(b, h, first + n);
            weight = static_cast<Real>(static_cast<double>(weight) / sum);
          }
        }
      }
    }
    return {};
  }

  weights_t weights_;
  attention_t attention_;
  std::conditional_t<weighs, typename Backend::template scratch<weights_t>, nothing> weight_scratch_;
  std::conditional_t<attends, typename Backend::template scratch<attention_t>, nothing> attention_scratch_;
};

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
  index_t* candidates;                   // [batch * heads], in units
  index_t* counts;                       // [batch * heads]
  double* shares;                        // [batch * heads]
  tensor_view<token_state, 3> states{};  // [batch, heads, tokens]; only where certified pruning may run
  std::uint8_t* settled = nullptr;       // likewise
  pruning_row<key>* rows = nullptr;      // [batch * heads], likewise
  tensor_view<real, 3> weights{};        // [batch, heads, tokens]; only for a rescorer that has weights
  tensor_view<real, 3> attention{};      // [batch, heads, tokens]; only for a rescorer that reads it
  real* rescoring = nullptr;             // [batch * heads, scratch of a row]

  selection_memory(const Backend& backend, const plan<Policy>& p, workspace& space) noexcept {
    const index_t count = p.shape.batch * p.heads;
    positions = {space.take<position_t>(count, p.capacity), {p.shape.batch, p.heads, p.capacity}};
    lengths = {space.take<position_t>(count), {p.shape.batch, p.heads}};
    score = {space.take<real>(count, p.shape.tokens), {p.shape.batch, p.heads, p.shape.tokens}};
    smoothed = {space.take<real>(count, p.shape.tokens), {p.shape.batch, p.heads, p.shape.tokens}};
    drift = {space.take<double>(count), {p.shape.batch, p.heads}};
    candidates = space.take<index_t>(count);
    counts = space.take<index_t>(count);
    shares = space.take<double>(count);
    if constexpr (rescores<decltype(Policy::rescoring)>) {
      if constexpr (has_weight<decltype(Policy::rescoring)>) {
        weights = {space.take<real>(count, p.shape.tokens), {p.shape.batch, p.heads, p.shape.tokens}};
      }
      if constexpr (rescoring_reads_attention<decltype(Policy::rescoring)>()) {
        attention = {space.take<real>(count, p.shape.tokens), {p.shape.batch, p.heads, p.shape.tokens}};
      }
      rescoring = space.take<real>(count, scratch_size_of(p.policy.rescoring, p.shape));
    }
    if constexpr (may_prune<Backend, Policy>) {
      if (!backend.bounds_pay(make_score_request(p.policy, p.shape))) return;
      states = {space.take<token_state>(count, p.shape.tokens), {p.shape.batch, p.heads, p.shape.tokens}};
      settled = space.take<std::uint8_t>(count, p.shape.tokens);
      rows = space.take<pruning_row<key>>(count);
    }
  }
};

/// What a bulk backend asks of a plan beyond the rest.
template <class Backend, class Policy>
[[nodiscard]] status check_bulk_plan(const plan<Policy>& made) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (made.rows > most_bulk_rows || made.shape.batch > most_bulk_rows) {
    return status::error(errc::unsupported, "%lld sequences of %lld heads: this backend serves %lld of each at most",
                         ll(made.shape.batch), ll(made.rows), ll(most_bulk_rows));
  }
  if constexpr (space_of<Backend>() == memory_space::device) {
    const auto problem = budget_of_span(made.policy, made.shape, made.rows, made.shape.tokens);
    bool by_keys = true;
    if constexpr (pooled_budget_allocator<decltype(made.policy.budget)>) by_keys = !made.policy.budget.pools();
    if constexpr (ranking_budget_allocator<decltype(made.policy.budget)>) {
      by_keys = by_keys && made.policy.budget.deciding_keys(problem) != 0;
    }
    if (by_keys) {
      return status::error(errc::unsupported,
                           "the budget allocator looks at the keys of all %lld tokens of %lld heads, which lie in the "
                           "device's memory: see pooled_budget_allocator",
                           ll(problem.length), ll(problem.heads));
    }
  }
  return {};
}

}  // namespace detail

/// Validates a policy for a shape and computes the workspace. Nothing is allocated.
///
/// Errors: a bad parameter of any part; heads that are not a multiple; a budget smaller than the protected tokens; an
/// axis beyond 2^31 - 1 tokens.
template <tensor_backend Backend, class Policy>
[[nodiscard]] status make_plan(const Backend& backend, const Policy& policy, const problem_shape& shape,
                               plan<Policy>& out) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(policy.check());
  RESTKV_RETURN_IF_FAILED(check_groups(shape.query_heads, shape.kv_heads));
  constexpr index_t most_heads = index_t(1) << 16;
  if (shape.query_heads > most_heads) {
    return status::error(errc::invalid_argument, "query has %lld heads, at most %lld are possible",
                         ll(shape.query_heads), ll(most_heads));
  }
  if (shape.head_dim < 1 || shape.head_dim > 4096) {
    return status::error(errc::invalid_argument, "head_dim is %lld, must be within [1, 4096]", ll(shape.head_dim));
  }
  if (shape.batch < 0 || shape.tokens < 0) {
    return status::error(errc::invalid_argument, "the shape has %lld sequences of %lld tokens: neither may be negative",
                         ll(shape.batch), ll(shape.tokens));
  }
  constexpr index_t longest = std::numeric_limits<position_t>::max();
  if (shape.tokens > longest) {
    return status::error(errc::invalid_argument, "the shape has %lld tokens, the longest axis is %lld",
                         ll(shape.tokens), ll(longest));
  }
  if (shape.layers < 1 || shape.layer < 0 || shape.layer >= shape.layers) {
    return status::error(errc::invalid_argument, "layer %lld of %lld layers does not exist", ll(shape.layer),
                         ll(shape.layers));
  }
  constexpr index_t most_layers = index_t(1) << 20;
  if (shape.layers > most_layers) {
    return status::error(errc::invalid_argument, "%lld layers, at most %lld are possible", ll(shape.layers),
                         ll(most_layers));
  }
  constexpr index_t most_rows = index_t(1) << 40;
  if (shape.batch > most_rows / shape.query_heads / std::max<index_t>(1, shape.tokens)) {
    return status::error(errc::invalid_argument, "%lld sequences of %lld heads of %lld tokens pass 2^40 scores",
                         ll(shape.batch), ll(shape.query_heads), ll(shape.tokens));
  }
  if constexpr (head_score<decltype(policy.score)>) {
    if constexpr (requires { { policy.score.check(shape) } -> std::same_as<status>; }) {
      RESTKV_RETURN_IF_FAILED(policy.score.check(shape));
    }
  }
  if constexpr (requires { { policy.spatial.check(shape) } -> std::same_as<status>; }) {
    RESTKV_RETURN_IF_FAILED(policy.spatial.check(shape));
  }
  plan<Policy> made;
  made.policy = policy;
  made.shape = shape;
  made.heads = policy.group == group_reduce::none ? shape.query_heads : shape.kv_heads;
  made.rows = policy.granularity.shared ? 1 : made.heads;
  const auto longest_sequence = detail::budget_of_span(policy, shape, made.rows, shape.tokens);
  const index_t unit = policy.granularity.tokens;
  const index_t budget = policy.budget.tokens_per_head(longest_sequence);
  if (budget < longest_sequence.protected_tokens()) {
    const char* const units = unit == 1 ? "tokens" : "chunks or pages";
    return status::error(errc::invalid_argument,
                         "the budget is %lld %s per head, %lld are protected (%lld sinks, %lld recent)",
                         ll(budget), units, ll(longest_sequence.protected_tokens()), ll(policy.protect.sink),
                         ll(policy.recent()));
  }
  // A shorter sequence may end elsewhere in its last unit, and protect one more.
  const index_t most = policy.budget.most_per_head(longest_sequence) + (unit == 1 ? 0 : 1);
  const index_t fixed = std::min(shape.tokens, policy.protect.sink + policy.recent());
  made.capacity = most >= (shape.tokens + unit - 1) / unit ? shape.tokens
                                                           : std::clamp<index_t>(most * unit, fixed, shape.tokens);
  if constexpr (detail::selects_in_bulk<Backend, Policy>) {
    RESTKV_RETURN_IF_FAILED(detail::check_bulk_plan<Backend>(made));
    workspace counting;
    detail::bulk_memory<Backend, plan<Policy>> memory(backend, made, counting);
    typename Backend::template scratch<score_request_of<Policy>> scratch(backend, make_score_request(policy, shape),
                                                                         counting);
    RESTKV_RETURN_IF_FAILED(counting.check());
    made.workspace_bytes = counting.required_bytes();
  }
  if constexpr (detail::space_of<Backend>() == memory_space::host) {
    // On a bulk backend whose memory is the host's too: choices over several layers take its rows one by one.
    workspace counting;
    detail::selection_memory<Backend, Policy> memory(backend, made, counting);
    typename Backend::template scratch<score_request_of<Policy>> scratch(backend, make_score_request(policy, shape),
                                                                         counting);
    if constexpr (rescores<decltype(policy.rescoring)>) {
      detail::rescoring_inputs<Backend, Policy> inputs(backend, policy, shape, counting);
    }
    RESTKV_RETURN_IF_FAILED(counting.check());
    made.workspace_bytes = std::max(made.workspace_bytes, counting.required_bytes());
  } else {
    static_assert(detail::selects_in_bulk<Backend, Policy>,
                  "a device backend serves policies with a score of tokens, a spatial smoother that has parts and "
                  "smooth_part, and no rescorer");
  }
  out = made;
  return {};
}

#if RESTKV_EXCEPTIONS

/// `make_plan` that throws `restkv::error`.
template <tensor_backend Backend, class Policy>
[[nodiscard]] plan<Policy> make_plan(const Backend& backend, const Policy& policy, const problem_shape& shape) {
  plan<Policy> made;
  throw_if_failed(make_plan(backend, policy, shape, made));
  return made;
}

#endif

}  // namespace restkv
