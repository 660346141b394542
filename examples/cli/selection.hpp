// SPDX-License-Identifier: Apache-2.0
/// @file
/// Runs a configuration on a layer, with the backend chosen at run time.
#pragma once

#include "configuration.hpp"

#include <restkv/core/layer.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <map>
#include <string>
#include <vector>

namespace restkv::cli {

/// What a selection saw and chose. Rows are query heads where the configuration's group is none, else KV heads.
struct selection {
  index_t heads = 0;
  index_t past = 0;                   ///< tokens before the observed window: those that have scores
  std::vector<double> score;          ///< before spatial smoothing, [heads, past]
  std::vector<double> smoothed;       ///< after it, [heads, past]
  std::vector<double> drift;          ///< [heads]; 0 unless the spatial smoother is adaptive
  std::vector<position_t> positions;  ///< [heads, capacity]
  std::vector<position_t> lengths;    ///< [heads]

  [[nodiscard]] const_kept_tokens kept() const noexcept {
    const index_t capacity = heads == 0 ? 0 : static_cast<index_t>(positions.size()) / heads;
    return {{positions.data(), {1, heads, capacity}}, {lengths.data(), {1, heads}}};
  }
  /// The kept positions of one head that lie before the window, ascending.
  [[nodiscard]] std::vector<position_t> kept_past(index_t head) const;
};

/// The arithmetic that a selection runs on.
enum class backend_kind { eigen, reference };
template <>
struct names<backend_kind> {
  static constexpr std::array values{"eigen", "reference"};
};

/// Scores of the reference by the part of the configuration that they depend on: filled and used by `run_reference`, so
/// that budgets and smoothings can be compared without scoring again.
using score_memory = std::map<std::string, std::vector<double>>;

/// Each throws input_error, beginning with `where`, when the policy cannot be run on the layer.
[[nodiscard]] selection run_eigen(const configuration& c, const layer_view<float>& layer, int threads,
                                  const std::string& where);
[[nodiscard]] selection run_reference(const configuration& c, const layer_view<float>& layer, score_memory& memory,
                                      const std::string& where);

}  // namespace restkv::cli
