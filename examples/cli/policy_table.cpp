// SPDX-License-Identifier: Apache-2.0
#include "policy_table.hpp"

#include "command.hpp"
#include "output.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace restkv::cli {

namespace {

/// A configuration with a change.
template <class Change>
configuration with(configuration c, const Change& change) {
  change(c);
  return c;
}

configuration grouped_by(configuration c, group_reduce group) {
  c.group = group;
  return c;
}

/// A score of the cache alone, with the null policy's protection. Most are published with less, and fail for it.
configuration of_cache(method_kind method) {
  configuration c = defaults_of(method);
  c.n_sink = 4;
  c.recent = 32;
  return c;
}

std::vector<named_policy> make_table() {
  std::vector<named_policy> table;
  const char* group = "";
  const auto add = [&](const char* name, const configuration& c, const char* description, bool seeded = false) {
    table.push_back({name, description, group, c, seeded});
  };
  using method = method_kind;

  group = "full";
  add("full_cache", preset("streaming_llm"), "Nothing is evicted.");
  table.back().keeps_all = true;

  group = "deletion";
  add("standard", preset("standard"),
      "The library's default: ReST-KV's score, joint over the group, pool 5, Ada-KV budgets.");
  add("lowest_error", preset("lowest_error"), "The same without pooling.");
  add("rest_kv_released", preset("rest_kv_released"), "ReST-KV as its release runs it.");
  add("rest_kv_paper", preset("rest_kv_paper"), "ReST-KV as the paper describes it.");
  add("rest_kv_paper_no_pool", with(preset("rest_kv_paper"), [](auto& c) { c.spatial = spatial_kind::none; }),
      "ReST-KV as the paper describes it, without spatial smoothing.");
  add("rest_kv_released_kv_heads", grouped_by(preset("rest_kv_released"), group_reduce::mean),
      "The release's score, its mean over the query heads of a KV head.");
  add("caote", preset("caote"), "CAOTE: deletion error of the head's own output.");
  add("fast_caote", preset("fast_caote"), "FastCAOTE: the mean value in place of the output.");
  add("drop_kv", preset("drop_kv"), "DropKV: squared deletion errors of 8 queries, max pool 11, Ada-KV budgets.");

  group = "coming";
  const auto refine = [&](const char* name, refinement how, const char* description) {
    add(name, preset("lowest_error"), description);
    table.back().policy.recent = 8;
    table.back().refined = how;
  };
  refine("anticipated", refinement::anticipated, "lowest_error for the queries to come, anticipated from the prompt.");
  refine("set_error", refinement::set_error, "The same, its set refined for the error that all evictions make together.");
  refine("anticipated_fitted", refinement::anticipated_fitted,
         "anticipated, the kept values fitted to the outputs of the full cache.");
  refine("set_error_fitted", refinement::set_error_fitted, "set_error, the kept values fitted likewise.");

  group = "attention";
  add("snap_kv_query_heads", grouped_by(preset("snap_kv"), group_reduce::none),
      "SnapKV as published: one kept set per query head.");
  add("snap_kv_kv_heads", preset("snap_kv"), "SnapKV, its mean over the query heads of a KV head.");
  add("ada_kv", preset("ada_kv"), "Ada-KV: SnapKV with max pool 7, the heads of a layer compete.");
  add("pyramid_kv", preset("pyramid_kv"), "PyramidKV: SnapKV, lower layers keep more.");
  add("chunk_kv", preset("chunk_kv"), "ChunkKV: the window's attention, chunks of 10 tokens kept or evicted whole.");
  add("h2o", preset("h2o"), "H2O: attention summed over every recorded query, 32 recent tokens.");
  add("h2o_mean", preset("h2o_mean"), "The same, the mean over the queries that see a token.");
  add("keyformer", preset("keyformer"), "Keyformer: H2O with Gumbel noise on the logits.", true);
  add("tova", preset("tova"), "TOVA: attention of the last query, one kept set a layer.");
  add("r_kv", preset("r_kv"), "R-KV: attention of 8 queries less the redundancy of keys.");

  group = "values";
  add("vatp", preset("vatp"), "VATP: attention times the l1 norm of the value.");
  add("critical_kv", preset("critical_kv"),
      "CriticalKV: half by SnapKV, half by attention times the value's norm behind W_O.");
  add("critical_ada_kv", preset("critical_ada_kv"), "CriticalKV within Ada-KV's budgets.");
  add("snap_kv_caote", with(preset("snap_kv"), [](auto& c) { c.rescoring = rescoring_kind::caote; }),
      "CAOTE over SnapKV's scores.");
  add("h2o_caote", preset("h2o_caote"), "CAOTE over H2O's scores.");
  add("defensive_kv", preset("defensive_kv"), "DefensiveKV: the worst case over queries and group, heads compete.");
  add("lava", preset("lava"), "LAVa in each layer: attention times the head's largest value, heads compete.");
  for (const ob_cache_part part : {ob_cache_part::value, ob_cache_part::key, ob_cache_part::joint}) {
    add(part == ob_cache_part::value ? "ob_cache_value"
        : part == ob_cache_part::key ? "ob_cache_key"
                                     : "ob_cache_joint",
        with(preset("ob_cache"), [part](auto& c) { c.part = part; }),
        part == ob_cache_part::value ? "OBCache, the value taken away, Ada-KV budgets."
        : part == ob_cache_part::key ? "OBCache, the key taken away, Ada-KV budgets."
                                     : "OBCache, both taken away, Ada-KV budgets.");
  }
  add("la_prox", preset("la_prox"),
      "LaProx: norm of a token's attention times its value's behind W_O, heads compete.");
  add("an_d_pro", preset("an_d_pro"), "AnDPro: what a value adds along the output, chunks of 4, heads compete.");

  group = "cache";
  add("knorm", of_cache(method::knorm), "Keys of the smallest norm.");
  add("key_diff", of_cache(method::keydiff), "KeyDiff: keys unlike the mean key.");
  add("lag_kv", of_cache(method::lagkv), "LagKV: spread in the range of the next chunk, chunks of 128.");
  add("cur_dkv", of_cache(method::curdkv), "CurDKV: norms of key and value among their neighbours.");
  add("leverage_score", of_cache(method::leverage), "Leverage of keys, by a random sketch (Compactor).");
  add("key_redundancy", of_cache(method::keyredundancy), "Keys that few others resemble (R-KV's second half).");
  add("value_range", of_cache(method::valuerange), "Values of the largest range (VaSE).");

  group = "queries";
  add("expected_attention", of_cache(method::expectedattention),
      "Expected attention of queries like the recorded ones at the positions to come, Ada-KV budgets.");
  add("q_filter", of_cache(method::qfilter), "Q-Filters: keys along the main direction of the recorded queries.");
  add("cap_kv", of_cache(method::capkv), "CapKV: what a value adds to the span of the attended ones.");

  group = "model";
  const auto over_layers = [](const char* name, allocation_kind allocation) {
    return with(preset(name), [allocation](auto& c) { c.allocation = allocation; });
  };
  add("cake", over_layers("snap_kv", allocation_kind::cake),
      "CAKE: mean and variance of attention; layers by how spread and how restless theirs is.");
  add("lava_layers", over_layers("lava", allocation_kind::lava), "LAVa: layers by the entropy of their scores.");
  add("layer_defensive_kv", over_layers("defensive_kv", allocation_kind::global),
      "Layer-DefensiveKV: one competition of all layers and heads.");
  add("la_prox_global", over_layers("la_prox", allocation_kind::global),
      "LaProx as published: one competition of all layers and heads.");
  add("lowest_error_global", over_layers("lowest_error", allocation_kind::global),
      "The library's score, one competition of all layers and heads.");

  group = "position";
  add("la_cache", with(defaults_of(method::lacache), [](auto& c) { c.span = 2; }),
      "LaCache's ladder over the compared layers, span 2.");
  add("streaming_llm_query_heads", grouped_by(preset("streaming_llm"), group_reduce::none),
      "4 sinks and the newest tokens, for each query head.");
  add("streaming_llm_kv_heads", preset("streaming_llm"), "4 sinks and the newest tokens, for each KV head.");
  add("random_query_heads", grouped_by(preset("random"), group_reduce::none),
      "The null policy: sinks, window and random tokens, for each query head.", true);
  add("random_kv_heads", preset("random"), "The null policy: sinks, window and random tokens, for each KV head.", true);
  return table;
}

}  // namespace

const std::vector<policy_group>& policy_groups() {
  static const std::vector<policy_group> groups{{"full", "Full cache"},
                                                {"deletion", "Deletion error"},
                                                {"coming", "Queries to come, sets and fits"},
                                                {"attention", "Attention"},
                                                {"values", "Attention and values"},
                                                {"cache", "Keys and values, no queries"},
                                                {"queries", "Queries to come"},
                                                {"model", "Budgets over all layers"},
                                                {"position", "Positions"}};
  return groups;
}

const char* title_of(const std::string& group) {
  const auto& groups = policy_groups();
  return std::find_if(groups.begin(), groups.end(), [&](const policy_group& g) { return g.name == group; })->title;
}

const std::vector<named_policy>& policy_table() {
  static const std::vector<named_policy> table = make_table();
  return table;
}

const named_policy* find_policy(const std::string& name) {
  const auto& table = policy_table();
  const auto at = std::find_if(table.begin(), table.end(), [&](const named_policy& p) { return p.name == name; });
  return at == table.end() ? nullptr : &*at;
}

configuration policy_of(const std::string& name) {
  if (const named_policy* known = find_policy(name); known != nullptr) {
    if (known->refined != refinement::none) {
      throw input_error(fmt::format("{} is more than a selection from the prompt: only compare has it", name));
    }
    return known->policy;
  }
  std::string all;
  for (const char* preset_name : {"snap_kv", "streaming_llm", "random"}) {
    if (name == preset_name) return preset(name);
    all += std::string(preset_name) + ", ";
  }
  for (const named_policy& policy : policy_table())
    all += policy.name + (&policy == &policy_table().back() ? "" : ", ");
  throw input_error(fmt::format("there is no preset {}; known are: {}", one_line(name), all));
}

}  // namespace restkv::cli
