// SPDX-License-Identifier: Apache-2.0
/// @file
/// The output errors of a set, computed on any backend.
#pragma once

#include "command.hpp"
#include "set_error.hpp"

#include <restkv/verify/output_error.hpp>

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

}  // namespace restkv::cli
