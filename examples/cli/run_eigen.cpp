// SPDX-License-Identifier: Apache-2.0
#include "run_policy.hpp"

#include <restkv/backend/eigen/backend.hpp>

namespace restkv::cli {

std::vector<position_t> selection::kept_past(index_t head) const {
  const position_t* const first = kept().positions.data + head * kept().capacity();
  const position_t* const last = first + lengths[static_cast<std::size_t>(head)];
  return {first, std::lower_bound(first, last, static_cast<position_t>(past))};
}

selection run_eigen(const configuration& c, const layer_view<float>& layer, int threads, const std::string& where) {
  eigen_backend backend(threads);
  return run_policy(backend, c, layer, where);
}

}  // namespace restkv::cli
