// SPDX-License-Identifier: Apache-2.0
/// @file
/// The policies of `restkv compare`: one line each. Add yours to `policy_table`.
#pragma once

#include "compare.hpp"

#include <restkv/presets.hpp>
#include <restkv/select.hpp>

#include <limits>
#include <utility>

namespace restkv::cli {

/// What a policy of the table is made from.
struct policy_settings {
  budget_size budget{};  ///< tokens per head of the kept set
  std::uint64_t seed = 0;
};

/// One line of the table.
template <class Backend>
struct compared_policy {
  policy_facts facts;
  /// Chooses the tokens of one layer: the `index`-th of `layers` compared ones.
  std::function<status(Backend&, const policy_settings&, const layer_view<float>&, index_t index, index_t layers,
                       owned_selection&)>
      select;
};

/// `make`: from policy_settings to a policy. Everything else that is said about the policy is read off what it makes.
template <class Backend, class Make>
[[nodiscard]] compared_policy<Backend> compare_as(std::string name, std::string description, Make make,
                                                  bool seeded = false) {
  const auto example = make(policy_settings{});
  compared_policy<Backend> policy;
  policy.facts = {.name = std::move(name),
                  .description = std::move(description),
                  .per_query_head = example.group == group_reduce::none,
                  .seeded = seeded,
                  .sinks = example.protect.sink,
                  .recent = example.recent()};
  policy.select = [make](Backend& backend, const policy_settings& settings, const layer_view<float>& layer,
                         index_t index, index_t layers, owned_selection& out) {
    return out.run(backend, make(settings), layer, index, layers);
  };
  return policy;
}

/// A policy with a group reduction of its own.
template <class Policy>
[[nodiscard]] constexpr Policy grouped_by(Policy policy, group_reduce group) {
  policy.group = group;
  return policy;
}

template <class Backend>
[[nodiscard]] std::vector<compared_policy<Backend>> policy_table() {
  using settings = policy_settings;
  const auto row = [](auto... parts) { return compare_as<Backend>(std::move(parts)...); };
  const auto paper_without_pooling = [](const settings& s) {
    return eviction_policy{.score = rest_kv{},
                           .temporal = ema{.alpha = 0.3f},
                           .spatial = no_pool{},
                           .group = group_reduce::none,
                           .budget = uniform{s.budget}};
  };
  // clang-format off
  return {
      row("full_cache", "Nothing is evicted.",
          [](const settings&) { return presets::streaming_llm(std::numeric_limits<position_t>::max()); }),
      row("standard", "The library's default: ReST-KV's score, joint over the group, pool 5, Ada-KV budgets.",
          [](const settings& s) { return presets::standard(s.budget); }),
      row("lowest_error", "The same without pooling.",
          [](const settings& s) { return presets::lowest_error(s.budget); }),
      row("rest_kv_released", "ReST-KV as its release runs it.",
          [](const settings& s) { return presets::rest_kv_released(s.budget); }),
      row("rest_kv_paper", "ReST-KV as the paper describes it.",
          [](const settings& s) { return presets::rest_kv_paper(s.budget); }),
      row("rest_kv_paper_no_pool", "ReST-KV as the paper describes it, without spatial smoothing.",
          paper_without_pooling),
      row("rest_kv_released_kv_heads", "The release's score, its mean over the query heads of a KV head.",
          [](const settings& s) { return grouped_by(presets::rest_kv_released(s.budget), group_reduce::mean); }),
      row("snap_kv_query_heads", "SnapKV as published: one kept set per query head.",
          [](const settings& s) { return grouped_by(presets::snap_kv(s.budget), group_reduce::none); }),
      row("snap_kv_kv_heads", "SnapKV, its mean over the query heads of a KV head.",
          [](const settings& s) { return presets::snap_kv(s.budget); }),
      row("streaming_llm_query_heads", "4 sinks and the newest tokens, for each query head.",
          [](const settings& s) { return grouped_by(presets::streaming_llm(s.budget), group_reduce::none); }),
      row("streaming_llm_kv_heads", "4 sinks and the newest tokens, for each KV head.",
          [](const settings& s) { return presets::streaming_llm(s.budget); }),
      row("random_query_heads", "The null policy: sinks, window and random tokens, for each query head.",
          [](const settings& s) { return grouped_by(presets::random(s.budget, s.seed), group_reduce::none); }, true),
      row("random_kv_heads", "The null policy: sinks, window and random tokens, for each KV head.",
          [](const settings& s) { return presets::random(s.budget, s.seed); }, true),
  };
  // clang-format on
}

}  // namespace restkv::cli
