// SPDX-License-Identifier: Apache-2.0
// A selection with everything it saw, copied out of its workspace.
#pragma once

#include <restkv/select.hpp>

#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace restkv_test {

using restkv::index_t;
using restkv::position_t;

template <std::floating_point Real>
struct selection_outcome {
  restkv::status result;
  index_t batch = 0;
  index_t heads = 0;
  index_t tokens = 0;
  std::vector<Real> score;                    ///< [batch, heads, tokens]; NaN where it is not defined
  std::vector<Real> smoothed;                 ///< [batch, heads, tokens]
  std::vector<double> drift;                  ///< [batch, heads]
  std::vector<std::vector<position_t>> kept;  ///< [batch * heads]

  [[nodiscard]] std::span<const Real> scores_of(index_t b, index_t h) const { return row(score, b, h); }
  [[nodiscard]] std::span<const Real> smoothed_of(index_t b, index_t h) const { return row(smoothed, b, h); }
  [[nodiscard]] const std::vector<position_t>& kept_of(index_t b, index_t h) const {
    return kept[static_cast<std::size_t>(b * heads + h)];
  }

 private:
  [[nodiscard]] std::span<const Real> row(const std::vector<Real>& all, index_t b, index_t h) const {
    return std::span(all).subspan(static_cast<std::size_t>((b * heads + h) * tokens), static_cast<std::size_t>(tokens));
  }
};

/// Plans for the layer's own shape and selects. Without details the backend is free to prune.
template <class Backend, class Policy, restkv::element T>
[[nodiscard]] selection_outcome<typename Backend::score_type> select_tokens(Backend& backend, const Policy& policy,
                                                                            const restkv::layer_view<T>& layer,
                                                                            bool with_details = true) {
  using real = typename Backend::score_type;
  selection_outcome<real> outcome;
  restkv::plan<Policy> plan;
  outcome.result = restkv::make_plan(backend, policy, restkv::shape_of(layer), plan);
  if (!outcome.result.ok()) return outcome;
  outcome.batch = plan.shape.batch;
  outcome.heads = plan.heads;
  outcome.tokens = plan.shape.tokens;
  const index_t rows = outcome.batch * outcome.heads;
  outcome.score.assign(static_cast<std::size_t>(rows * outcome.tokens), std::numeric_limits<real>::quiet_NaN());
  outcome.smoothed = outcome.score;
  outcome.drift.assign(static_cast<std::size_t>(rows), 0.0);
  const restkv::selection_details<real> details{
      {outcome.score.data(), {outcome.batch, outcome.heads, outcome.tokens}},
      {outcome.smoothed.data(), {outcome.batch, outcome.heads, outcome.tokens}},
      {outcome.drift.data(), {outcome.batch, outcome.heads}}};
  // Memory that was used before: whoever reads what he did not write shows it.
  std::vector<std::byte> memory(plan.workspace_bytes, std::byte{0xff});
  restkv::kept_tokens kept;
  outcome.result = restkv::select(backend, plan, layer, restkv::workspace(memory.data(), memory.size()), kept,
                                  with_details ? &details : nullptr);
  if (!outcome.result.ok()) return outcome;
  for (index_t b = 0; b < outcome.batch; ++b) {
    for (index_t h = 0; h < outcome.heads; ++h) {
      const position_t* const first = kept.positions.data + kept.positions.offset(b, h, 0);
      outcome.kept.emplace_back(first, first + kept.lengths(b, h));
    }
  }
  return outcome;
}

}  // namespace restkv_test
