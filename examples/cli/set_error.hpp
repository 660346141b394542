// SPDX-License-Identifier: Apache-2.0
/// @file
/// The exact error of a kept set over the window's queries.
#pragma once

#include "layer_file.hpp"
#include "selection.hpp"

#include <restkv/interop/safetensors_writer.hpp>

#include <optional>

namespace restkv::cli {

/// Change of the layer's output relative to the output, over the window's queries.
struct relative_error {
  double mean = 0;
  double worst = 0;
};

/// The error of a selection; nothing where the file has no queries, or values that the verifier refuses.
[[nodiscard]] std::optional<relative_error> window_error(const selection& chosen, const layer_view<float>& layer,
                                                         const configuration& c, int threads);

/// The kept set that a set_error case gives: tensor `keep`, or `expected.keep`, [query_heads, tokens], not 0 where a
/// token is kept. Throws input_error.
[[nodiscard]] selection given_selection(const layer_file& file, const configuration& c);

/// The errors of a kept set for each query of the window, all in double.
struct window_errors {
  index_t heads = 0;
  index_t queries = 0;
  std::vector<double> value_error;            ///< ||o' - o||, [heads, queries]
  std::vector<double> output_error_per_head;  ///< ||W[h] (o' - o)||, [heads, queries]
  std::vector<double> output_error_layer;     ///< ||sum_h W[h] (o' - o)||, [queries]
};
[[nodiscard]] window_errors errors_of(const selection& chosen, const layer_view<float>& layer, const configuration& c,
                                      backend_kind backend, int threads, const std::string& where);

/// Adds the tensors of `window_errors` under these names.
void add_error_tensors(safetensors_writer& out, const selection& chosen, const layer_view<float>& layer,
                       const configuration& c, int threads, const std::string& where);

}  // namespace restkv::cli
