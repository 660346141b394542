// SPDX-License-Identifier: Apache-2.0
#include "set_error.hpp"

#include "command.hpp"
#include "errors_on.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/verify/output_error.hpp>

#include <algorithm>

namespace restkv::cli {

std::optional<relative_error> window_error(const selection& chosen, const layer_view<float>& layer,
                                           const configuration& c, int threads) {
  const index_t queries = window_of(layer, c);
  if (queries == 0 || layer.query.data == nullptr) return std::nullopt;
  eigen_backend backend(threads);
  output_errors errors;
  if (!output_error(backend, chosen.kept(), layer, errors, queries).ok()) return std::nullopt;
  return relative_error{errors.mean_relative(), errors.worst_relative()};
}

selection given_selection(const layer_file& file, const configuration& c) {
  const std::vector<std::int32_t> keep =
      file.whole_numbers(file.has("keep") ? "keep" : "expected.keep", file.query_heads(), file.tokens());
  selection given;
  given.heads = file.query_heads();
  given.past = std::max<index_t>(0, file.tokens() - c.window);
  given.positions.resize(keep.size());
  for (index_t h = 0; h < given.heads; ++h) {
    position_t* const row = given.positions.data() + h * file.tokens();
    index_t count = 0;
    for (index_t n = 0; n < file.tokens(); ++n) {
      if (keep[static_cast<std::size_t>(h * file.tokens() + n)] != 0) row[count++] = static_cast<position_t>(n);
    }
    given.lengths.push_back(static_cast<position_t>(count));
  }
  return given;
}

window_errors errors_of(const selection& chosen, const layer_view<float>& layer, const configuration& c,
                        backend_kind backend, int threads, const std::string& where) {
  if (backend == backend_kind::eigen) {
    eigen_backend eigen(threads);
    return errors_on_window(eigen, chosen, layer, c, where);
  }
  reference_backend reference;
  return errors_on_window(reference, chosen, layer, c, where);
}

void add_error_tensors(safetensors_writer& out, const selection& chosen, const layer_view<float>& layer,
                       const configuration& c, int threads, const std::string& where) {
  const window_errors errors = errors_of(chosen, layer, c, backend_kind::eigen, threads, where);
  const auto narrowed = [](const std::vector<double>& values) {
    return std::vector<float>(values.begin(), values.end());
  };
  const auto add_rows = [&](const char* name, const std::vector<double>& values) {
    const std::vector<float> elements = narrowed(values);
    if (!elements.empty()) {
      out.add(name, tensor_view<const float, 2>(elements.data(), {errors.heads, errors.queries}));
    }
  };
  add_rows("value_error", errors.value_error);
  add_rows("output_error_per_head", errors.output_error_per_head);
  const std::vector<float> layer_errors = narrowed(errors.output_error_layer);
  out.add("output_error_layer", tensor_view<const float, 1>(layer_errors.data(), {errors.queries}));
  out.add("head_lengths", tensor_view<const position_t, 1>(chosen.lengths.data(), {chosen.heads}));
}

}  // namespace restkv::cli
