// SPDX-License-Identifier: Apache-2.0
#include "output.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace restkv::cli {

void table::add_row(std::vector<std::string> cells) {
  cells.resize(rows_.front().size());
  rows_.push_back(std::move(cells));
}

std::string table::text() const {
  const std::size_t columns = rows_.front().size();
  std::vector<std::size_t> widths(columns, 0);
  for (const auto& row : rows_) {
    for (std::size_t c = 0; c < columns; ++c) widths[c] = std::max(widths[c], row[c].size());
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t c = 0; c < columns; ++c) {
      line += c == 0 ? fmt::format("{:<{}}", row[c], widths[c]) : fmt::format("  {:>{}}", row[c], widths[c]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + '\n';
  }
  return text;
}

progress_line::progress_line(const invocation& run, std::string what, std::size_t total)
    : shown_(!run.json && !run.quiet && ::isatty(STDERR_FILENO) == 1), title_(std::move(what)), total_(total) {
  show();
}

progress_line::~progress_line() {
  if (shown_) std::fputs("\r\x1b[K", stderr);
}

void progress_line::advance(const std::string& what) {
  ++done_;
  detail_ = what;
  show();
}

void progress_line::show() {
  if (!shown_ || total_ == 0) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_shown_ < std::chrono::milliseconds(100)) return;
  last_shown_ = now;
  constexpr std::size_t width = 30;
  const std::size_t filled = std::min(done_, total_) * width / total_;
  const std::string line = fmt::format("\r\x1b[K{} [{:#<{}}{:.<{}}] {:3}% {}", title_, "", filled, "", width - filled,
                                       std::min(done_, total_) * 100 / total_, detail_);
  std::fputs(line.c_str(), stderr);
  std::fflush(stderr);
}

std::string bytes_text(std::size_t bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double size = static_cast<double>(bytes);
  const char* unit = "B";
  for (const char* larger : {"KiB", "MiB", "GiB", "TiB"}) {
    if (size < 1024) break;
    size /= 1024;
    unit = larger;
  }
  return fmt::format("{:.1f} {}", size, unit);
}

std::string one_line(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return text;
}

void print(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw input_error("the standard output cannot be written");
  }
}

}  // namespace restkv::cli
