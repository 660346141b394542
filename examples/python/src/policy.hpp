// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv.Policy`: a configuration of the program as a value of Python.
#pragma once

#include "errors.hpp"

#include "configuration.hpp"

#include <optional>
#include <string>

namespace restkv::python {

/// Never changed once it is made.
struct policy {
  std::string name;   ///< what it was made from; empty where that was a method or keys alone
  cli::configuration c;
  std::string text;   ///< c as JSON: what makes two policies equal

  /// With the layer's place in the model, where a call says it.
  [[nodiscard]] cli::configuration at_layer(std::optional<index_t> index, std::optional<index_t> count) const;
};

void add_policy(nb::module_& m);

}  // namespace restkv::python
