// SPDX-License-Identifier: Apache-2.0
#include "policy_table.hpp"

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

/// A method's own settings, one kept set a KV head.
configuration at_kv_heads(method_kind method) {
  configuration c = defaults_of(method);
  if (c.group == group_reduce::none) c.group = group_reduce::mean;
  return c;
}

/// A score of the cache alone. Most are published without protection, and fail without: they get the null policy's.
configuration of_cache(method_kind method) {
  configuration c = at_kv_heads(method);
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
  add("caote", at_kv_heads(method::caote), "CAOTE: deletion error of the head's own output.");
  add("fast_caote", at_kv_heads(method::fastcaote), "FastCAOTE: the mean value in place of the output.");
  add("drop_kv", at_kv_heads(method::dropkv), "DropKV: squared deletion errors of 8 queries, max pool 11.");

  group = "attention";
  add("snap_kv_query_heads", grouped_by(preset("snap_kv"), group_reduce::none),
      "SnapKV as published: one kept set per query head.");
  add("snap_kv_kv_heads", preset("snap_kv"), "SnapKV, its mean over the query heads of a KV head.");
  add("ada_kv", defaults_of(method::adakv), "Ada-KV: SnapKV with max pool 7, the heads of a layer compete.");
  add("pyramid_kv", with(defaults_of(method::adakv), [](auto& c) { c.allocation = allocation_kind::pyramid; }),
      "PyramidKV: SnapKV with max pool 7, lower layers keep more.");
  add("chunk_kv", with(preset("snap_kv"), [](auto& c) {
        c.spatial = spatial_kind::none;
        c.unit = 10;
      }),
      "ChunkKV: the window's attention, chunks of 10 tokens kept or evicted whole.");
  add("h2o", defaults_of(method::h2o), "H2O: attention summed over every recorded query, 32 recent tokens.");
  add("h2o_mean", with(defaults_of(method::h2o), [](auto& c) { c.temporal = temporal_kind::mean; }),
      "The same, the mean over the queries that see a token.");
  add("tova", defaults_of(method::tova), "TOVA: attention of the last query, one kept set a layer.");

  group = "values";
  add("vatp", at_kv_heads(method::vatp), "VATP: attention times the l1 norm of the value.");
  add("critical_kv", defaults_of(method::criticalkv),
      "CriticalKV: half by SnapKV, half by attention times the value's norm behind W_O.");
  add("snap_kv_caote", with(preset("snap_kv"), [](auto& c) { c.rescoring = rescoring_kind::caote; }),
      "CAOTE over SnapKV's scores.");
  for (const ob_cache_part part : {ob_cache_part::value, ob_cache_part::key, ob_cache_part::joint}) {
    add(part == ob_cache_part::value ? "ob_cache_value" : part == ob_cache_part::key ? "ob_cache_key" : "ob_cache_joint",
        with(defaults_of(method::obcache), [part](auto& c) { c.part = part; }),
        part == ob_cache_part::value ? "OBCache, the value taken away."
        : part == ob_cache_part::key ? "OBCache, the key taken away."
                                     : "OBCache, both taken away.");
  }
  add("la_prox", defaults_of(method::laprox), "LaProx: norm of a token's attention times its value's behind W_O.");
  add("an_d_pro", defaults_of(method::andpro), "AnDPro: what a value adds along the output, chunks of 4.");

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
      "Expected attention of queries like the recorded ones at the positions to come.");
  add("q_filter", of_cache(method::qfilter), "Q-Filters: keys along the main direction of the recorded queries.");
  add("cap_kv", of_cache(method::capkv), "CapKV: what a value adds to the span of the attended ones.");

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
                                                {"attention", "Attention"},
                                                {"values", "Attention and values"},
                                                {"cache", "Keys and values, no queries"},
                                                {"queries", "Queries to come"},
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

}  // namespace restkv::cli
