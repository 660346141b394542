// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv explain`: why a head kept a token, or did not.
#include "command.hpp"
#include "explain.hpp"
#include "layer_file.hpp"
#include "output.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>

namespace restkv::cli {

namespace {

struct explain_options {
  std::string input;
  index_t layer = -1;  ///< -1: the tensors have no prefix
  index_t head = 0;
  index_t token = 0;
  bool allow_non_finite = false;
  int threads = 0;
  configuration_options configuration;
};

nlohmann::json json_of(const std::optional<ranked_unit>& unit) {
  if (!unit) return nullptr;
  return {{"token", unit->first}, {"score", unit->score}};
}

nlohmann::json json_of(const explain_options& options, const configuration& c, const explanation& e) {
  nlohmann::json observed = nlohmann::json::array();
  for (const observed_token& o : e.observed) {
    observed.push_back({{"query_head", o.query_head},
                        {"attention", o.attention},
                        {"most_attention", o.most_attention},
                        {"odds", o.odds},
                        {"distance", o.distance}});
  }
  const auto optional = [](const std::optional<double>& value) {
    return value ? nlohmann::json(*value) : nlohmann::json();
  };
  return {{"file", options.input},
          {"configuration", to_json(c)},
          {"head", e.head},
          {"token", e.token},
          {"kept", e.kept},
          {"protected_as", e.protected_as.empty() ? nlohmann::json() : nlohmann::json(e.protected_as)},
          {"key_norm", e.key_norm},
          {"value_norm", e.value_norm},
          {"observed", observed},
          {"score", optional(e.score)},
          {"smoothed", optional(e.smoothed)},
          {"unit", c.unit},
          {"unit_score", e.rank > 0 ? nlohmann::json(e.unit_score) : nlohmann::json()},
          {"rank", e.rank > 0 ? nlohmann::json(e.rank) : nlohmann::json()},
          {"candidates", e.candidates},
          {"chosen", e.chosen},
          {"last_kept", json_of(e.last_kept)},
          {"first_dropped", json_of(e.first_dropped)},
          {"head_length", e.head_length},
          {"mean_length", e.mean_length}};
}

/// Why, in a sentence.
std::string reason_of(const configuration& c, const explanation& e) {
  if (!e.protected_as.empty()) return fmt::format("kept whatever its score: {}", e.protected_as);
  const char* const units = c.unit == 1 ? "candidates" : "units";
  if (e.candidates == e.chosen) return fmt::format("kept: all {} {} are", e.candidates, units);
  return fmt::format("{}: rank {} of {} {}, of which {} are kept", e.kept ? "kept" : "dropped", e.rank, e.candidates,
                     units, e.chosen);
}

std::string text_of(const explain_options& options, const configuration& c, const explanation& e) {
  const char* const kind = c.per_query_head() ? "query" : "kv";
  std::string text = fmt::format("{}: {}, token {} of {} head {}\n", one_line(options.input), name_of(c.method),
                                 e.token, kind, e.head);
  text += reason_of(c, e) + "\n\n";
  if (!e.observed.empty()) {
    table lines({"", "attention", "largest", "odds", "distance"});
    for (const observed_token& o : e.observed) {
      lines.add_row({fmt::format("query head {}", o.query_head), fmt::format("{:.4g}", o.attention),
                     fmt::format("{:.4g}", o.most_attention), fmt::format("{:.4g}", o.odds),
                     fmt::format("{:.4g}", o.distance)});
    }
    text += lines.text();
  }
  const auto add = [&](const char* name, const std::optional<double>& value, const std::string& note = "") {
    text += fmt::format("{:<16}{:>12}{}\n", name, value ? fmt::format("{:.6g}", *value) : "-",
                        note.empty() ? "" : "  " + note);
  };
  add("norm of the key", e.key_norm);
  add("and the value", e.value_norm);
  add("score", e.score);
  add("smoothed", e.smoothed);
  if (c.unit > 1 && e.rank > 0) add("of its unit", e.unit_score, fmt::format("{} tokens", c.unit));
  const auto at = [](const ranked_unit& unit) { return fmt::format("token {}", unit.first); };
  if (e.last_kept) add("last kept", e.last_kept->score, at(*e.last_kept));
  if (e.first_dropped) add("first dropped", e.first_dropped->score, at(*e.first_dropped));
  return text + fmt::format("the head keeps {} tokens, the heads of the layer {:.1f} in the mean\n", e.head_length,
                            e.mean_length);
}

void run_explain(const invocation& run, const explain_options& options) {
  safetensors_file file;
  require(safetensors_file::open(options.input, file), "");
  const std::string prefix = options.layer < 0 ? "" : fmt::format("layers.{}.", options.layer);
  const configuration c = options.configuration.over(file.find_metadata("case"), options.input + ": metadata case");
  if (c.method == method_kind::set_error) throw input_error(options.input + ": set_error chooses no tokens");
  layer_file tensors(file, options.input, prefix, options.allow_non_finite);
  const layer_view<float> layer = tensors.view(c);
  const selection chosen = run_eigen(c, layer, options.threads, options.input);
  const explanation e = explain(c, layer, chosen, options.head, options.token, options.input);
  print(run.json ? json_of(options, c, e).dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n"
                 : text_of(options, c, e));
}

}  // namespace

void add_explain_command(CLI::App& app, invocation& run) {
  CLI::App& command = *app.add_subcommand("explain", "Why a head kept a token of a layer, or did not");
  const auto options = std::make_shared<explain_options>();
  command.add_option("FILE", options->input, "A case file or a trace (.safetensors)")->required();
  command.add_option("--layer", options->layer, "Read layers.N.q and so on: a layer of a trace")
      ->check(CLI::NonNegativeNumber);
  command.add_option("--head", options->head, "Head of the kept set: KV head, or query head where each has its own")
      ->check(CLI::NonNegativeNumber)
      ->required();
  command.add_option("--token", options->token, "Position, 0 the oldest")->check(CLI::NonNegativeNumber)->required();
  add_threads_option(command, options->threads);
  command.add_flag("--allow-non-finite", options->allow_non_finite, "Go on where a tensor holds NaN or infinity");
  add_output_options(command, run);
  add_configuration_options(command, options->configuration);
  command.footer("attention, odds and distance: means over the queries of the observation window that see the token.");
  command.callback([options, &run] { run_explain(run, *options); });
}

}  // namespace restkv::cli
