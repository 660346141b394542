// SPDX-License-Identifier: Apache-2.0
/// @file
/// Why a head kept a token, or did not.
#pragma once

#include "selection.hpp"

#include <nlohmann/json_fwd.hpp>

#include <optional>
#include <string>
#include <vector>

namespace restkv::cli {

/// A token under the queries of one query head that see it: means over the observation window.
struct observed_token {
  index_t query_head = 0;
  double attention = 0;
  double most_attention = 0;  ///< of a single query
  double odds = 0;            ///< a / (1 - a)
  double distance = 0;        ///< ||o - v||, or ||W (o - v)|| where the policy measures through W_O
};

/// A unit of eviction (a token, a chunk, a page) by its first token, and what it is ranked by.
struct ranked_unit {
  index_t first = 0;
  double score = 0;
};

/// One token of one row of the kept set.
struct explanation {
  index_t head = 0;
  index_t token = 0;
  bool kept = false;
  std::string protected_as;              ///< "sink", "recent" or "rest of a unit"; empty where the score decides
  double key_norm = 0;
  double value_norm = 0;
  std::vector<observed_token> observed;  ///< one a query head of the row; empty where no query is observed
  std::optional<double> score;           ///< before spatial smoothing; nothing where the policy gives the token none
  std::optional<double> smoothed;        ///< after it, and after rescoring
  double unit_score = 0;                 ///< what the token's unit is ranked by
  index_t rank = 0;                      ///< among the row's candidates, 1 the best; 0 for a protected token
  index_t candidates = 0;                ///< units that may be evicted
  index_t chosen = 0;                    ///< of them, units that are kept
  std::optional<ranked_unit> last_kept;  ///< the cut: the worst that is kept
  std::optional<ranked_unit> first_dropped;
  index_t head_length = 0;  ///< tokens the row keeps
  double mean_length = 0;   ///< the mean of the layer's rows
};

/// Throws input_error for a head or token that does not exist.
[[nodiscard]] explanation explain(const configuration& c, const layer_view<float>& layer, const selection& chosen,
                                  index_t head, index_t token, const std::string& where);

}  // namespace restkv::cli
