// SPDX-License-Identifier: Apache-2.0
/// @file
/// A `device_library` as a module of Python: its attribute `library` is what `_restkv._use_devices` takes.
#pragma once

#include "device_library.hpp"

#include <Python.h>

namespace restkv::python {

/// What the module's init function returns. `definition` and `library` live as long as the process.
[[nodiscard]] inline PyObject* make_device_module(PyModuleDef& definition, device_library& library) {
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* const capsule = PyCapsule_New(&library, device_library_capsule, nullptr);
  if (capsule == nullptr || PyModule_AddObject(module, "library", capsule) < 0) {
    Py_XDECREF(capsule);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}

}  // namespace restkv::python
