// SPDX-License-Identifier: Apache-2.0
#include "command.hpp"
#include "layer_file.hpp"
#include "output.hpp"
#include "verify.hpp"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <map>
#include <memory>
#include <regex>

namespace restkv::cli {

namespace {

/// One configuration whose results are known: layers.<index>.<order>.scale<scale>, and its budgets.
struct known_run {
  index_t layer = 0;
  query_order order = query_order::before;
  float scale = 0;
  std::string name;
  std::vector<index_t> budgets;
};

/// All runs, those of a layer together.
std::vector<known_run> runs_of(const safetensors_file& file, const std::string& path) {
  static const std::regex form(R"((layers\.(\d{1,6})\.(before|after)\.scale(\d{1,9})))"
                               R"((?:\.budget(\d{1,9}))?\.(score|indices|kernel|shift|drift))");
  std::map<std::pair<index_t, std::string>, known_run> runs;
  for (const safetensors_entry& entry : file.entries()) {
    std::smatch parts;
    if (!std::regex_match(entry.name, parts, form)) {
      throw input_error(fmt::format("{}: tensor {} has no name of the form layers.N.ORDER.scaleS[.budgetB].WHAT", path,
                                    one_line(entry.name)));
    }
    known_run run{.layer = std::stoll(parts[2]),
                  .order = parts[3] == "before" ? query_order::before : query_order::after,
                  .scale = std::stof(parts[4]),
                  .name = parts[1],
                  .budgets = {}};
    known_run& noted = runs.try_emplace({run.layer, run.name}, run).first->second;
    if (parts[5].matched) {
      const index_t budget = std::stoll(parts[5]);
      auto& budgets = noted.budgets;
      if (std::find(budgets.begin(), budgets.end(), budget) == budgets.end()) budgets.push_back(budget);
    }
  }
  std::vector<known_run> all;
  for (auto& [unused, run] : runs) all.push_back(std::move(run));
  return all;
}

/// What the released implementation was run with. It kept one set per query head.
configuration shared_configuration(const safetensors_file& file, const std::string& path) {
  const std::string where = path + ": metadata config";
  const std::string* const text = file.find_metadata("config");
  if (text == nullptr) throw input_error(where + ": is missing");
  nlohmann::json keys = parse_flat_object(*text, where);
  if (keys.value("granularity", nlohmann::json("query head")) != "query head") {
    throw input_error(where + ": granularity must be \"query head\"");
  }
  keys.erase("granularity");
  configuration c = defaults_of(method_kind::restkv);
  apply(c, keys, where);
  return c;
}

void compare_run(const safetensors_file& file, const std::string& path, const std::string& name, const configuration& c,
                 const selection& chosen, const nlohmann::json& figures, comparison& compare) {
  const auto has = [&](const std::string& tensor) { return file.find(tensor) != nullptr; };
  if (has(name + ".drift")) {
    compare.equal_floats(read_known<float>(file, path, name + ".drift", chosen.heads, 1), chosen.drift);
  }
  const adaptive_windows windows(c, chosen.drift);
  const auto numbers = [&](const char* what, const std::vector<std::int32_t>& ours) {
    const std::string tensor = name + what;
    if (has(tensor)) compare.equal_numbers(read_known<std::int32_t>(file, path, tensor, chosen.heads, 1), ours);
  };
  numbers(".kernel", windows.kernel);
  numbers(".shift", windows.shift);
  if (has(name + ".indices")) {
    std::optional<double> margin;
    if (const auto at = figures.find(name + ".margin"); at != figures.end() && at->is_number())
      margin = at->get<double>();
    compare.kept_sets(read_known<std::int32_t>(file, path, name + ".indices", chosen.heads, 2), chosen, chosen.smoothed,
                      margin);
  }
}

}  // namespace

bool holds_trace_results(const safetensors_file& file) {
  return file.find_metadata("config") != nullptr && file.find_metadata("case") == nullptr;
}

void verify_trace(const invocation& run, const safetensors_file& file, const std::string& path,
                  const verify_options& options, file_outcome& outcome) {
  std::string trace_path = options.trace;
  if (trace_path.empty()) {
    const std::string ending = ".expected.safetensors";
    if (!path.ends_with(ending)) {
      throw input_error(path + ": does not end in " + ending + ": say where its trace is (--trace)");
    }
    trace_path = path.substr(0, path.size() - ending.size()) + ".safetensors";
  }
  configuration c = shared_configuration(file, path);
  outcome.method = name_of(c.method);
  const std::string* const figures_text = file.find_metadata("figures");
  const nlohmann::json figures =
      parse_flat_object(figures_text == nullptr ? "{}" : *figures_text, path + ": metadata figures");
  const std::vector<known_run> runs = runs_of(file, path);
  safetensors_file trace;
  require(safetensors_file::open(trace_path, trace), "");

  std::size_t steps = 0;
  for (const known_run& known : runs) steps += known.budgets.size();
  progress_line progress(run, "verify", steps);
  std::unique_ptr<layer_file> tensors;
  score_memory memory;
  index_t current = -1;
  for (const known_run& known : runs) {
    if (known.layer != current) {
      current = known.layer;
      tensors =
          std::make_unique<layer_file>(trace, trace_path, fmt::format("layers.{}.", current), options.allow_non_finite);
      memory.clear();
    }
    c.order = known.order;
    c.scale = known.scale;
    const layer_view<float> layer = tensors->view(c);
    for (const index_t budget : known.budgets) {
      c.budget = budget;
      const std::string name = fmt::format("{}.budget{}", known.name, budget);
      std::optional<selection> rounding;
      const auto rounding_of_scores = [&]() -> const std::vector<double>& {
        if (!rounding) rounding = rounding_of_release(c, layer, trace_path);
        return rounding->score;
      };
      for (const verified_backend* const backend : options.backends) {
        if (backend->select == nullptr) continue;
        comparison compare(outcome, backend->name, options.tolerance);
        const selection chosen = backend->select({c, layer, options.threads, memory, trace_path});
        if (backend->prunes) {
          compare.without_scores(
              chosen, backend->select({c, layer, options.threads, memory, trace_path, inspection::kept_only}));
        }
        compare_run(file, path, name, c, chosen, figures, compare);
        if (budget != known.budgets.front() || file.find(known.name + ".score") == nullptr) continue;
        compare.floats(read_known<float>(file, path, known.name + ".score", chosen.heads, 2), chosen.score, chosen.past,
                       rounding_of_scores);
      }
      progress.advance(name);
    }
  }
}

}  // namespace restkv::cli
