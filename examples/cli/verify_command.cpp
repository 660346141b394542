// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv verify`: compares the backends with results that are known.
#include "command.hpp"
#include "output.hpp"
#include "verify.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>
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

/// "eigen 4.7e-07  reference 1.7e-07", the backends that were asked for; "-" where one had no floats to compare.
std::string errors_text(const file_outcome& outcome, const verify_options& options) {
  std::string text;
  for (const verified_backend* const backend : options.backends) {
    const auto error = outcome.largest_error.find(std::string(backend->name));
    const std::string number = error == outcome.largest_error.end() ? "-" : fmt::format("{:.1e}", error->second);
    text += fmt::format("{} {:<7}  ", backend->name, number);
  }
  return text;
}

std::string line_of(const file_outcome& outcome, const verify_options& options, std::size_t width) {
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
  return fmt::format("{}  {}{}{}\n", head, errors_text(outcome, options), fmt::join(outcome.compared, " "), notes);
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
  for (const auto& [backend, error] : outcome.largest_error) object["largest_error"][backend] = error;
  return object;
}

/// Generated problems on every chosen backend but the reference, with which they are compared. Returns how many
/// policies showed a difference.
std::size_t verify_random(const invocation& run, const verify_options& options, nlohmann::json& objects) {
  constexpr std::size_t policies = 3;
  std::vector<const verified_backend*> backends;
  for (const verified_backend* const backend : options.backends) {
    if (backend->random != nullptr) backends.push_back(backend);
  }
  if (backends.empty()) {
    throw input_error(
        fmt::format("--backend {}: generated problems compare a backend with the reference, not the "
                    "reference with itself",
                    options.backend));
  }
  std::size_t mismatched = 0;
  progress_line progress(run, "verify", backends.size() * policies * static_cast<std::size_t>(options.random));
  for (const verified_backend* const backend : backends) {
    parity::options how{.cases = options.random, .seed = options.seed};
    how.progress = [&](index_t) { progress.advance(std::string(backend->name)); };
    for (const random_outcome& outcome : backend->random(how, options.threads)) {
      const parity::report& report = outcome.report;
      mismatched += report.ok() ? 0 : 1;
      if (!run.json) {
        print(fmt::format("{:<8}  {} random problems  {}, {}\n  {}\n", report.ok() ? "ok" : "MISMATCH", report.cases,
                          backend->name, outcome.policy, report.text()));
        continue;
      }
      nlohmann::json object{{"backend", backend->name},
                            {"policy", outcome.policy},
                            {"outcome", report.ok() ? "ok" : "mismatch"},
                            {"cases", report.cases},
                            {"values_compared", report.counts.values_compared},
                            {"values_unbounded", report.counts.values_unbounded},
                            {"sets_compared", report.counts.sets_compared},
                            {"near_ties", report.counts.near_ties},
                            {"largest_part_of_bound", report.counts.largest_part}};
      if (!report.ok()) {
        object["difference"] = report.difference;
        if (report.smallest) object["smallest_case"] = to_string(*report.smallest);
      }
      objects.push_back(std::move(object));
    }
  }
  return mismatched;
}

void run_verify(invocation& run, const std::vector<std::string>& files, verify_options options) {
  options.backends = find_backends(options.backend);
  if (files.empty() && options.random == 0) {
    throw input_error("verify: there is nothing to verify: name FILES, or ask for generated problems with --random N");
  }
  const bool reads_files = std::any_of(options.backends.begin(), options.backends.end(),
                                       [](const verified_backend* backend) { return backend->select != nullptr; });
  if (!files.empty() && !reads_files) {
    throw input_error(
        fmt::format("--backend {}: takes part in generated problems only (--random N), not in files", options.backend));
  }
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
      print(line_of(outcome, options, width));
    }
  }
  const std::size_t passed = files.size() - mismatched - unusable;
  nlohmann::json random = nlohmann::json::array();
  const std::size_t differing = options.random > 0 ? verify_random(run, options, random) : 0;
  if (run.json) {
    nlohmann::json object{{"files", objects},
                          {"ok", passed},
                          {"mismatched", mismatched},
                          {"unusable", unusable},
                          {"tolerance", options.tolerance}};
    if (options.random > 0) {
      object["random"] = random;
      object["seed"] = options.seed;
    }
    print(object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  } else if (files.size() > 1) {
    print(fmt::format("{} ok, {} with a mismatch, {} unusable\n", passed, mismatched, unusable));
  }
  run.exit_status = mismatched + differing > 0 ? exit_mismatch : unusable > 0 ? exit_bad_input : exit_success;
}

}  // namespace

void add_verify_command(CLI::App& app, invocation& run) {
  CLI::App& command =
      *app.add_subcommand("verify", "Compare the backends with each file's known results, one line a file");
  const auto files = std::make_shared<std::vector<std::string>>();
  const auto options = std::make_shared<verify_options>();
  command.add_option("FILES", *files,
                     "Case files with tensors expected.*, or known results of traces (NAME.expected.safetensors)");
  command.add_option(
      "--backend", options->backend,
      "eigen, reference, thrust-cpp, thrust-omp, host-kernels, cuda, thrust-cuda, as far as they were built, or all; "
      "left out: eigen and reference");
  command
      .add_option("--random", options->random,
                  "Compare with the reference on N generated problems for each of three policies")
      ->check(CLI::Range(index_t{1}, index_t{1'000'000'000}))
      ->type_name("N");
  command.add_option("--seed", options->seed, "Of the generated problems")->capture_default_str();
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
