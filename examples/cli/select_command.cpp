// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv select`: the tokens to keep of one layer, into a file.
#include "command.hpp"
#include "compact_tensors.hpp"
#include "layer_file.hpp"
#include "output.hpp"
#include "selection.hpp"
#include "set_error.hpp"

#include <restkv/interop/safetensors_writer.hpp>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>
#include <optional>

namespace restkv::cli {

namespace {

struct select_options {
  std::string input;
  std::string output;
  index_t layer = -1;  ///< -1: the tensors have no prefix
  bool compact = false;
  bool allow_non_finite = false;
  std::string backend = name_of(backend_kind::eigen);
  int threads = 0;
  configuration_options configuration;
};

template <class T, class From>
std::vector<T> converted(const std::vector<From>& values) {
  std::vector<T> result;
  for (const From value : values) result.push_back(static_cast<T>(value));
  return result;
}

/// The tensors of a selection: see `restkv select --help` and the documentation of the file format.
void add_tensors(safetensors_writer& out, const selection& chosen, const configuration& c) {
  const auto rows = [&](const std::string& name, const std::vector<double>& values) {
    const std::vector<float> narrowed = converted<float>(values);
    out.add(name, tensor_view<const float, 2>(narrowed.data(), {chosen.heads, chosen.past}));
  };
  rows("score", chosen.score);
  rows("smoothed", chosen.smoothed);
  out.add("head_lengths", tensor_view<const position_t, 1>(chosen.lengths.data(), {chosen.heads}));

  std::vector<std::vector<position_t>> kept;
  std::size_t longest = 0;
  for (index_t h = 0; h < chosen.heads; ++h) {
    kept.push_back(chosen.kept_past(h));
    longest = std::max(longest, kept.back().size());
  }
  std::vector<position_t> indices;
  for (auto& row : kept) {
    row.resize(longest, -1);
    indices.insert(indices.end(), row.begin(), row.end());
  }
  out.add("indices", tensor_view<const position_t, 2>(indices.data(), {chosen.heads, static_cast<index_t>(longest)}));

  if (c.spatial != spatial_kind::adaptive) return;
  const adaptive_windows windows(c, chosen.drift);
  const std::vector<float> drifts = converted<float>(chosen.drift);
  out.add("kernel", tensor_view<const std::int32_t, 1>(windows.kernel.data(), {chosen.heads}));
  out.add("shift", tensor_view<const std::int32_t, 1>(windows.shift.data(), {chosen.heads}));
  out.add("drift", tensor_view<const float, 1>(drifts.data(), {chosen.heads}));
}

/// What is said about a selection.
struct summary {
  configuration policy;
  selection chosen;
  index_t tokens = 0;
  std::size_t cache_bytes = 0;
  std::size_t kept_bytes = 0;
  std::optional<relative_error> error;
};

/// Runs the selection and writes the output.
summary select_into_file(const invocation& run, const select_options& options) {
  progress_line progress(run, "select", 3);
  safetensors_file file;
  require(safetensors_file::open(options.input, file), "");
  const std::string prefix = options.layer < 0 ? "" : fmt::format("layers.{}.", options.layer);
  summary s;
  s.policy = options.configuration.over(file.find_metadata("case"), options.input + ": metadata case");
  layer_file tensors(file, options.input, prefix, options.allow_non_finite);
  const layer_view<float> layer = tensors.view(s.policy);

  progress.advance("selecting");
  safetensors_writer out;
  if (s.policy.method == method_kind::set_error) {
    s.chosen = given_selection(tensors, s.policy);
    add_error_tensors(out, s.chosen, layer, s.policy, options.threads, options.input);
  } else {
    score_memory memory;
    s.chosen = options.backend == name_of(backend_kind::reference)
                   ? run_reference(s.policy, layer, memory, options.input)
                   : run_eigen(s.policy, layer, options.threads, options.input);
    add_tensors(out, s.chosen, s.policy);
  }

  progress.advance("measuring the error");
  s.tokens = tensors.tokens();
  s.cache_bytes = static_cast<std::size_t>(tensors.kv_heads() * s.tokens) * tensors.bytes_per_token();
  s.kept_bytes = static_cast<std::size_t>(s.chosen.kept().total()) * tensors.bytes_per_token();
  s.error = window_error(s.chosen, layer, s.policy, options.threads);

  progress.advance("writing");
  if (options.compact) add_compact_tensors(out, file, prefix, s.chosen.kept(), options.input);
  out.set_metadata("case", to_json(s.policy).dump());
  out.set_metadata("restkv", fmt::format("{}.{}.{}", RESTKV_VERSION_MAJOR, RESTKV_VERSION_MINOR, RESTKV_VERSION_PATCH));
  require(out.write(options.output), "");
  return s;
}

nlohmann::json json_of(const select_options& options, const summary& s) {
  nlohmann::json object{{"file", options.input},
                        {"output", options.output},
                        {"configuration", to_json(s.policy)},
                        {"backend", options.backend},
                        {"granularity", s.policy.per_query_head() ? "query head" : "kv head"},
                        {"heads", s.chosen.heads},
                        {"tokens", s.tokens},
                        {"window", s.tokens - s.chosen.past},
                        {"head_lengths", s.chosen.lengths},
                        {"cache_bytes", s.cache_bytes},
                        {"kept_bytes", s.kept_bytes},
                        {"window_error", nullptr}};
  if (s.error) object["window_error"] = {{"mean", s.error->mean}, {"worst", s.error->worst}};
  return object;
}

std::string text_of(const select_options& options, const summary& s) {
  const index_t kept = s.chosen.kept().total();
  const index_t all = s.chosen.heads * s.tokens;
  const auto [fewest, most] = std::minmax_element(s.chosen.lengths.begin(), s.chosen.lengths.end());
  std::string text = fmt::format("{}: {}, {} {} heads, {} tokens, window {}\n", one_line(options.input),
                                 name_of(s.policy.method), s.chosen.heads, s.policy.per_query_head() ? "query" : "kv",
                                 s.tokens, s.tokens - s.chosen.past);
  text += fmt::format("kept    {} of {} tokens ({:.1f} %), {} to {} a head\n", kept, all,
                      all > 0 ? 100.0 * static_cast<double>(kept) / static_cast<double>(all) : 100.0, *fewest, *most);
  text += fmt::format("memory  {} of {} a layer\n", bytes_text(s.kept_bytes), bytes_text(s.cache_bytes));
  if (s.error) {
    text += fmt::format("error   {:.4g} of the output over the window's queries, {:.4g} at worst\n", s.error->mean,
                        s.error->worst);
  }
  return text + fmt::format("written {}\n", one_line(options.output));
}

void run_select(const invocation& run, const select_options& options) {
  const summary s = select_into_file(run, options);
  print(run.json ? json_of(options, s).dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n"
                 : text_of(options, s));
}

}  // namespace

void add_select_command(CLI::App& app, invocation& run) {
  CLI::App& command = *app.add_subcommand("select", "Choose the tokens to keep of one layer, into a file");
  const auto options = std::make_shared<select_options>();
  command.add_option("FILE", options->input, "A case file (.safetensors): q, k, v, wo, and its configuration")
      ->required();
  command.add_option("-o,--output", options->output, "The file to write (.safetensors)")->required();
  command.add_option("--layer", options->layer, "Read layers.N.q and so on: a layer of a trace")
      ->check(CLI::NonNegativeNumber);
  command.add_flag("--compact", options->compact, "Write the kept keys and values, too");
  command.add_option("--backend", options->backend, "What computes: eigen (float, fast), reference (double)")
      ->check(CLI::IsMember(std::vector<std::string>{"eigen", "reference"}))
      ->type_name("")
      ->capture_default_str();
  add_threads_option(command, options->threads);
  command.add_flag("--allow-non-finite", options->allow_non_finite,
                   "Go on where a tensor holds NaN or infinity: such keys get no attention");
  add_output_options(command, run);
  add_configuration_options(command, options->configuration);
  command.footer(
      "Writes score, smoothed [heads, tokens - window], indices [heads, most] (kept tokens before the window, "
      "ascending,\n"
      "-1 where a head keeps fewer), head_lengths [heads] (window included); with an adaptive window kernel, shift "
      "and\n"
      "drift [heads]; with --compact k and v [heads, kept, channels], or [total, channels] and offsets [heads + 1] "
      "where\n"
      "heads keep different numbers. A file without a configuration gets the preset standard.");
  command.callback([options, &run] { run_select(run, *options); });
}

}  // namespace restkv::cli
