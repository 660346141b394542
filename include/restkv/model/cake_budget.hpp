// SPDX-License-Identifier: Apache-2.0
/// @file
/// `cake_budget`: layers by how spread and how restless their attention is.
#pragma once

#include <restkv/model/model_budget.hpp>

namespace restkv {

/// Layers by how spread and how restless their attention is (CAKE, arXiv 2503.12491): the share of a layer is
/// proportional to
///
///     entropy^(1 / entropy_temperature) * variance^(1 / variance_temperature)
///
/// with the summary's attention_entropy and attention_variance; every head of a layer keeps as many. Published
/// temperatures (entropy, variance): Llama 3.1 (1.6, 0.4) for 1024 tokens, (1.6, 0.6) for 128; Mistral 0.3 (0.8, 0.5)
/// and (1, 0.8); Qwen 2.5 (1.5, 0.6) and (0.4, 0.6); else (1, 1). The published policy: `snap_kv` with `mean_variance`
/// over 32 queries, the group's mean, `average_pool` of 5. The released code cuts shares off and hands the rest out
/// evenly; here they are apportioned, so that the total is exact and a layer's share never rises while layers come in.
struct cake_budget {
  budget_size budget{};               ///< mean over all layers and heads
  index_t least = 0;                  ///< candidates that every head keeps
  float entropy_temperature = 1.0f;   ///< > 0
  float variance_temperature = 1.0f;  ///< > 0

  ///@{
  /// See `model_budget`.
  static constexpr bool compares_heads = false;
  static constexpr bool needs_attention = true;

  [[nodiscard]] RESTKV_HD double preference(const layer_summary& summary) const noexcept {
    return std::pow(summary.attention_entropy, 1.0 / static_cast<double>(entropy_temperature)) *
           std::pow(summary.attention_variance, 1.0 / static_cast<double>(variance_temperature));
  }
  ///@}
  /// Fails on a temperature that is not above 0 and on a bad budget.
  [[nodiscard]] status check() const noexcept {
    for (const float temperature : {entropy_temperature, variance_temperature}) {
      if (temperature > 0.0f && std::isfinite(temperature)) continue;
      return status::error(errc::invalid_argument, "cake_budget has a temperature of %g, must be above 0",
                           double{temperature});
    }
    return detail::check_model_size("cake_budget", budget, least);
  }
};

static_assert(model_budget<cake_budget>);

}  // namespace restkv
