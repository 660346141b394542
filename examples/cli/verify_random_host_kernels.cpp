// SPDX-License-Identifier: Apache-2.0
// Compiled in builds with tests: it defines RESTKV_CLI_HOST_KERNELS.
#include "verify_random.hpp"

#include <restkv/backend/host/backend.hpp>

namespace restkv::cli {

std::vector<random_outcome> random_on_host_kernels(const parity::options& how, int) {
  host_kernel_backend backend(how.seed);
  return random_on(backend, how);
}

}  // namespace restkv::cli
