// SPDX-License-Identifier: Apache-2.0
// Compiled where the build is asked for CUDA: it defines RESTKV_CLI_CUDA.
#include "command.hpp"
#include "device_selection.hpp"
#include "verify_random.hpp"

#include <string>

namespace restkv::cli {

namespace {

template <device_library Library>
std::vector<random_outcome> random_on_device(const std::string& name, const parity::options& how) {
  const status found = find_device();
  if (!found.ok()) throw input_error("--backend " + name + ": " + found.message());
  device_selector<Library> backend;
  return random_on(backend, how);
}

}  // namespace

std::vector<random_outcome> random_on_cuda(const parity::options& how, int) {
  return random_on_device<device_library::own>("cuda", how);
}

std::vector<random_outcome> random_on_thrust_cuda(const parity::options& how, int) {
  return random_on_device<device_library::thrust>("thrust-cuda", how);
}

}  // namespace restkv::cli
