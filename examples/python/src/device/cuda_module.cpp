// SPDX-License-Identifier: Apache-2.0
/// @file
/// The extension module `restkv._restkv_cuda`, of builds with -Dcuda=enabled.
#include "cuda_library.hpp"
#include "device_module.hpp"

PyMODINIT_FUNC PyInit__restkv_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_restkv_cuda",
                                   "restkv's kernels on NVIDIA GPUs.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return restkv::python::make_device_module(definition, restkv::python::cuda_library());
}
