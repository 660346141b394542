// SPDX-License-Identifier: Apache-2.0
#include "run_eigen.hpp"

namespace restkv::cli {

selection run_eigen(const configuration& c, const layer_view<float>& layer, int threads, const std::string& where,
                    inspection what) {
  eigen_backend backend(threads);
  return run_eigen(c, layer, backend, where, what);
}

selection run_eigen(const configuration& c, const layer_view<float>& layer, eigen_backend& backend,
                    const std::string& where, inspection what) {
  return policy_runner<eigen_backend>(backend, c, layer, where, what).run();
}

}  // namespace restkv::cli
