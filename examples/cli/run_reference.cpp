// SPDX-License-Identifier: Apache-2.0
#include "run_reference.hpp"

#include <nlohmann/json.hpp>

#include <cmath>

namespace restkv::cli {

namespace {

/// The keys that token scores depend on. Smoothing over tokens and budgets come later.
std::string scoring_part(const configuration& c) {
  nlohmann::json keys = to_json(c);
  // The ladder is cut for its budget, and a standardised leverage for heads that compete.
  const bool all = c.method == method_kind::lacache || c.method == method_kind::leverage;
  for (const char* key : {"spatial", "kernel", "scale", "shift_rule", "share", "budget", "compression_ratio", "allocation",
                          "floor", "normalize", "beta", "layer_count", "n_sink", "recent"}) {
    if (!all && (c.observes() || std::string_view(key) != "n_sink")) keys.erase(key);
  }
  return keys.dump();
}

/// rest_kv times what its rounding depends on.
struct rounding_score : rest_kv {
  double unit = 0;  ///< relative error of a

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const token_features<Real>& token) const noexcept {
    return rest_kv::operator()(token) * static_cast<Real>(unit) * (1 + token.odds);
  }
};

}  // namespace

selection run_reference(const configuration& c, const layer_view<float>& layer, score_memory& memory,
                        const std::string& where) {
  remembering_reference backend(memory[scoring_part(c)]);
  return policy_runner<remembering_reference>(backend, c, layer, where, inspection::scores).run();
}

selection rounding_of_release(const configuration& c, const layer_view<float>& layer, const std::string& where) {
  const double unit = 0x1p-24 * std::sqrt(static_cast<double>(layer.key.extent(2)));
  std::vector<std::vector<double>> scores;
  remembering_reference backend(scores);
  return policy_runner<remembering_reference>(backend, c, layer, where, inspection::scores)
      .run_score(rounding_score{rest_kv_of(c), unit});
}

}  // namespace restkv::cli
