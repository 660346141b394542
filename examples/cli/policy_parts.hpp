// SPDX-License-Identifier: Apache-2.0
/// @file
/// From a configuration to the parts of a policy.
#pragma once

#include "configuration.hpp"

#include <restkv/core/layer.hpp>
#include <restkv/rescoring/caote.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/runtime_scores.hpp>

#include <string>
#include <vector>

namespace restkv::cli {

[[nodiscard]] any_temporal temporal_of(const configuration& c);
[[nodiscard]] any_spatial spatial_of(const configuration& c);
[[nodiscard]] any_budget budget_of(const configuration& c);
[[nodiscard]] rest_kv rest_kv_of(const configuration& c);
[[nodiscard]] caote_rescoring caote_rescoring_of(const configuration& c);

/// A score of the cache, and what it points to.
struct cache_score {
  std::vector<double> mean;        ///< of each query head's queries, [query_heads, head_dim]
  std::vector<double> covariance;  ///< [query_heads, head_dim, head_dim]
  std::vector<float> filters;      ///< [kv_heads, head_dim]
};

/// Each throws input_error, beginning with `where`, for queries that have no statistics.
[[nodiscard]] any_head_score head_score_of(const configuration& c, const layer_view<float>& layer, cache_score& memory,
                                           const std::string& where);
[[nodiscard]] any_query_head_score query_head_score_of(const configuration& c, const layer_view<float>& layer,
                                                       cache_score& memory, const std::string& where);

}  // namespace restkv::cli
