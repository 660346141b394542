// SPDX-License-Identifier: Apache-2.0
/// @file
/// The module's functions, one `add_` each.
#pragma once

#include <nanobind/nanobind.h>

namespace restkv::python {

void add_select(nanobind::module_& m);
void add_model_selection(nanobind::module_& m);
void add_compact(nanobind::module_& m);
void add_output_error(nanobind::module_& m);
void add_session(nanobind::module_& m);

}  // namespace restkv::python
