// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv compare`.
#include "compare_output.hpp"
#include "output.hpp"
#include "report.hpp"

#include <restkv/interop/replace_file.hpp>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <memory>

namespace restkv::cli {
namespace {

struct compare_options {
  std::string trace;
  std::vector<index_t> layers;
  std::string backend = "eigen";
  std::string report;
  bool per_layer = false;
  bool list_policies = false;
  comparison_request request{.policies = {}, .budgets = {64, 128, 256, 512}, .seed = 0, .seeds = 3};
};

void list_policies(const invocation& run) {
  const std::vector<policy_facts> policies = known_policies();
  if (run.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const policy_facts& policy : policies) {
      list.push_back({{"name", policy.name},
                      {"description", policy.description},
                      {"heads", policy.per_query_head ? "query" : "kv"}});
    }
    print(nlohmann::json{{"policies", std::move(list)}}.dump(2) + '\n');
    return;
  }
  std::size_t width = 0;
  for (const policy_facts& policy : policies) width = std::max(width, policy.name.size());
  for (const policy_facts& policy : policies) {
    print(fmt::format("{:<{}}  {}\n", policy.name, width, policy.description));
  }
}

void check_policies(const std::vector<std::string>& wanted) {
  std::vector<std::string> known;
  for (const policy_facts& policy : known_policies()) known.push_back(policy.name);
  for (const std::string& name : wanted) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw input_error(fmt::format("there is no policy {}; known: {}", name, fmt::join(known, ", ")));
    }
  }
}

/// Runs it behind a progress line.
policy_comparison compare(const invocation& run, const std::string& backend, const trace_file& trace,
                          const comparison_request& request) {
  const std::size_t policies = request.policies.empty() ? known_policies().size() : request.policies.size();
  progress_line line(run, "comparing", policies * request.budgets.size() * trace.layers().size());
  const auto progress = [&](const std::string& done) { line.advance(done); };
  return backend == "eigen" ? compare_with_eigen(trace, request, progress)
                            : compare_with_reference(trace, request, progress);
}

/// Nothing could run at all: that is an error of the input, not a result.
void check_any_figures(const policy_comparison& result, const std::string& path) {
  const std::string* problem = nullptr;
  for (const auto& row : result.cells) {
    for (const comparison_cell& cell : row) {
      if (cell.problem.empty()) return;
      if (problem == nullptr) problem = &cell.problem;
    }
  }
  if (problem != nullptr) throw input_error(fmt::format("{}: no policy could run: {}", path, *problem));
}

void write_report(const std::string& path, const comparison_view& view) {
  std::error_code ignored;
  if (std::filesystem::equivalent(path, view.path, ignored)) {
    throw input_error(fmt::format("{}: the report would replace the trace", path));
  }
  require(replace_file(path, report_html(comparison_json(view, true))), {});  // its messages begin with the path
}

void run_compare(invocation& run, compare_options options) {
  if (options.list_policies) return list_policies(run);
  if (options.trace.empty()) throw input_error("compare needs a trace file (see --help)");
  comparison_request& request = options.request;
  check_policies(request.policies);
  std::sort(request.budgets.begin(), request.budgets.end());
  request.budgets.erase(std::unique(request.budgets.begin(), request.budgets.end()), request.budgets.end());

  const trace_file trace(options.trace, options.layers);
  const policy_comparison result = compare(run, options.backend, trace, request);
  check_any_figures(result, options.trace);

  const comparison_view view{options.trace, trace, request, result};
  if (!options.report.empty()) write_report(options.report, view);
  if (run.json) {
    nlohmann::json object = comparison_json(view, false);
    if (!options.report.empty()) object["report"] = options.report;
    print(object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + '\n');
  } else {
    print(comparison_text(view, options.per_layer));
  }
}

}  // namespace

void add_compare_command(CLI::App& app, invocation& run) {
  CLI::App& command = *app.add_subcommand(
      "compare", "Compares eviction policies on a recorded prompt: what each does to the queries that came after it");
  const auto options = std::make_shared<compare_options>();
  comparison_request& request = options->request;
  add_output_options(command, run);
  command.add_option("trace", options->trace,
                     "A safetensors file with layers.<i>.{q,k,v,wo,q_future,k_future,v_future}");
  constexpr index_t most_tokens = std::numeric_limits<position_t>::max();
  command.add_option("--budgets", request.budgets, "Tokens kept per query head, window included")
      ->delimiter(',')
      ->check(CLI::Range(index_t{1}, most_tokens))
      ->capture_default_str();
  command.add_option("--layers", options->layers, "Layers of the trace to compare; all when not given")->delimiter(',');
  command.add_option("--policies", request.policies, "Policies to compare; all when not given")->delimiter(',');
  command.add_flag("--list-policies", options->list_policies, "Names the policies and ends");
  command.add_option("--backend", options->backend, "eigen, or reference: plain loops in double, slow")
      ->check(CLI::IsMember({"eigen", "reference"}))
      ->capture_default_str();
  add_threads_option(command, request.threads);
  command.add_option("--seed", request.seed, "First seed of the random policies")->capture_default_str();
  command.add_option("--seeds", request.seeds, "Seeds over which the random policies are averaged")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command.add_flag("--per-layer", options->per_layer, "Show each layer by itself too");
  command.add_option("--report", options->report, "Write an HTML report to this file");
  command.callback([&run, options] { run_compare(run, *options); });
}

}  // namespace restkv::cli
