// SPDX-License-Identifier: Apache-2.0
/// @file
/// The extension module `restkv._restkv`; the package `restkv` shows what is in it.
#include "backends.hpp"
#include "devices.hpp"
#include "functions.hpp"
#include "kept.hpp"
#include "layer.hpp"
#include "policy.hpp"

#include <restkv/core/config.hpp>

#include <fmt/format.h>

NB_MODULE(_restkv, m) {
  using namespace restkv::python;
  m.attr("__version__") = fmt::format("{}.{}.{}", RESTKV_VERSION_MAJOR, RESTKV_VERSION_MINOR, RESTKV_VERSION_PATCH);
  add_errors(m);
  add_devices(m);
  add_policy(m);
  add_kept(m);
  add_metric(m);
  add_select(m);
  add_model_selection(m);
  add_compact(m);
  add_output_error(m);
  add_session(m);
  m.def("default_threads", &default_threads,
        "Threads of a call that does not say how many: OMP_NUM_THREADS, or the CPUs that this process may run on.");
}
