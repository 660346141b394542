// SPDX-License-Identifier: Apache-2.0
/// @file
/// The program `restkv`: registers the subcommands, turns failures into messages and exit statuses.
#include "command.hpp"
#include "output.hpp"

#include <restkv/core/config.hpp>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <new>

namespace restkv::cli {

void add_output_options(CLI::App& command, invocation& run) {
  command.add_flag("--json", run.json, "Print one JSON object on the standard output instead of text");
  command.add_flag("-q,--quiet", run.quiet, "Show no progress");
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
  app.set_version_flag("--version", fmt::format("restkv {}.{}.{}", RESTKV_VERSION_MAJOR, RESTKV_VERSION_MINOR,
                                                RESTKV_VERSION_PATCH));
  app.require_subcommand(1);
  app.footer("Exit status: 0 all is well, 1 something does not compare equal, 2 a file or an option cannot be used.");
  add_select_command(app, run);
  add_verify_command(app, run);
  try {
    app.parse(count, arguments);
  } catch (const CLI::ParseError& problem) {
    if (problem.get_exit_code() == 0) return app.exit(problem);  // --help, --version
    return fail(run, fmt::format("{} (see --help)", problem.what()));
  } catch (const input_error& problem) {
    return fail(run, problem.what());
  } catch (const std::bad_alloc&) {
    return fail(run, "out of memory");
  }
  return run.exit_status;
}

}  // namespace
}  // namespace restkv::cli

int main(int count, char** arguments) { return restkv::cli::run_program(count, arguments); }
