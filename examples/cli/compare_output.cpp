// SPDX-License-Identifier: Apache-2.0
#include "compare_output.hpp"

#include "output.hpp"

#include <restkv/core/config.hpp>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <optional>

namespace restkv::cli {
namespace {

/// The row that the others are measured by.
constexpr const char* baseline = "rest_kv_released";

/// Keys and values of all compared layers in 16 bits.
index_t full_bytes(const trace_file& trace) {
  const problem_shape& shape = trace.shape();
  return static_cast<index_t>(trace.layers().size()) * shape.kv_heads * shape.tokens * shape.head_dim * 2 * 2;
}

/// The reference is no measure of time.
bool times_are_known(const comparison_view& view) { return view.request.backend == backend_kind::eigen; }

/// The mean error of the baseline at a budget; nothing where it is not compared or could not run.
std::optional<double> baseline_error(const policy_comparison& result, std::size_t budget) {
  for (std::size_t p = 0; p < result.policies.size(); ++p) {
    const comparison_cell& cell = result.cells[p][budget];
    if (result.policies[p].name == baseline && cell.problem.empty()) return cell.mean;
  }
  return {};
}

/// The cell's mean error as a multiple of the baseline's; nothing where that is missing or 0.
std::optional<double> ratio(const policy_comparison& result, const comparison_cell& cell, std::size_t budget) {
  const std::optional<double> base = baseline_error(result, budget);
  if (!base || *base <= 0 || !cell.problem.empty()) return {};
  return cell.mean / *base;
}

std::vector<std::string> notes(const comparison_view& view) {
  const problem_shape& shape = view.trace.shape();
  std::vector<std::string> texts{
      "Error: the norm of the change of the layer's outputs over the future queries, relative to the norm of the "
      "outputs; mean of the layers. Worst query: the largest of the single queries' relative errors, of all layers.",
      fmt::format("Budgets are tokens for each of the {} query heads, window included; a policy with one kept set per "
                  "KV head keeps {} times as many in each, which takes the same bytes.",
                  shape.query_heads, shape.group()),
      "Bytes: keys and values kept in all compared layers, in 16 bits."};
  if (times_are_known(view)) {
    texts.push_back(fmt::format("Time: of choosing the tokens of one layer on {} threads, mean of the layers; without "
                                "statistics of queries, which an engine has at hand.",
                                view.request.threads));
  }
  const auto every_query = [](const compared_policy& policy) { return policy.policy.observes_every_query(); };
  if (std::any_of(view.result.policies.begin(), view.result.policies.end(), every_query)) {
    texts.push_back(fmt::format("h2o sums over the {} queries that the trace holds.",
                                view.trace.layers().front().query.view.extent(2)));
  }
  for (const compared_policy& policy : view.result.policies) {
    if (!policy.seeded || view.request.seeds == 1) continue;
    texts.push_back(fmt::format("Random policies: mean of {} seeds from {}.", view.request.seeds, view.request.seed));
    break;
  }
  return texts;
}

std::string error_text(double error) { return error == 0 ? std::string("0") : fmt::format("{:.4f}", error); }

/// A table of policies by budgets under a title; `cell_text` gives a cell that has figures.
template <class CellText>
std::string table_text(const comparison_view& view, const std::string& title, const CellText& cell_text) {
  std::vector<std::string> header{"tokens per query head"};
  for (const index_t budget : view.request.budgets) header.push_back(std::to_string(budget));
  table lines(std::move(header));
  const std::string* group = nullptr;
  for (std::size_t p = 0; p < view.result.policies.size(); ++p) {
    const compared_policy& policy = view.result.policies[p];
    if (group == nullptr || *group != policy.group) lines.add_row({std::string(title_of(policy.group)) + ":"});
    group = &policy.group;
    std::vector<std::string> row{"  " + policy.name};
    for (std::size_t b = 0; b < view.request.budgets.size(); ++b) {
      const comparison_cell& cell = view.result.cells[p][b];
      row.push_back(cell.problem.empty() ? cell_text(cell, b) : std::string("-"));
    }
    lines.add_row(std::move(row));
  }
  return title + '\n' + lines.text() + '\n';
}

}  // namespace

std::string comparison_text(const comparison_view& view, bool per_layer) {
  const policy_comparison& result = view.result;
  const problem_shape& shape = view.trace.shape();
  std::vector<index_t> layers;
  for (const trace_layer& layer : view.trace.layers()) layers.push_back(layer.index);
  std::string text = fmt::format("{}: {} tokens, {} future queries, layers {}; full cache {}\n\n", one_line(view.path),
                                 shape.tokens, view.trace.future(), fmt::join(layers, ", "),
                                 bytes_text(static_cast<std::size_t>(full_bytes(view.trace))));
  text += table_text(view, fmt::format("error (as a multiple of {})", baseline),
                     [&](const comparison_cell& cell, std::size_t b) {
                       const std::optional<double> of_baseline = ratio(result, cell, b);
                       return error_text(cell.mean) + (of_baseline ? fmt::format(" ({:.2f} x)", *of_baseline) : "");
                     });
  text += table_text(view, "error of the worst query",
                     [](const comparison_cell& cell, std::size_t) { return error_text(cell.worst); });
  text += table_text(view, "bytes kept", [](const comparison_cell& cell, std::size_t) {
    return bytes_text(static_cast<std::size_t>(cell.bytes));
  });
  if (times_are_known(view)) {
    text += table_text(view, "time of a layer", [](const comparison_cell& cell, std::size_t) {
      return fmt::format("{:.3g} ms", 1e3 * cell.seconds);
    });
  }
  for (std::size_t i = 0; per_layer && i < layers.size(); ++i) {
    text += table_text(view, fmt::format("layer {}: error, and of the worst query", layers[i]),
                       [i](const comparison_cell& cell, std::size_t) {
                         return error_text(cell.layers[i].mean) + "  " + error_text(cell.layers[i].worst);
                       });
  }
  for (const std::string& note : notes(view)) text += note + '\n';
  for (std::size_t p = 0; p < result.policies.size(); ++p) {
    for (std::size_t b = 0; b < view.request.budgets.size(); ++b) {
      const std::string& problem = result.cells[p][b].problem;
      if (problem.empty()) continue;
      text += fmt::format("{} at {}: {}\n", result.policies[p].name, view.request.budgets[b], one_line(problem));
    }
  }
  return text;
}

std::string comparison_csv(const comparison_view& view) {
  std::string text = "policy,group,heads,allocation,budget,layer,error,worst,bytes,milliseconds,problem\n";
  const auto quoted = [](std::string problem) {
    std::string safe = "\"";
    for (const char c : one_line(std::move(problem))) safe += c == '"' ? std::string("\"\"") : std::string(1, c);
    return safe + '"';
  };
  const auto milliseconds = [&](double seconds) {
    return times_are_known(view) ? fmt::format("{:.6g}", 1e3 * seconds) : std::string();
  };
  for (std::size_t p = 0; p < view.result.policies.size(); ++p) {
    const compared_policy& policy = view.result.policies[p];
    for (std::size_t b = 0; b < view.request.budgets.size(); ++b) {
      const comparison_cell& cell = view.result.cells[p][b];
      const std::string head = fmt::format("{},{},{},{},{}", policy.name, policy.group,
                                           policy.policy.per_query_head() ? "query" : "kv",
                                           name_of(policy.policy.allocation), view.request.budgets[b]);
      if (!cell.problem.empty()) {
        text += fmt::format("{},all,,,,,{}\n", head, quoted(cell.problem));
        continue;
      }
      text += fmt::format("{},all,{:.8g},{:.8g},{},{},\n", head, cell.mean, cell.worst, cell.bytes,
                          milliseconds(cell.seconds));
      for (const layer_figures& layer : cell.layers) {
        text += fmt::format("{},{},{:.8g},{:.8g},{},{},\n", head, layer.layer, layer.mean, layer.worst, layer.bytes,
                            milliseconds(layer.seconds));
      }
    }
  }
  return text;
}

nlohmann::json comparison_json(const comparison_view& view, bool with_kept) {
  using nlohmann::json;
  const policy_comparison& result = view.result;
  const problem_shape& shape = view.trace.shape();
  json metadata = json::object();
  for (const auto& [key, text] : view.trace.metadata()) metadata[key] = text;
  json layers = json::array();
  for (const trace_layer& layer : view.trace.layers()) layers.push_back(layer.index);
  json object{
      {"program", fmt::format("restkv {}.{}.{}", RESTKV_VERSION_MAJOR, RESTKV_VERSION_MINOR, RESTKV_VERSION_PATCH)},
      {"trace",
       {{"file", view.path},
        {"tokens", shape.tokens},
        {"future", view.trace.future()},
        {"query_heads", shape.query_heads},
        {"kv_heads", shape.kv_heads},
        {"head_dim", shape.head_dim},
        {"layers", std::move(layers)},
        {"metadata", std::move(metadata)}}},
      {"baseline", baseline},
      {"budgets", view.request.budgets},
      {"full_bytes", full_bytes(view.trace)},
      {"seed", view.request.seed},
      {"notes", notes(view)},
      {"policies", json::array()},
      {"results", json::array()}};
  object["groups"] = json::array();
  for (const policy_group& group : policy_groups()) {
    object["groups"].push_back({{"name", group.name}, {"title", group.title}});
  }
  if (with_kept) object["kept"] = json::array();
  for (std::size_t p = 0; p < result.policies.size(); ++p) {
    const compared_policy& policy = result.policies[p];
    object["policies"].push_back({{"name", policy.name},
                                  {"description", policy.description},
                                  {"group", policy.group},
                                  {"heads", policy.policy.per_query_head() ? "query" : "kv"},
                                  {"allocation", name_of(policy.policy.allocation)},
                                  {"sinks", policy.sinks},
                                  {"recent", policy.recent},
                                  {"seeds", policy.seeded ? view.request.seeds : 1}});
    for (std::size_t b = 0; b < view.request.budgets.size(); ++b) {
      const comparison_cell& cell = result.cells[p][b];
      json entry{{"policy", policy.name}, {"budget", view.request.budgets[b]}};
      if (!cell.problem.empty()) {
        entry["error"] = cell.problem;
        object["results"].push_back(std::move(entry));
        continue;
      }
      entry["bytes"] = cell.bytes;
      entry["milliseconds"] = times_are_known(view) ? json(1e3 * cell.seconds) : json();
      entry["mean"] = cell.mean;
      entry["worst"] = cell.worst;
      const std::optional<double> of_baseline = ratio(result, cell, b);
      entry["ratio"] = of_baseline ? json(*of_baseline) : json();
      entry["layers"] = json::array();
      for (const layer_figures& layer : cell.layers) {
        entry["layers"].push_back({{"layer", layer.layer}, {"mean", layer.mean}, {"worst", layer.worst}});
        if (with_kept) {
          object["kept"].push_back({{"policy", policy.name},
                                    {"budget", view.request.budgets[b]},
                                    {"layer", layer.layer},
                                    {"heads", layer.runs}});
        }
      }
      object["results"].push_back(std::move(entry));
    }
  }
  return object;
}

}  // namespace restkv::cli
