// SPDX-License-Identifier: Apache-2.0
/// @file
/// The extension module `_restkv_host_kernels`: for tests, never installed.
#include "host_kernels.hpp"
#include "device_library_of.hpp"
#include "device_module.hpp"

PyMODINIT_FUNC PyInit__restkv_host_kernels() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_restkv_host_kernels",
                                   "A GPU's kernels on the CPU.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  static restkv::python::device_library_of<restkv::python::host_kernel_device> library;
  return restkv::python::make_device_module(definition, library);
}
