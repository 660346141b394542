// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a rank that holds a part of a layer's tokens knows before it sees a score.
#pragma once

#include <restkv/distributed/layer_budget.hpp>
#include <restkv/plan.hpp>
#include <restkv/reference/backend.hpp>

#include <vector>

namespace restkv::distributed::detail {

/// What tokens on several ranks do not admit, by the policy alone.
template <class Policy>
[[nodiscard]] status check_token_policy(const Policy& policy) noexcept {
  if constexpr (head_score<decltype(policy.score)>) {
    return status::error(errc::unsupported, "tokens on several ranks: the score looks at the whole cache of a head");
  }
  if (attention_pool_of(policy.score) > 1) {
    return status::error(errc::unsupported,
                         "tokens on several ranks: the score averages each query's attention over %d neighbours",
                         attention_pool_of(policy.score));
  }
  if (rescores<decltype(policy.rescoring)>) {
    return status::error(errc::unsupported, "tokens on several ranks: the rescorer looks at a whole row of scores");
  }
  return {};
}

/// A sequence and what of it lies on this rank. Unit u holds the tokens [u unit, (u + 1) unit) of the sequence.
struct sequence_part {
  reference::token_range tokens{};
  budget_problem problem{};    ///< of the whole sequence
  index_t units_per_head = 0;  ///< the budget, protected units included
  index_t first = 0;           ///< unit that lies here
  index_t end = 0;             ///< one behind the last
  index_t evictable = 0;       ///< first unit of the sequence without a sink
  index_t recent = 0;          ///< first unit behind it with a recent token

  [[nodiscard]] index_t units() const noexcept { return end - first; }
  [[nodiscard]] bool keeps_all() const noexcept { return problem.length <= units_per_head; }
};

/// A policy on a part of the token axis.
template <class Policy, element T>
class token_problem {
 public:
  /// Refers to both. `axis` says which tokens of the axis `layer` has.
  token_problem(const Policy& policy, const layer_view<T>& layer, const axis_part& axis, index_t index, index_t layers)
      : policy_(policy), layer_(layer), axis_(axis), local_(layer), shape_(shape_of(layer, index, layers)) {
    shape_.tokens = axis.whole;
    local_.lengths = {};  // they count tokens of the whole axis
  }

  [[nodiscard]] const Policy& policy() const noexcept { return policy_; }
  /// Keys, values and the mask of the tokens that are here; the window's queries are the last rows of `query`.
  [[nodiscard]] const layer_view<T>& layer() const noexcept { return local_; }
  [[nodiscard]] const axis_part& axis() const noexcept { return axis_; }
  [[nodiscard]] const problem_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] const plan<Policy>& made() const noexcept { return plan_; }
  /// Tokens of the axis that are here.
  [[nodiscard]] index_t here() const noexcept { return layer_.key.extent(2); }
  [[nodiscard]] index_t unit() const noexcept { return policy_.granularity.tokens; }
  [[nodiscard]] index_t length_of(index_t b) const noexcept {
    return layer_.lengths.data == nullptr ? axis_.whole : index_t{layer_.lengths(b)};
  }
  /// The tokens of sequence b on a rank that holds [first, end) of the axis.
  [[nodiscard]] reference::token_range range_of(index_t b, index_t first, index_t end) const noexcept {
    const index_t length = length_of(b);
    const index_t begin = layer_.pad == padding::left ? axis_.whole - length : 0;
    const index_t from = std::clamp<index_t>(first - begin, 0, length);
    return {length, from, std::clamp<index_t>(end - begin, from, length), begin - first};
  }
  /// What lies here of sequence b, as if no mask were there.
  [[nodiscard]] sequence_part part_of(index_t b) const noexcept {
    sequence_part part;
    part.tokens = range_of(b, axis_.first, axis_.first + here());
    part.problem = restkv::detail::budget_of_span(policy_, shape_, plan_.rows, part.tokens.length);
    part.first = (part.tokens.first + unit() - 1) / unit();
    part.end = (part.tokens.end + unit() - 1) / unit();
    part.recent = std::max<index_t>(0, part.tokens.length - policy_.recent()) / unit();
    part.evictable = part.recent - part.problem.candidates;
    return part;
  }
  [[nodiscard]] bool may_evict(index_t b, const sequence_part& part, index_t u) const noexcept {
    if (u < part.evictable || u >= part.recent) return false;
    if (local_.keep_mask.data == nullptr) return true;
    for (index_t n = u * unit(); n < std::min(part.tokens.end, (u + 1) * unit()); ++n) {
      if (local_.keep_mask(b, part.tokens.begin + n) != 0) return false;
    }
    return true;
  }

  /// Everything that can be checked without the other ranks.
  [[nodiscard]] status check(index_t ranks) {
    using score_t = decltype(policy_.score);
    RESTKV_RETURN_IF_FAILED(check_token_policy(policy_));
    RESTKV_RETURN_IF_FAILED(make_plan(reference_backend(), policy_, shape_, plan_));
    if (axis_.first < 0 || axis_.first > axis_.whole - here()) {
      return status::error(errc::invalid_argument, "%lld tokens from token %lld on, of an axis of %lld", ll(here()),
                           ll(axis_.first), ll(axis_.whole));
    }
    if (layer_.head_lengths.data != nullptr) {
      return status::error(errc::unsupported, "tokens on several ranks: heads of different lengths (head_lengths)");
    }
    const index_t window = make_score_request(policy_, shape_).window;
    RESTKV_RETURN_IF_FAILED(
        check_layer(local_, shape_, 0, window > 0, needs_values<score_t>(), needs_metric(policy_.score)));
    if constexpr (needs_projection<score_t>()) RESTKV_RETURN_IF_FAILED(check_projection(local_, shape_));
    RESTKV_RETURN_IF_FAILED(check_lengths(window));
    const layer_budget<decltype(policy_.budget)> budget{policy_.budget, {0, plan_.rows}, ranks > 1, nullptr};
    const budget_problem longest = restkv::detail::budget_of_span(policy_, shape_, plan_.rows, axis_.whole);
    RESTKV_RETURN_IF_FAILED(budget.check(longest));
    if constexpr (pooled_budget_allocator<decltype(policy_.budget)>) {
      if (budget.competes(longest) && !policy_.budget.pools()) {
        return status::error(errc::unsupported,
                             "tokens on several ranks: the budget allocator looks at more than a pool's best scores");
      }
    }
    return {};
  }

  /// Everything that decides which steps a selection takes.
  [[nodiscard]] std::uint64_t digest_of() const noexcept {
    digest mix;
    mix.add(shape_.batch).add(shape_.kv_heads).add(shape_.query_heads).add(shape_.head_dim).add(shape_.layer);
    mix.add(policy_.window)
        .add(unit())
        .add(index_t{policy_.granularity.shared})
        .add(static_cast<index_t>(policy_.group));
    mix.add(policy_.protect.sink).add(policy_.protect.recent).add(index_t{uses_drift(policy_.spatial)});
    mix.add(plan_.capacity).add(static_cast<index_t>(layer_.pad));
    for (index_t b = 0; b < shape_.batch; ++b) mix.add(length_of(b));
    return mix.value();
  }

 private:
  [[nodiscard]] static long long ll(index_t n) noexcept { return static_cast<long long>(n); }

  [[nodiscard]] status check_lengths(index_t window) const noexcept {
    if (layer_.lengths.data != nullptr && layer_.lengths.extent(0) != shape_.batch) {
      return status::error(errc::shape_mismatch, "lengths has %lld entries, the layer has %lld sequences",
                           ll(layer_.lengths.extent(0)), ll(shape_.batch));
    }
    index_t longest = 0;
    for (index_t b = 0; b < shape_.batch; ++b) {
      longest = std::max(longest, length_of(b));
      if (length_of(b) < 0 || length_of(b) > axis_.whole) {
        return status::error(errc::invalid_argument, "sequence %lld has length %lld, the token axis holds %lld", ll(b),
                             ll(length_of(b)), ll(axis_.whole));
      }
      const auto tokens = range_of(b, axis_.first, axis_.first + here());
      for (const index_t edge : {tokens.first, tokens.end}) {
        if (edge == tokens.length || edge % unit() == 0) continue;
        return status::error(errc::invalid_argument,
                             "sequence %lld is cut before its token %lld: units of %lld tokens must lie on one rank",
                             ll(b), ll(edge), ll(unit()));
      }
    }
    if (layer_.query.extent(2) >= std::min(window, longest)) return {};
    return status::error(errc::shape_mismatch, "query has %lld rows, the observation window needs %lld",
                         ll(layer_.query.extent(2)), ll(std::min(window, longest)));
  }

  const Policy& policy_;
  const layer_view<T>& layer_;
  axis_part axis_;
  layer_view<T> local_;
  problem_shape shape_;
  plan<Policy> plan_{};
};

}  // namespace restkv::distributed::detail
