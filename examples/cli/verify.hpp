// SPDX-License-Identifier: Apache-2.0
/// @file
/// What `restkv verify` does with one file.
#pragma once

#include "command.hpp"
#include "comparison.hpp"
#include "verify_backends.hpp"

#include <string>

namespace restkv::cli {

struct verify_options {
  double tolerance = 1e-4;  ///< of a row's largest score
  int threads = 1;
  bool allow_non_finite = false;
  std::string trace;                              ///< the trace of a file of expected results; empty: beside it
  std::string backend;                            ///< a name, or "all"; empty: eigen and reference
  std::vector<const verified_backend*> backends;  ///< those of that name
  index_t random = 0;                             ///< generated problems for each policy
  std::uint64_t seed = 1;                         ///< of the generated problems
};

/// True for the known results of a trace, false for a case file.
[[nodiscard]] bool holds_trace_results(const safetensors_file& file);

/// Runs a case file's configuration on the chosen backends and compares with its tensors `expected.*`. Throws
/// input_error.
void verify_case(const safetensors_file& file, const std::string& path, const verify_options& options,
                 file_outcome& outcome);

/// Runs every configuration that the known results of a trace hold, and shows the progress. Throws input_error.
void verify_trace(const invocation& run, const safetensors_file& file, const std::string& path,
                  const verify_options& options, file_outcome& outcome);

}  // namespace restkv::cli
