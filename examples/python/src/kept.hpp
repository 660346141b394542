// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv.Kept`: a kept set that Python owns.
#pragma once

#include "arrays.hpp"

#include <restkv/selection/kept_tokens.hpp>

#include <vector>

namespace restkv::python {

/// The outcome of a selection.
struct kept_set {
  index_t batch = 0;
  index_t heads = 0;
  index_t capacity = 0;
  std::vector<position_t> positions;  ///< [batch, heads, capacity], -1 behind a head's own
  std::vector<position_t> lengths;    ///< [batch, heads]
  framework from = framework::numpy;

  [[nodiscard]] const_kept_tokens view() const noexcept {
    return {{positions.data(), {batch, heads, capacity}}, {lengths.data(), {batch, heads}}};
  }
};

/// A copy with no more room than the longest head needs.
[[nodiscard]] kept_set trimmed(const const_kept_tokens& kept, framework from);

void add_kept(nb::module_& m);

}  // namespace restkv::python
