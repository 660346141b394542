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

namespace restkv {
class eigen_backend;
}

namespace restkv::cli {

/// What a selection saw and chose. Heads are query heads where the configuration's group is none, else KV heads. Files hold
/// one sequence.
struct selection {
  index_t batch = 1;
  index_t heads = 0;
  index_t past = 0;                   ///< tokens before the observed window: those that have scores
  std::vector<double> score;          ///< before spatial smoothing, [batch, heads, past]
  std::vector<double> smoothed;       ///< after it, [batch, heads, past]
  std::vector<double> drift;          ///< [batch, heads]; 0 unless the spatial smoother is adaptive
  std::vector<position_t> positions;  ///< [batch, heads, capacity]
  std::vector<position_t> lengths;    ///< [batch, heads]
  double seconds = 0;                 ///< what `select` took, without planning and memory

  [[nodiscard]] const_kept_tokens kept() const noexcept {
    const index_t rows = batch * heads;
    const index_t capacity = rows == 0 ? 0 : static_cast<index_t>(positions.size()) / rows;
    return {{positions.data(), {batch, heads, capacity}}, {lengths.data(), {batch, heads}}};
  }
  /// The kept positions of one head of the first sequence, ascending.
  [[nodiscard]] std::vector<position_t> kept_of(index_t head) const;
  /// Those that lie before the window.
  [[nodiscard]] std::vector<position_t> kept_past(index_t head) const;
};

/// What the adaptive window made of each row's drift; 0 with another spatial smoother.
struct adaptive_windows {
  std::vector<std::int32_t> kernel;  ///< widths
  std::vector<std::int32_t> shift;

  adaptive_windows(const configuration& c, const std::vector<double>& drifts);
};

/// The arithmetic that a selection runs on.
enum class backend_kind { eigen, reference };
template <>
struct names<backend_kind> {
  static constexpr std::array values{"eigen", "reference"};
};

/// Scores of the reference by the part of the configuration that they depend on: filled and used by `run_reference`, so
/// that budgets and smoothings can be compared without scoring again.
/// Several where a rescorer asks for scores of its own.
using score_memory = std::map<std::string, std::vector<std::vector<double>>>;

/// Whether a selection shows its scores. Without them a backend may leave out what cannot change the kept set, as it
/// does in an engine.
enum class inspection { scores, kept_only };

/// Each throws input_error, beginning with `where`, when the policy cannot be run on the layer.
[[nodiscard]] selection run_eigen(const configuration& c, const layer_view<float>& layer, int threads,
                                  const std::string& where, inspection what = inspection::scores);
[[nodiscard]] selection run_eigen(const configuration& c, const layer_view<float>& layer, eigen_backend& backend,
                                  const std::string& where, inspection what = inspection::scores);
[[nodiscard]] selection run_reference(const configuration& c, const layer_view<float>& layer, score_memory& memory,
                                      const std::string& where);

/// How far scores that were computed in float from a / (1 - a), as the release computes them, may lie from the exact
/// ones. a is a quotient of sums over `tokens` exponentials: its rounding grows as their square root. Near 1 it is all
/// that is left of 1 - a, so that the relative error of a score is 2^-24 sqrt(tokens) (1 + odds). In `score`, and in
/// `smoothed` what spatial smoothing makes of it. For a configuration with `scores_odds()`.
[[nodiscard]] selection rounding_of_release(const configuration& c, const layer_view<float>& layer,
                                            const std::string& where);

}  // namespace restkv::cli
