// SPDX-License-Identifier: Apache-2.0
// Compiled where the build finds Thrust: it defines RESTKV_CLI_THRUST.
#include "verify_random.hpp"

#include <restkv/backend/thrust/backend.cuh>

namespace restkv::cli {

std::vector<random_outcome> random_on_thrust_cpp(const parity::options& how, int) {
  thrust_backend<thrust_cpp> backend;
  return random_on(backend, how);
}

}  // namespace restkv::cli
