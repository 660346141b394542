// SPDX-License-Identifier: Apache-2.0
/// @file
/// What the program prints: tables in columns, and a progress line for long work.
#pragma once

#include "command.hpp"

#include <chrono>
#include <string>
#include <vector>

namespace restkv::cli {

/// A table of texts. The first column is aligned to the left, the others to the right.
class table {
 public:
  explicit table(std::vector<std::string> header) : rows_{std::move(header)} {}
  /// A row shorter than the header is filled with empty cells, a longer one is cut.
  void add_row(std::vector<std::string> cells);
  /// The whole table, every line ended.
  [[nodiscard]] std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// A line on the standard error that is rewritten in place while work advances and vanishes at its end. Shown only on a
/// terminal, and not with --json or --quiet.
class progress_line {
 public:
  /// `total`: steps of the whole work.
  progress_line(const invocation& run, std::string what, std::size_t total);
  progress_line(const progress_line&) = delete;
  progress_line& operator=(const progress_line&) = delete;
  ~progress_line();

  /// One more step is done; `what` names the next.
  void advance(const std::string& what = {});

 private:
  void show();

  bool shown_;
  std::string title_;
  std::string detail_;
  std::size_t total_;
  std::size_t done_ = 0;
  std::chrono::steady_clock::time_point last_shown_{};
};

/// "1.4 MiB"
[[nodiscard]] std::string bytes_text(std::size_t bytes);

/// A text from a file, fit for a line of output: control characters replaced.
[[nodiscard]] std::string one_line(std::string text);

/// Prints a line, or lines, on the standard output. Throws input_error when it cannot be written.
void print(const std::string& text);

}  // namespace restkv::cli
