// SPDX-License-Identifier: Apache-2.0
/// @file
/// What the subcommands of the program share: how they are registered, what they return, how they fail.
#pragma once

#include <restkv/core/status.hpp>

#include <stdexcept>
#include <string>

namespace CLI {
class App;
}

namespace restkv::cli {

/// The program's exit statuses.
enum exit_status : int {
  exit_success = 0,
  exit_mismatch = 1,   ///< everything ran, and something did not compare equal
  exit_bad_input = 2,  ///< a file, an option or a configuration that cannot be used
};

/// A file, an option or a configuration that cannot be used; `what()` names it. Ends the program with exit_bad_input.
class input_error : public std::runtime_error {
 public:
  explicit input_error(const std::string& text, errc code = errc::invalid_argument)
      : std::runtime_error(text), code_(code) {}
  /// The kind of failure.
  [[nodiscard]] errc code() const noexcept { return code_; }

 private:
  errc code_;
};

/// Throws an input_error that begins with `where` (a file, as a rule) unless `outcome` is ok.
inline void require(const status& outcome, const std::string& where) {
  if (outcome.ok()) return;
  throw input_error(where.empty() ? outcome.message() : where + ": " + outcome.message(), outcome.code());
}

/// One run of the program: the options that every subcommand has, and its outcome.
struct invocation {
  bool json = false;   ///< --json: one JSON object on the standard output, nothing else
  bool quiet = false;  ///< --quiet: no progress
  int exit_status = exit_success;
};

/// Adds --json and --quiet to a subcommand.
void add_output_options(CLI::App& command, invocation& run);

/// Adds --threads; where it is left out, `threads` becomes the number of the machine's cores.
void add_threads_option(CLI::App& command, int& threads);

/// Each adds its subcommand. The subcommand's callback sets `run.exit_status`; it throws input_error.
void add_select_command(CLI::App& app, invocation& run);
void add_verify_command(CLI::App& app, invocation& run);
void add_compare_command(CLI::App& app, invocation& run);
void add_explain_command(CLI::App& app, invocation& run);
void add_gallery_command(CLI::App& app, invocation& run);

}  // namespace restkv::cli
