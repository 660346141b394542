// SPDX-License-Identifier: Apache-2.0
/// @file
/// Rows of `restkv compare` that look at the queries to come: anticipated from the prompt, a set chosen for them, values
/// fitted to them.
#pragma once

#include "selection.hpp"
#include "trace_file.hpp"

namespace restkv::cli {

/// What is done beyond a policy's selection on the prompt.
enum class refinement {
  none,
  anticipated,         ///< the policy looks at the anticipated queries
  set_error,           ///< and its set is refined for them
  anticipated_fitted,  ///< the policy looks at them, and kept values are fitted to them
  set_error_fitted,    ///< all of it
};

/// A kept set, and the relative error that its cache makes over the future queries.
struct refined_selection {
  selection chosen;
  double mean = 0;
  double worst = 0;
};

/// `lowest_error` on a layer, `budget` tokens per KV head, refined. The prompt's last 8 tokens are kept. `rope_theta` is the
/// model's. Throws input_error.
[[nodiscard]] refined_selection select_anticipated(const trace_layer& layer, refinement how, index_t budget,
                                                   double rope_theta, int threads);

}  // namespace restkv::cli
