// SPDX-License-Identifier: Apache-2.0
/// @file
/// How the module fails: `restkv.Error`, a ValueError with the text and the code of a status.
#pragma once

#include <restkv/core/status.hpp>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>  // in every source: a type must not be cast in two ways
#include <nanobind/stl/string.h>

#include <string>

namespace restkv::python {

namespace nb = nanobind;

/// What becomes `restkv.Error`.
class failure : public std::runtime_error {
 public:
  failure(errc code, const std::string& text) : std::runtime_error(text), code_(code) {}
  [[nodiscard]] errc code() const noexcept { return code_; }

 private:
  errc code_;
};

/// Throws unless `outcome` is ok.
inline void require(const status& outcome) {
  if (!outcome.ok()) throw failure(outcome.code(), outcome.message());
}

/// str(object), for messages.
[[nodiscard]] std::string text_of(nb::handle object);

/// Adds `Error` to the module, and what turns the library's failures into it.
void add_errors(nb::module_& m);

}  // namespace restkv::python
