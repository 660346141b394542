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
#include <charconv>
#include <filesystem>
#include <limits>
#include <memory>

namespace restkv::cli {
namespace {

struct compare_options {
  std::string trace;
  std::vector<index_t> layers;
  std::vector<std::string> budgets{"64", "128", "256", "512"};
  std::string backend = name_of(backend_kind::eigen);
  std::string report;
  std::string csv;
  bool per_layer = false;
  bool kept = false;
  bool list_policies = false;
  comparison_request request{.policies = {}, .groups = {}, .allocations = {}, .budgets = {}, .seed = 0, .seeds = 3};
};

void list_policies(const invocation& run, const comparison_request& request) {
  const std::vector<compared_policy> policies = compared_policies(request);
  if (run.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const compared_policy& policy : policies) {
      list.push_back({{"name", policy.name},
                      {"description", policy.description},
                      {"group", policy.group},
                      {"heads", policy.policy.per_query_head() ? "query" : "kv"}});
    }
    print(nlohmann::json{{"policies", std::move(list)}}.dump(2) + '\n');
    return;
  }
  std::size_t width = 0;
  for (const compared_policy& policy : policies) width = std::max(width, policy.name.size());
  const std::string* group = nullptr;
  for (const compared_policy& policy : policies) {
    if (group == nullptr || *group != policy.group)
      print(fmt::format("{} ({})\n", title_of(policy.group), policy.group));
    group = &policy.group;
    print(fmt::format("  {:<{}}  {}\n", policy.name, width, policy.description));
  }
}

/// Numbers are budgets, names are allocations.
void read_budgets(const std::vector<std::string>& texts, comparison_request& request) {
  constexpr index_t most_tokens = std::numeric_limits<position_t>::max();
  const auto& allocations = names<allocation_kind>::values;
  for (const std::string& text : texts) {
    const auto name = std::find(allocations.begin(), allocations.end(), text);
    if (name != allocations.end()) {
      request.allocations.push_back(static_cast<allocation_kind>(name - allocations.begin()));
      continue;
    }
    index_t tokens = 0;
    const auto [end, trouble] = std::from_chars(text.data(), text.data() + text.size(), tokens);
    if (trouble != std::errc{} || end != text.data() + text.size() || tokens < 1 || tokens > most_tokens) {
      throw input_error(fmt::format("--budgets: {} is neither a number of tokens within [1, {}] nor one of {}",
                                    one_line(text), most_tokens, fmt::join(allocations, ", ")));
    }
    request.budgets.push_back(tokens);
  }
  if (request.budgets.empty()) request.budgets = {64, 128, 256, 512};
  const auto sort = [](auto& values) {
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
  };
  sort(request.budgets);
  sort(request.allocations);
}

/// Runs it behind a progress line.
policy_comparison compare(const invocation& run, const trace_file& trace, const comparison_request& request) {
  const std::size_t policies = compared_policies(request).size();
  progress_line line(run, "comparing", policies * request.budgets.size() * trace.layers().size());
  return compare_policies(trace, request, [&](const std::string& done) { line.advance(done); });
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

/// Writes a file that is no trace. `what` names it in messages.
void write_beside(const std::string& path, const comparison_view& view, const char* what, const std::string& content) {
  std::error_code ignored;
  if (std::filesystem::equivalent(path, view.path, ignored)) {
    throw input_error(fmt::format("{}: the {} would replace the trace", path, what));
  }
  require(replace_file(path, content), {});  // its messages begin with the path
}

void run_compare(invocation& run, compare_options options) {
  comparison_request& request = options.request;
  read_budgets(options.budgets, request);
  request.backend = options.backend == name_of(backend_kind::eigen) ? backend_kind::eigen : backend_kind::reference;
  if (compared_policies(request).empty()) throw input_error("no policy of these names is in these groups");
  if (options.list_policies) return list_policies(run, request);
  if (options.trace.empty()) throw input_error("compare needs a trace file (see --help)");

  const trace_file trace(options.trace, options.layers);
  const policy_comparison result = compare(run, trace, request);
  check_any_figures(result, options.trace);

  const comparison_view view{options.trace, trace, request, result};
  if (!options.report.empty()) write_beside(options.report, view, "report", report_html(comparison_json(view, true)));
  if (!options.csv.empty()) write_beside(options.csv, view, "table", comparison_csv(view));
  if (run.json) {
    nlohmann::json object = comparison_json(view, options.kept);
    if (!options.report.empty()) object["report"] = options.report;
    if (!options.csv.empty()) object["table"] = options.csv;
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
  command
      .add_option("--budgets", options->budgets,
                  "Tokens kept per query head, window included; and uniform, pyramid, adakv, global, lava, cake: each "
                  "policy under each")
      ->delimiter(',')
      ->capture_default_str();
  command.add_option("--layers", options->layers, "Layers of the trace to compare; all when not given")->delimiter(',');
  command.add_option("--policies", request.policies, "Policies to compare; all when not given")->delimiter(',');
  command.add_option("--group", request.groups, "Only policies under these headings (see --list-policies)")
      ->delimiter(',');
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
  command.add_option("--out", options->csv,
                     "Write a table (CSV) to this file: a line for each policy, budget and layer");
  command.add_flag("--kept", options->kept, "With --json: which tokens were kept, too");
  command.add_option("--report", options->report, "Write an HTML report to this file");
  command.callback([&run, options] { run_compare(run, *options); });
}

}  // namespace restkv::cli
