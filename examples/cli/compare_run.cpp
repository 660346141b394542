// SPDX-License-Identifier: Apache-2.0
#include "command.hpp"
#include "compare.hpp"
#include "compare_model.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/verify/future_error.hpp>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>

namespace restkv::cli {

namespace {

/// Lengths of the runs of dropped and kept tokens in turn, dropped first, of every head of a kept set.
std::vector<std::vector<index_t>> runs_of(const const_kept_tokens& kept) {
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

void check_known(const char* what, const std::vector<std::string>& wanted, const std::vector<std::string>& known) {
  for (const std::string& name : wanted) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw input_error(fmt::format("there is no {} {}; known: {}", what, name, fmt::join(known, ", ")));
    }
  }
}

/// The base of RoPE that a trace says it was recorded with; 0 where it says none.
double rope_theta_of(const trace_file& trace) {
  for (const auto& [key, text] : trace.metadata()) {
    if (key != "rope_theta") continue;
    const double theta = std::strtod(text.c_str(), nullptr);
    return std::isfinite(theta) && theta > 1 ? theta : 0.0;
  }
  return 0.0;
}

/// Runs selections of a comparison on the backend that was asked for, and measures what they do.
class measurement {
 public:
  measurement(const trace_file& trace, const comparison_request& request)
      : trace_(trace), request_(request), eigen_(request.threads) {}

  /// One policy at one budget on one layer, over all its seeds. Adds to the cell, or says in it why not.
  void add(const compared_policy& policy, std::size_t index, index_t budget, comparison_cell& cell) {
    const trace_layer& layer = trace_.layers()[index];
    const bool repeated = policy.seeded && !policy.policy.over_layers();
    const int seeds = repeated ? request_.seeds : 1;
    const auto layers = static_cast<double>(trace_.layers().size());
    configuration c = configuration_on(trace_, policy, index, budget);
    layer_figures figures;
    figures.layer = layer.index;
    for (int i = 0; i < seeds; ++i) {
      if (policy.seeded) c.seed = request_.seed + static_cast<std::uint64_t>(i);
      selection chosen;
      try {
        if (policy.refined != refinement::none) {
          refined_selection refined =
              select_anticipated(layer, policy.refined, c.budget, c.rope_theta, request_.threads);
          figures.mean += refined.mean / seeds;
          figures.worst += refined.worst / seeds;
          chosen = std::move(refined.chosen);
        } else {
          output_errors errors;
          chosen = c.over_layers() ? share_of_layer(c, policy, index, budget) : select(c, layer.prompt());
          require(measure(chosen, layer, errors), "");
          figures.mean += errors.mean_relative() / seeds;
          figures.worst += errors.worst_relative() / seeds;
        }
      } catch (const input_error& problem) {
        cell.problem = problem.what();
        return;
      }
      figures.seconds += chosen.seconds / seeds;
      if (i > 0) continue;
      figures.runs = runs_of(chosen.kept());
      constexpr index_t bytes_per_element = 2;  // a cache holds 16-bit elements, whatever the file does
      figures.bytes = chosen.kept().total() * 2 * trace_.shape().head_dim * bytes_per_element;
    }
    cell.bytes += figures.bytes;
    cell.mean += figures.mean / layers;
    cell.worst = std::max(cell.worst, figures.worst);
    cell.seconds += figures.seconds / layers;
    cell.layers.push_back(std::move(figures));
  }

 private:
  [[nodiscard]] selection select(const configuration& c, const layer_view<float>& layer) const {
    if (request_.backend == backend_kind::eigen) {
      return run_eigen(c, layer, request_.threads, "", inspection::kept_only);
    }
    score_memory memory;
    return run_reference(c, layer, memory, "");
  }

  /// Layers are chosen together when the first is asked for.
  [[nodiscard]] selection share_of_layer(const configuration& c, const named_policy& policy, std::size_t index,
                                         index_t budget) {
    if (index == 0) {
      shares_ = select_over_layers(trace_, c, request_.threads, [&](std::size_t i) {
        configuration scoring = configuration_on(trace_, policy, i, budget);
        scoring.allocation = allocation_kind::uniform;
        scoring.seed = c.seed;
        if (request_.backend == backend_kind::eigen) {
          return run_eigen(scoring, trace_.layers()[i].prompt(), request_.threads, "");
        }
        score_memory memory;
        return run_reference(scoring, trace_.layers()[i].prompt(), memory, "");
      });
    }
    return shares_[index];
  }

  [[nodiscard]] status measure(const selection& chosen, const trace_layer& layer, output_errors& errors) {
    if (request_.backend == backend_kind::eigen) {
      return future_error(eigen_, chosen.kept(), layer.prompt(), layer.future(), errors);
    }
    return future_error(reference_, chosen.kept(), layer.prompt(), layer.future(), errors);
  }

  const trace_file& trace_;
  const comparison_request& request_;
  eigen_backend eigen_;
  reference_backend reference_;
  std::vector<selection> shares_;  // of the layers, under a budget over all of them
};

}  // namespace

std::vector<compared_policy> compared_policies(const comparison_request& request) {
  std::vector<std::string> names, groups;
  for (const named_policy& policy : policy_table()) names.push_back(policy.name);
  for (const policy_group& group : policy_groups()) groups.emplace_back(group.name);
  check_known("policy", request.policies, names);
  check_known("group", request.groups, groups);
  const auto is_wanted = [](const std::vector<std::string>& wanted, const std::string& name) {
    return wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end();
  };
  std::vector<compared_policy> rows;
  const auto add = [&](const named_policy& policy) {
    const configuration& c = policy.policy;
    const bool keeps_window = c.observes() && !c.scores_window() && policy.refined == refinement::none;
    const index_t window = keeps_window ? c.window : 0;
    rows.push_back({policy, c.n_sink, std::max(window, c.protected_recent())});
  };
  for (const named_policy& policy : policy_table()) {
    if (!is_wanted(request.policies, policy.name) || !is_wanted(request.groups, policy.group)) continue;
    if (request.allocations.empty() || policy.keeps_all || policy.refined != refinement::none) add(policy);
    for (const allocation_kind allocation : request.allocations) {
      if (policy.keeps_all || policy.refined != refinement::none) continue;
      named_policy crossed = policy;
      crossed.name += std::string("+") + name_of(allocation);
      crossed.policy.allocation = allocation;
      add(crossed);
    }
  }
  return rows;
}

configuration configuration_on(const trace_file& trace, const named_policy& policy, std::size_t index, index_t budget) {
  configuration c = policy.policy;
  constexpr index_t everything = std::numeric_limits<position_t>::max();
  c.budget = policy.keeps_all ? everything : budget * (c.per_query_head() ? 1 : trace.shape().group());
  c.layer_index = static_cast<index_t>(index);
  c.layer_count = static_cast<index_t>(trace.layers().size());
  c.rope_theta = rope_theta_of(trace);
  return c;
}

policy_comparison compare_policies(const trace_file& trace, const comparison_request& request,
                                   const comparison_progress& progress) {
  measurement measure(trace, request);
  policy_comparison result;
  result.policies = compared_policies(request);
  for (const compared_policy& policy : result.policies) {
    auto& row = result.cells.emplace_back(request.budgets.size());
    for (std::size_t b = 0; b < row.size(); ++b) {
      for (std::size_t i = 0; i < trace.layers().size(); ++i) {
        if (row[b].problem.empty()) measure.add(policy, i, request.budgets[b], row[b]);
        progress(fmt::format("{} at {}, layer {}", policy.name, request.budgets[b], trace.layers()[i].index));
      }
    }
  }
  return result;
}

}  // namespace restkv::cli
