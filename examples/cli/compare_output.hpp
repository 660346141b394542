// SPDX-License-Identifier: Apache-2.0
/// @file
/// A finished comparison as a table and as JSON.
#pragma once

#include "compare.hpp"

#include <nlohmann/json_fwd.hpp>

namespace restkv::cli {

/// A comparison and what it was made from.
struct comparison_view {
  const std::string& path;
  const trace_file& trace;
  const comparison_request& request;
  const policy_comparison& result;
};

/// The tables for people: the error of each policy at each budget, its worst query, bytes and time; with `per_layer` each
/// layer by itself too.
[[nodiscard]] std::string comparison_text(const comparison_view& view, bool per_layer);

/// One line for each policy, budget and layer, and one with the layer `all`; separated by commas.
[[nodiscard]] std::string comparison_csv(const comparison_view& view);

/// Everything but the kept sets, and those too with `with_kept`. Texts of the trace are as they stand there.
[[nodiscard]] nlohmann::json comparison_json(const comparison_view& view, bool with_kept);

}  // namespace restkv::cli
