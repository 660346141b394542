// SPDX-License-Identifier: Apache-2.0
/// @file
/// The output errors of a set, computed on any backend.
#pragma once

#include "command.hpp"
#include "configuration.hpp"
#include "set_error.hpp"

#include <restkv/verify/output_error.hpp>

#include <algorithm>

namespace restkv::cli {

/// On the last `queries` queries. Throws input_error, beginning with `where`.
template <tensor_backend Backend>
[[nodiscard]] window_errors errors_on(Backend& backend, const selection& chosen, const layer_view<float>& layer,
                                      index_t queries, const std::string& where) {
  output_errors errors;
  require(output_error(backend, chosen.kept(), layer, errors, queries), where);
  const auto flat = [](const double* first, index_t count) { return std::vector<double>(first, first + count); };
  window_errors made{errors.query_heads(), queries, {}, {}, {}};
  const index_t count = made.heads * queries;
  made.value_error = flat(errors.head().data, count);
  made.output_error_layer = flat(errors.layer().data, queries);
  if (errors.head_projected().data != nullptr) made.output_error_per_head = flat(errors.head_projected().data, count);
  return made;
}

/// Queries of the window that a layer has.
[[nodiscard]] inline index_t window_of(const layer_view<float>& layer, const configuration& c) {
  return std::min({c.window, layer.query.extent(2), layer.key.extent(2)});
}

/// On every query of the window. Throws input_error where there is none.
template <tensor_backend Backend>
[[nodiscard]] window_errors errors_on_window(Backend& backend, const selection& chosen, const layer_view<float>& layer,
                                             const configuration& c, const std::string& where) {
  const index_t queries = window_of(layer, c);
  if (queries == 0) throw input_error(where + ": there are no queries to measure the error with");
  return errors_on(backend, chosen, layer, queries, where);
}

}  // namespace restkv::cli
