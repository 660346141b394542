// SPDX-License-Identifier: Apache-2.0
/// @file
/// The program `restkv`: registers the subcommands, turns failures into messages and exit statuses.
#include "command.hpp"
#include "output.hpp"

#include <restkv/core/config.hpp>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <csignal>
#include <new>
#include <string_view>
#include <thread>

namespace restkv::cli {

void add_output_options(CLI::App& command, invocation& run) {
  command.add_flag("--json", run.json, "Print one JSON object on the standard output instead of text");
  command.add_flag("-q,--quiet", run.quiet, "Show no progress");
}

void add_threads_option(CLI::App& command, int& threads) {
  threads = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 1024);
  command.add_option("--threads", threads, "Threads; results do not depend on their number")
      ->check(CLI::Range(1, 1024))
      ->type_name("N")
      ->capture_default_str();
}

namespace {

/// The message on the standard error; with --json also as an object where the result would have been.
int fail(const invocation& run, const std::string& message) {
  fmt::print(stderr, "restkv: {}\n", one_line(message));
  if (run.json) {
    const nlohmann::json object{{"error", message}};
    fmt::print("{}\n", object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
  }
  return exit_bad_input;
}

int run_program(int count, char** arguments) {
  invocation run;
  CLI::App app("Decides which entries of a transformer's KV cache to keep.", "restkv");
  app.set_version_flag(
      "--version", fmt::format("restkv {}.{}.{}", RESTKV_VERSION_MAJOR, RESTKV_VERSION_MINOR, RESTKV_VERSION_PATCH));
  app.require_subcommand(1);
  // Known before anything is parsed, so that a failure to parse is reported as wished, too.
  run.json = std::any_of(arguments, arguments + count, [](std::string_view text) { return text == "--json"; });
  app.footer("Exit status: 0 all is well, 1 something does not compare equal, 2 a file or an option cannot be used.");
  add_compare_command(app, run);
  add_explain_command(app, run);
  add_gallery_command(app, run);
  add_select_command(app, run);
  add_verify_command(app, run);
  const auto is_named = [&](const CLI::App* command) { return command->get_name() == arguments[1]; };
  if (count > 1 && arguments[1][0] != '-' && app.get_subcommands(is_named).empty()) {
    return fail(run, fmt::format("there is no subcommand {} (see --help)", arguments[1]));
  }
  try {
    app.parse(count, arguments);
  } catch (const CLI::ParseError& problem) {
    if (problem.get_exit_code() == 0) return app.exit(problem);  // --help, --version
    return fail(run, fmt::format("{} (see --help)", problem.what()));
  } catch (const input_error& problem) {
    return fail(run, problem.what());
  } catch (const std::bad_alloc&) {
    return fail(run, "out of memory");
  } catch (const std::exception& problem) {
    return fail(run, problem.what());
  }
  return run.exit_status;
}

}  // namespace
}  // namespace restkv::cli

int main(int count, char** arguments) {
  std::signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is a failure of write, which has a text
  return restkv::cli::run_program(count, arguments);
}
