// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a budget across layers knows of a layer's scores, summed in an order that every backend keeps.
#pragma once

#include <restkv/model/model_budget.hpp>
#include <restkv/selection/order_key.hpp>

#include <cmath>

namespace restkv::detail {

/// Numbers of a row that are added one after the other. The sum over rows is that of their tiles' sums, in order: who
/// computes the tiles at the same time gets the same bits.
inline constexpr index_t tile_of_sum = 512;

/// Tiles of a row of `count` numbers.
[[nodiscard]] RESTKV_HD constexpr index_t tiles_of_sum(index_t count) noexcept {
  return (count + tile_of_sum - 1) / tile_of_sum;
}

/// The sum over one tile of a row of `count` numbers: sum = add(sum, n), n ascending.
template <class Add>
[[nodiscard]] RESTKV_HD double sum_of_tile(index_t tile, index_t count, const Add& add) noexcept {
  double sum = 0;
  const index_t end = (tile + 1) * tile_of_sum < count ? (tile + 1) * tile_of_sum : count;
  for (index_t n = tile * tile_of_sum; n < end; ++n) sum = add(sum, n);
  return sum;
}

/// Adds the tiles of a row to `sum`.
template <class Add>
void add_tiles(double& sum, index_t count, const Add& add) noexcept {
  for (index_t tile = 0; tile < tiles_of_sum(count); ++tile) sum += sum_of_tile(tile, count, add);
}

/// Adds the scores of a row's candidates that are above 0.
template <std::floating_point Real>
struct add_scores {
  const order_key_t<Real>* keys;  ///< of the row

  [[nodiscard]] RESTKV_HD double operator()(double sum, index_t n) const noexcept {
    const auto score = static_cast<double>(score_of_key<Real>(keys[n]));  // NaN of a key that is no candidate's
    return score > 0 ? sum + score : sum;
  }
};

/// Adds -p log(p) of a row's candidates, p a score's share of `whole`.
template <std::floating_point Real>
struct add_entropy {
  const order_key_t<Real>* keys;  ///< of the row
  double whole;                   ///< the sum of the layer's scores

  [[nodiscard]] RESTKV_HD double operator()(double sum, index_t n) const noexcept {
    const double share = static_cast<double>(score_of_key<Real>(keys[n])) / whole;
    return share > 0 ? std::fma(-share, std::log(share), sum) : sum;
  }
};

/// True where the shares of a layer's scores say something.
[[nodiscard]] RESTKV_HD inline bool has_entropy(const layer_summary& summary) noexcept {
  return summary.candidates > 1 && summary.score_sum > 0 && std::isfinite(summary.score_sum);
}

/// The entropy of `sum`, relative to that of as many equal scores.
[[nodiscard]] RESTKV_HD inline double relative_entropy(const layer_summary& summary, double sum) noexcept {
  return sum / std::log(static_cast<double>(summary.candidates));
}

/// What the scores of a layer are multiplied by.
template <class Budget>
[[nodiscard]] RESTKV_HD double scale_of([[maybe_unused]] const Budget& budget,
                                        [[maybe_unused]] const layer_summary& summary) noexcept {
  if constexpr (compares_layers<Budget>() && requires { budget.scale(summary); }) return budget.scale(summary);
  return 1.0;
}

/// The key of a score times `scale`; those of NaN and of no candidate as they are.
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD order_key_t<Real> rescaled_key(order_key_t<Real> key, double scale) noexcept {
  if (scale == 1.0 || key <= 1) return key;
  return order_key(static_cast<Real>(static_cast<double>(score_of_key<Real>(key)) * scale));
}

}  // namespace restkv::detail
