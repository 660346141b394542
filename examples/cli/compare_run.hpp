// SPDX-License-Identifier: Apache-2.0
/// @file
/// The comparison on any backend; compare_eigen.cpp and compare_reference.cpp compile it.
#pragma once

#include "command.hpp"
#include "compare_policies.hpp"

#include <restkv/verify/future_error.hpp>

#include <fmt/format.h>

#include <algorithm>

namespace restkv::cli {

/// Lengths of the runs of dropped and kept tokens in turn, dropped first, of every head of a kept set.
[[nodiscard]] inline std::vector<std::vector<index_t>> runs_of(const const_kept_tokens& kept) {
  std::vector<std::vector<index_t>> heads;
  for (index_t h = 0; h < kept.heads(); ++h) {
    std::vector<index_t>& runs = heads.emplace_back();
    index_t next = 0;  // one behind the last kept token
    for (index_t i = 0; i < kept.lengths(0, h); ++i) {
      const index_t position = kept.positions(0, h, i);
      if (i == 0 || position != next) {
        runs.push_back(position - next);
        runs.push_back(0);
      }
      ++runs.back();
      next = position + 1;
    }
  }
  return heads;
}

/// One policy at one budget on one layer, over all its seeds. Adds to the cell, or says in it why not.
template <class Backend>
void compare_layer(Backend& backend, const compared_policy<Backend>& policy, const trace_file& trace, std::size_t index,
                   const comparison_request& request, index_t budget, comparison_cell& cell) {
  const trace_layer& layer = trace.layers()[index];
  // The same bytes: a kept set per KV head may hold what the sets of its query heads hold together.
  const index_t heads_per_set = policy.facts.per_query_head ? 1 : trace.shape().group();
  const int seeds = policy.facts.seeded ? request.seeds : 1;
  layer_figures figures;
  figures.layer = layer.index;
  for (int i = 0; i < seeds; ++i) {
    owned_selection chosen;
    const policy_settings settings{budget * heads_per_set, request.seed + static_cast<std::uint64_t>(i)};
    const auto layers = static_cast<index_t>(trace.layers().size());
    status outcome = policy.select(backend, settings, layer.prompt(), static_cast<index_t>(index), layers, chosen);
    output_errors errors;
    if (outcome.ok()) outcome = future_error(backend, chosen.kept(), layer.prompt(), layer.future(), errors);
    if (!outcome.ok()) {
      cell.problem = outcome.message();
      return;
    }
    figures.mean += errors.mean_relative() / seeds;
    figures.worst += errors.worst_relative() / seeds;
    if (i > 0) continue;
    figures.runs = runs_of(chosen.kept());
    constexpr index_t bytes_per_element = 2;  // a cache holds 16-bit elements, whatever the file does
    cell.bytes += chosen.kept().total() * 2 * trace.shape().head_dim * bytes_per_element;
  }
  cell.mean += figures.mean / static_cast<double>(trace.layers().size());
  cell.worst = std::max(cell.worst, figures.worst);
  cell.layers.push_back(std::move(figures));
}

template <class Backend>
[[nodiscard]] policy_comparison run_comparison(Backend& backend, const trace_file& trace,
                                               const comparison_request& request, const comparison_progress& progress) {
  std::vector<compared_policy<Backend>> table = policy_table<Backend>();
  const auto& wanted = request.policies;
  const auto is_wanted = [&](const compared_policy<Backend>& policy) {
    return wanted.empty() || std::find(wanted.begin(), wanted.end(), policy.facts.name) != wanted.end();
  };
  std::erase_if(table, [&](const auto& policy) { return !is_wanted(policy); });
  policy_comparison result;
  for (const auto& policy : table) {
    result.policies.push_back(policy.facts);
    auto& row = result.cells.emplace_back(request.budgets.size());
    for (std::size_t b = 0; b < row.size(); ++b) {
      for (std::size_t i = 0; i < trace.layers().size(); ++i) {
        if (row[b].problem.empty()) compare_layer(backend, policy, trace, i, request, request.budgets[b], row[b]);
        progress(fmt::format("{} at {}, layer {}", policy.facts.name, request.budgets[b], trace.layers()[i].index));
      }
    }
  }
  return result;
}

}  // namespace restkv::cli
