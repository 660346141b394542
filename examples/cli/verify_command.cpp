// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv verify`.
#include "command.hpp"

#include <CLI/CLI.hpp>

namespace restkv::cli {

void add_verify_command(CLI::App& app, invocation& run) {
  CLI::App& command = *app.add_subcommand("verify", "Compares the backends with results that are known");
  add_output_options(command, run);
}

}  // namespace restkv::cli
