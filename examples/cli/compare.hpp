// SPDX-License-Identifier: Apache-2.0
/// @file
/// What `restkv compare` asks and what comes out: policies x budgets, with the error of each layer.
#pragma once

#include "trace_file.hpp"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace restkv::cli {

/// What can be said about a policy of the comparison without running it.
struct policy_facts {
  std::string name;
  std::string description;
  bool per_query_head = false;  ///< one kept set per query head, which stores each KV head for each of them
  bool seeded = false;          ///< drawn at random: repeated with several seeds
  index_t sinks = 0;            ///< tokens at the beginning that it always keeps
  index_t recent = 0;           ///< tokens at the end that it always keeps
};

/// One layer under one policy and budget. Relative changes of the layer's output, over the future queries.
struct layer_figures {
  index_t layer = 0;
  double mean = 0;
  double worst = 0;
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
  std::vector<layer_figures> layers;
};

/// What is compared.
struct comparison_request {
  std::vector<std::string> policies;  ///< names; empty = all
  std::vector<index_t> budgets;       ///< tokens per query head
  std::uint64_t seed = 0;
  int seeds = 1;  ///< repetitions of policies that draw at random: seed, seed + 1, ...
  int threads = 1;
};

struct policy_comparison {
  std::vector<policy_facts> policies;
  std::vector<std::vector<comparison_cell>> cells;  ///< [policies][budgets]
};

/// Every policy there is, in the order of the table.
[[nodiscard]] std::vector<policy_facts> known_policies();

/// Called behind each policy, budget and layer with what is done.
using comparison_progress = std::function<void(const std::string&)>;

/// Runs the comparison on eigen_backend. A policy that cannot run at a budget leaves a `problem` in its cell. Throws
/// input_error for a policy that does not exist.
[[nodiscard]] policy_comparison compare_with_eigen(const trace_file& trace, const comparison_request& request,
                                                   const comparison_progress& progress);
/// The same on reference_backend: in double, on one thread, slow.
[[nodiscard]] policy_comparison compare_with_reference(const trace_file& trace, const comparison_request& request,
                                                       const comparison_progress& progress);

}  // namespace restkv::cli
