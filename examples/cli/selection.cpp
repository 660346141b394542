// SPDX-License-Identifier: Apache-2.0
#include "selection.hpp"

#include <restkv/smoothing/adaptive_window.hpp>

#include <algorithm>

namespace restkv::cli {

std::vector<position_t> selection::kept_of(index_t head) const {
  const position_t* const first = kept().positions.data + head * kept().capacity();
  return {first, first + lengths[static_cast<std::size_t>(head)]};
}

std::vector<position_t> selection::kept_past(index_t head) const {
  std::vector<position_t> kept = kept_of(head);
  kept.erase(std::lower_bound(kept.begin(), kept.end(), static_cast<position_t>(past)), kept.end());
  return kept;
}

adaptive_windows::adaptive_windows(const configuration& c, const std::vector<double>& drifts) {
  kernel.resize(drifts.size());
  shift.resize(drifts.size());
  if (c.spatial != spatial_kind::adaptive) return;
  const adaptive_window window{.min_width = c.kernel, .scale = c.scale, .shift_rule = c.shift_rule};
  for (std::size_t row = 0; row < drifts.size(); ++row) {
    kernel[row] = static_cast<std::int32_t>(window.width(drifts[row]));
    shift[row] = static_cast<std::int32_t>(window.shift(drifts[row]));
  }
}

}  // namespace restkv::cli
