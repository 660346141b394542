// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv verify`: compares the backends with results that are known.
#include "command.hpp"
#include "output.hpp"
#include "verify.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>

namespace restkv::cli {

namespace {

file_outcome verify_file(const invocation& run, const std::string& path, const verify_options& options) {
  file_outcome outcome;
  outcome.file = path;
  try {
    safetensors_file file;
    require(safetensors_file::open(path, file), "");
    if (holds_trace_results(file)) {
      verify_trace(run, file, path, options, outcome);
    } else {
      verify_case(file, path, options, outcome);
    }
    if (outcome.compared.empty() && outcome.mismatches.empty()) {
      throw input_error(path + ": nothing in it could be compared");
    }
  } catch (const input_error& problem) {
    outcome.unusable = problem.what();
  }
  return outcome;
}

std::string error_text(const std::optional<double>& error) { return error ? fmt::format("{:.1e}", *error) : "-"; }

std::string line_of(const file_outcome& outcome, std::size_t width) {
  if (!outcome.unusable.empty()) return fmt::format("UNUSABLE  {}\n", one_line(outcome.unusable));
  const std::string head = fmt::format("{:<8}  {:<{}}  {:<12}", outcome.ok() ? "ok" : "MISMATCH",
                                       one_line(outcome.file), width, outcome.method);
  if (!outcome.ok()) {
    const std::size_t others = outcome.mismatches.size() - 1;
    return fmt::format("{}  {}{}\n", head, one_line(outcome.mismatches.front()),
                       others == 0 ? "" : fmt::format(" (and {} more: see --json)", others));
  }
  const std::string notes =
      outcome.notes.empty() ? "" : fmt::format("; {} (all notes: see --json)", one_line(outcome.notes.front()));
  return fmt::format("{}  eigen {:<7}  reference {:<7}  {}{}\n", head, error_text(outcome.largest_error[0]),
                     error_text(outcome.largest_error[1]), fmt::join(outcome.compared, " "), notes);
}

nlohmann::json json_of(const file_outcome& outcome) {
  nlohmann::json object{{"file", outcome.file},
                        {"outcome", !outcome.unusable.empty() ? "unusable"
                                    : outcome.ok()            ? "ok"
                                                              : "mismatch"},
                        {"method", outcome.method},
                        {"compared", outcome.compared},
                        {"largest_error", nlohmann::json::object()},
                        {"mismatches", outcome.mismatches},
                        {"notes", outcome.notes}};
  if (!outcome.unusable.empty()) object["error"] = outcome.unusable;
  for (std::size_t i = 0; i < outcome.largest_error.size(); ++i) {
    if (outcome.largest_error[i]) object["largest_error"][names<backend_kind>::values[i]] = *outcome.largest_error[i];
  }
  return object;
}

void run_verify(invocation& run, const std::vector<std::string>& files, const verify_options& options) {
  std::size_t width = 0;
  for (const std::string& path : files) width = std::max(width, path.size());
  std::size_t mismatched = 0, unusable = 0;
  nlohmann::json objects = nlohmann::json::array();
  for (const std::string& path : files) {
    const file_outcome outcome = verify_file(run, path, options);
    mismatched += outcome.mismatches.empty() ? 0 : 1;
    unusable += outcome.unusable.empty() ? 0 : 1;
    if (run.json) {
      objects.push_back(json_of(outcome));
    } else {
      print(line_of(outcome, width));
    }
  }
  const std::size_t passed = files.size() - mismatched - unusable;
  if (run.json) {
    const nlohmann::json object{{"files", objects},
                                {"ok", passed},
                                {"mismatched", mismatched},
                                {"unusable", unusable},
                                {"tolerance", options.tolerance}};
    print(object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  } else if (files.size() > 1) {
    print(fmt::format("{} ok, {} with a mismatch, {} unusable\n", passed, mismatched, unusable));
  }
  run.exit_status = mismatched > 0 ? exit_mismatch : unusable > 0 ? exit_bad_input : exit_success;
}

}  // namespace

void add_verify_command(CLI::App& app, invocation& run) {
  CLI::App& command =
      *app.add_subcommand("verify", "Compare the backends with each file's known results, one line a file");
  const auto files = std::make_shared<std::vector<std::string>>();
  const auto options = std::make_shared<verify_options>();
  command
      .add_option("FILES", *files,
                  "Case files with tensors expected.*, or known results of traces (NAME.expected.safetensors)")
      ->required();
  command.add_option("--trace", options->trace, "The trace of known results; left out: NAME.safetensors beside them");
  command
      .add_option("--tolerance", options->tolerance,
                  "Difference of scores that is allowed, relative to a row's maximum")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  add_threads_option(command, options->threads);
  command.add_flag("--allow-non-finite", options->allow_non_finite, "Go on where a tensor holds NaN or infinity");
  add_output_options(command, run);
  command.callback([files, options, &run] { run_verify(run, *files, *options); });
}

}  // namespace restkv::cli
