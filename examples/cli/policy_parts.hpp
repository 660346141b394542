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
#include <variant>
#include <vector>

namespace restkv::cli {

/// A score that looks at positions alone: `streaming_llm` or `random_score`.
struct position_score {
  std::variant<streaming_llm, random_score> choice{};

  static constexpr feature needs = feature::none;

  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(const token_features<Real>& token) const noexcept {
    return restkv::detail::visit_choice([&](const auto& score) -> Real { return score(token); }, choice);
  }
};

/// Whether an allocator is one that `budget_of` may choose.
template <class Budget>
inline constexpr bool is_configured_budget =
    std::is_same_v<Budget, uniform> || std::is_same_v<Budget, pyramid> || std::is_same_v<Budget, ada_kv>;

[[nodiscard]] any_temporal temporal_of(const configuration& c);
[[nodiscard]] any_spatial spatial_of(const configuration& c);
[[nodiscard]] any_budget budget_of(const configuration& c);
[[nodiscard]] rest_kv rest_kv_of(const configuration& c);
[[nodiscard]] position_score position_score_of(const configuration& c);
[[nodiscard]] caote_rescoring caote_rescoring_of(const configuration& c);

/// The policy that a configuration describes, with a score of its method.
template <any_score Score, rescorer Rescoring = no_rescoring>
[[nodiscard]] eviction_policy<Score, any_temporal, any_spatial, any_budget, Rescoring> policy_with(
    const configuration& c, const Score& score, index_t window, const Rescoring& rescoring = {}) {
  return {.score = score,
          .window = window,
          .temporal = temporal_of(c),
          .spatial = spatial_of(c),
          .group = c.group,
          .rescoring = rescoring,
          .budget = budget_of(c),
          .protect = {.sink = c.n_sink, .recent = c.protected_recent()},
          .granularity = {.tokens = c.unit, .reduce = c.reduce, .shared = c.shared}};
}

/// Where a layer's segments begin, by its own keys. Not copyable: the pool points into it.
class layer_segments {
 public:
  /// Throws input_error, beginning with `where`, for a share outside [0, 1] and a layer that was evicted from.
  layer_segments(const layer_view<float>& layer, double share, const std::string& where);
  layer_segments(const layer_segments&) = delete;
  layer_segments& operator=(const layer_segments&) = delete;

  [[nodiscard]] const segment_pool& pool() const noexcept { return pool_; }

 private:
  std::vector<std::uint8_t> begins_;  // [batch, tokens]
  segment_pool pool_;
};

/// A score of the cache, and what it points to.
struct cache_score {
  std::vector<double> mean;        ///< of each query head's queries, [batch, query_heads, head_dim]
  std::vector<double> covariance;  ///< [batch, query_heads, head_dim, head_dim]
  std::vector<float> filters;      ///< [kv_heads, head_dim]
};

/// Each throws input_error, beginning with `where`, for queries that have no statistics.
[[nodiscard]] any_head_score head_score_of(const configuration& c, const layer_view<float>& layer, cache_score& memory,
                                           const std::string& where);
[[nodiscard]] any_query_head_score query_head_score_of(const configuration& c, const layer_view<float>& layer,
                                                       cache_score& memory, const std::string& where);

}  // namespace restkv::cli
