// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv select`.
#include "command.hpp"

#include <CLI/CLI.hpp>

namespace restkv::cli {

void add_select_command(CLI::App& app, invocation& run) {
  CLI::App& command = *app.add_subcommand("select", "Chooses the tokens to keep of one layer");
  add_output_options(command, run);
}

}  // namespace restkv::cli
