// SPDX-License-Identifier: Apache-2.0
/// @file
/// Selections over all layers of a trace.
#pragma once

#include "compare.hpp"

#include <functional>

namespace restkv::cli {

/// Scores one layer, the index-th.
using layer_scorer = std::function<selection(std::size_t)>;

/// The tokens that each layer keeps under a budget across layers (`c.over_layers()`), c.budget the mean over their heads.
/// Layers compete by the scores that tokens are ranked by; CAKE's own are computed from the layers. Runs on eigen_backend.
/// Throws input_error.
[[nodiscard]] std::vector<selection> select_over_layers(const trace_file& trace, const configuration& c, int threads,
                                                        const layer_scorer& score);

}  // namespace restkv::cli
