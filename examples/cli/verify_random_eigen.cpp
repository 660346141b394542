// SPDX-License-Identifier: Apache-2.0
#include "verify_random.hpp"

#include <restkv/backend/eigen/backend.hpp>

namespace restkv::cli {

std::vector<random_outcome> random_on_eigen(const parity::options& how, int threads) {
  eigen_backend backend(threads);
  return random_on(backend, how);
}

}  // namespace restkv::cli
