// SPDX-License-Identifier: Apache-2.0
/// @file
/// What `restkv compare` asks and what comes out: policies x budgets, with the error of each layer.
#pragma once

#include "policy_table.hpp"
#include "selection.hpp"
#include "trace_file.hpp"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace restkv::cli {

/// One row of the comparison.
struct compared_policy : named_policy {
  index_t sinks = 0;   ///< tokens at the beginning that it always keeps
  index_t recent = 0;  ///< tokens at the end that it always keeps
};

/// One layer under one policy and budget. Relative changes of the layer's output, over the future queries.
struct layer_figures {
  index_t layer = 0;
  index_t bytes = 0;  ///< keys and values kept, in 16 bits
  double mean = 0;
  double worst = 0;
  double seconds = 0;  ///< that the selection took
  /// For each head of the kept set, the lengths of the runs of dropped and kept tokens in turn, dropped first. Of the
  /// first seed.
  std::vector<std::vector<index_t>> runs;
};

/// One policy at one budget.
struct comparison_cell {
  std::string problem;  ///< why there are no figures; empty where there are
  index_t bytes = 0;    ///< keys and values kept, over all layers, in 16 bits
  double mean = 0;      ///< mean over the layers
  double worst = 0;     ///< largest over the layers
  double seconds = 0;   ///< that a selection took, mean over the layers
  std::vector<layer_figures> layers;
};

/// What is compared.
struct comparison_request {
  std::vector<std::string> policies;         ///< names; empty = all
  std::vector<std::string> groups;           ///< headings; empty = all
  std::vector<allocation_kind> allocations;  ///< each policy under each of them; empty = as the policy has it
  std::vector<index_t> budgets;              ///< tokens per query head
  std::uint64_t seed = 0;
  int seeds = 1;  ///< repetitions of policies that draw at random: seed, seed + 1, ...
  int threads = 1;
  backend_kind backend = backend_kind::eigen;
};

struct policy_comparison {
  std::vector<compared_policy> policies;
  std::vector<std::vector<comparison_cell>> cells;  ///< [policies][budgets]
};

/// The rows that a request asks for. Throws input_error for names that do not exist.
[[nodiscard]] std::vector<compared_policy> compared_policies(const comparison_request& request);

/// Called behind each policy, budget and layer with what is done.
using comparison_progress = std::function<void(const std::string&)>;

/// Runs the comparison. A policy that cannot run at a budget leaves a `problem` in its cell.
[[nodiscard]] policy_comparison compare_policies(const trace_file& trace, const comparison_request& request,
                                                 const comparison_progress& progress);

/// A policy as it is run on a layer of a trace, the `index`-th of `layers`, at a budget of tokens for each query head: a
/// kept set per KV head may hold what the sets of its query heads hold together.
[[nodiscard]] configuration configuration_on(const trace_file& trace, const named_policy& policy, std::size_t index,
                                             index_t budget);

}  // namespace restkv::cli
