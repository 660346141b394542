// SPDX-License-Identifier: Apache-2.0
/// @file
/// Tensor parallelism: a layer whose heads lie on several ranks.
#pragma once

#include <restkv/distributed/heads_backend.hpp>
#include <restkv/distributed/layer_budget.hpp>
#include <restkv/select.hpp>

namespace restkv::distributed {

/// What `select_heads` needs to know, computed once on every rank. A plain value.
template <class Policy>
struct heads_plan {
  /// The policy on this rank: its budget is the whole layer's.
  using local_policy =
      decltype(with_parts(Policy{}, Policy{}.score, Policy{}.temporal, layer_budget<decltype(Policy::budget)>{}));

  plan<local_policy> local{};       ///< of this rank's heads
  axis_part heads{};                ///< this rank's KV heads; it has local.shape.kv_heads of them
  index_t ranks = 1;                ///< that hold the layer
  bool speaks = false;              ///< false where no rank needs to know of another
  std::size_t workspace_bytes = 0;  ///< what `select_heads` needs, its result included

  /// Tokens that one head can keep at most.
  [[nodiscard]] index_t capacity() const noexcept { return local.capacity; }
};

namespace detail {

/// What the ranks exchange during one selection, carved by the same code when planning and when running.
struct heads_memory {
  std::span<rank_facts> facts;  // [ranks]
  budget_channel channel;

  heads_memory(index_t ranks, index_t rows, workspace& space) noexcept
      : facts(carve<rank_facts>(space, ranks)),
        channel{.counts = carve<index_t>(space, rows),
                .scratch = carve<double>(space, rows),
                .histogram = carve<std::uint64_t>(space, std::max(digits, 2 * rows))} {}

 private:
  template <class T>
  static std::span<T> carve(workspace& space, index_t count) noexcept {
    return {space.take<T>(count), static_cast<std::size_t>(count)};
  }
};

/// Everything that decides which steps a selection takes: the same on every rank, or some would wait for others.
template <class Policy, element T>
[[nodiscard]] std::uint64_t heads_digest(const plan<Policy>& plan, const layer_view<T>& layer) noexcept {
  const problem_shape& shape = plan.shape;
  digest mix;
  mix.add(shape.batch)
      .add(shape.head_dim)
      .add(shape.group())
      .add(layer.key.extent(2))
      .add(shape.layer)
      .add(shape.layers);
  mix.add(plan.policy.window).add(plan.policy.granularity.tokens).add(index_t{plan.policy.granularity.shared});
  mix.add(static_cast<index_t>(plan.policy.group)).add(plan.policy.protect.sink).add(plan.policy.protect.recent);
  mix.add(index_t{uses_drift(plan.policy.spatial)});
  const restkv::detail::selection_problem problem(plan, layer);
  for (index_t b = 0; b < shape.batch; ++b) {
    const auto row = problem.row(b * plan.rows);
    const index_t candidates = row.count_candidates();
    mix.add(row.span.length).add(candidates).add(problem.sequence(b, &candidates).units_per_head);
  }
  return mix.value();
}

}  // namespace detail

/// Validates a policy for a rank's heads. `shape` is what this rank holds: its KV heads, their query heads; `heads`
/// says where they lie in the layer, in which ranks follow each other. `ranks` is the communicator's size. What belongs
/// to heads (the metric of W_O, filters) is this rank's slice; tables of budgets are the whole model's. Says nothing to
/// others.
///
/// Errors: those of `make_plan`; heads that are not in the layer; an allocator that compares heads by keys and cannot
/// count them apart.
template <tensor_backend Backend, class Policy>
[[nodiscard]] status make_heads_plan(const Backend& backend, const Policy& policy, const problem_shape& shape,
                                     const axis_part& heads, index_t ranks, heads_plan<Policy>& out) noexcept {
  static_assert(!restkv::detail::selects_in_bulk<Backend, Policy>,
                "heads on several ranks need a backend whose steps the host sees: not a bulk_backend");
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (heads.first < 0 || shape.kv_heads < 1 || heads.first > heads.whole - shape.kv_heads || ranks < 1) {
    return status::error(errc::invalid_argument,
                         "%lld KV heads from head %lld on, of a layer of %lld, on one of %lld ranks",
                         ll(shape.kv_heads), ll(heads.first), ll(heads.whole), ll(ranks));
  }
  RESTKV_RETURN_IF_FAILED(check_groups(shape.query_heads, shape.kv_heads));
  heads_plan<Policy> made;
  made.heads = heads;
  made.ranks = ranks;
  const index_t rows_of_head = policy.group == group_reduce::none ? shape.group() : 1;
  const bool apart = heads.whole > shape.kv_heads && !policy.granularity.shared;
  const axis_part rows =
      policy.granularity.shared ? axis_part{0, 1} : axis_part{heads.first * rows_of_head, heads.whole * rows_of_head};
  problem_shape local = shape;
  local.first_kv_head = heads.first;
  RESTKV_RETURN_IF_FAILED(
      make_plan(backend,
                with_parts(policy, policy.score, policy.temporal,
                           layer_budget<decltype(policy.budget)>{policy.budget, rows, apart, nullptr}),
                local, made.local));
  const budget_problem longest =
      restkv::detail::budget_of_span(made.local.policy, local, made.local.rows, local.tokens);
  RESTKV_RETURN_IF_FAILED(made.local.policy.budget.check(longest));
  made.speaks =
      heads.whole > shape.kv_heads && (policy.granularity.shared || weights_are_shares<decltype(policy.rescoring)>() ||
                                       made.local.policy.budget.competes(longest));
  workspace counting;
  const detail::heads_memory memory(ranks, rows.whole, counting);
  made.workspace_bytes = made.local.workspace_bytes + counting.required_bytes();
  out = made;
  return {};
}

namespace detail {

/// What can be wrong with the arguments of a selection over heads besides what `select` checks.
template <class Policy, element T, communicator Ranks>
[[nodiscard]] status check_heads(const heads_plan<Policy>& plan, const layer_view<T>& layer, const Ranks& ranks,
                                 const workspace& space) noexcept {
  RESTKV_RETURN_IF_FAILED(space.check());
  if (layer.head_lengths.data != nullptr) {
    return status::error(errc::unsupported, "heads of different lengths (head_lengths) on several ranks");
  }
  if (ranks.size() == plan.ranks) return {};
  return status::error(errc::invalid_argument, "the plan is for %lld ranks, the communicator has %lld",
                       static_cast<long long>(plan.ranks), static_cast<long long>(ranks.size()));
}

/// Lets the ranks agree that all can go on, on the same problem, and calls use(run, weigh, channel): see
/// `with_selection_run`, over a backend that knows of the other ranks. Fails on all ranks where one fails before `use`.
template <tensor_backend Backend, class Policy, element T, communicator Ranks, class Use>
[[nodiscard]] status with_heads_run(Backend& backend, const heads_plan<Policy>& plan, const layer_view<T>& layer,
                                    Ranks& ranks, workspace& space, const Use& use) {
  auto local = plan.local;
  heads_memory memory(plan.ranks, local.policy.budget.rows.whole, space);
  budget_channel& channel = memory.channel;
  local.policy.budget.channel = &channel;
  channel.ranks = &ranks;
  channel.add_up = [](void* of, std::span<std::uint64_t> data) {
    return static_cast<Ranks*>(of)->all_reduce(data, reduction::sum);
  };
  bool agreed = false;
  status outcome = check_heads(plan, layer, ranks, space);
  if (outcome.ok()) {
    heads_backend shared(backend, ranks, plan.heads, local.shape.kv_heads);
    const auto begin = [&](auto& run, const auto& weigh) -> status {
      agreed = true;
      RESTKV_RETURN_IF_FAILED(all_ok(ranks, status()));
      RESTKV_RETURN_IF_FAILED(agree_on_problem(ranks, heads_digest(local, layer), "KV heads", plan.heads,
                                               local.shape.kv_heads, memory.facts));
      return use(run, weigh, channel);
    };
    outcome = restkv::detail::with_selection_run(shared, local, layer, space, nullptr, begin);
  }
  // Where it failed before anything was said, the others wait to hear of it.
  if (!agreed) outcome = all_ok(ranks, outcome);
  return outcome.ok() ? channel.failure : outcome;
}

}  // namespace detail

/// Chooses the tokens that this rank's heads keep: those that `select` chooses for them where one process has the whole
/// layer, bit for bit. Called on every rank, with the layers of the same problem. See `select`.
///
/// Uniform budgets, pyramids and tables say nothing to other ranks (`plan.speaks` is false). Where heads compete
/// (AdaKV) or share a kept set, the ranks first agree on the problem (8 and 32 bytes) and after each scoring step (8
/// bytes); what a budget says, see `layer_budget`; a shared set takes size() broadcasts of a row of scores a sequence.
/// See docs/distributed.md for the sums.
///
/// Errors: those of `select`, of the communicator, ranks with different problems, and a rank that cannot go on: all
/// ranks fail then, this one with errc::communication_failure. Heads of different lengths are not supported.
template <tensor_backend Backend, class Policy, element T, communicator Ranks>
[[nodiscard]] status select_heads(Backend& backend, const heads_plan<Policy>& plan, const layer_view<T>& layer,
                                  Ranks& ranks, workspace space, kept_tokens& kept) {
  if (!plan.speaks) {
    auto local = plan.local;
    detail::heads_memory memory(plan.ranks, local.policy.budget.rows.whole, space);
    local.policy.budget.channel = &memory.channel;
    RESTKV_RETURN_IF_FAILED(detail::check_heads(plan, layer, ranks, space));
    return restkv::select(backend, local, layer, space, kept);
  }
  kept_tokens chosen;
  RESTKV_RETURN_IF_FAILED(detail::with_heads_run(
      backend, plan, layer, ranks, space,
      [&](auto& run, const auto& weigh, const budget_channel&) { return run.run(weigh, chosen); }));
  kept = chosen;
  return {};
}

}  // namespace restkv::distributed
