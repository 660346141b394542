// SPDX-License-Identifier: Apache-2.0
#include "run_policy.hpp"

#include <restkv/backend/eigen/backend.hpp>

namespace restkv::cli {

selection run_eigen(const configuration& c, const layer_view<float>& layer, int threads, const std::string& where,
                    inspection what) {
  eigen_backend backend(threads);
  return run_policy(backend, c, layer, where, what);
}

}  // namespace restkv::cli
