// SPDX-License-Identifier: Apache-2.0
/// @file
/// How errors pass through what is done to attention: a score of features, a temporal smoother, a pool over neighbours.
#pragma once

#include <restkv/smoothing/temporal.hpp>
#include <restkv/verify/parity/rounding.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

namespace restkv::parity::detail {

/// The error of a score whose features lie within `error` of `f`: the sum over the features of how far the score moves
/// when that one moves, and no less than how far it moves when all of them do; 16 roundings of the score's own; what
/// underflows.
template <class Score>
[[nodiscard]] double propagate(const Score& score, const token_features<double>& f, const token_features<double>& error,
                               const arithmetic& unit) {
  using features = token_features<double>;
  constexpr double features::*members[] = {&features::attention,
                                           &features::odds,
                                           &features::distance,
                                           &features::output_norm,
                                           &features::value_norm,
                                           &features::key_norm,
                                           &features::logit,
                                           &features::alignment,
                                           &features::value_norm_l1,
                                           &features::mean_distance,
                                           &features::projected_norm_l1};
  const auto base = static_cast<double>(score(f));
  double sum = 0;
  features all_up = f;
  features all_down = f;
  const auto change = [&](const features& moved) { return std::fabs(static_cast<double>(score(moved)) - base); };
  for (const auto member : members) {
    if (error.*member == 0) continue;
    if (!(error.*member <= std::numeric_limits<double>::max())) return std::numeric_limits<double>::infinity();
    const bool has_sign = member == &features::logit || member == &features::alignment;
    features moved = f;
    moved.*member = all_up.*member = f.*member + error.*member;
    const double up = change(moved);
    moved.*member = all_down.*member = has_sign ? f.*member - error.*member : std::max(0.0, f.*member - error.*member);
    sum += std::max(up, change(moved));
  }
  return std::max({sum, change(all_up), change(all_down)}) + 16 * unit.unit * std::fabs(base) + unit.least;
}

/// The error of a temporal smoother's value. A weighted sum: sum w_i e_i + gamma(w + 4) sum w_i |x_i|. One that never
/// falls when a row grows: how far it moves when all rows move up or down, or by their errors alone. Any other: twice
/// the sum of how far it moves when one row does.
template <class Temporal>
[[nodiscard]] double reduced_error(const Temporal& temporal, std::span<const double> rows,
                                   std::span<const double> errors, const arithmetic& unit) {
  const auto count = static_cast<int>(rows.size());
  const double own = unit.gamma(count + 4);
  if constexpr (linear_temporal_smoother<Temporal>) {
    if (is_linear(temporal)) {
      double sum = 0;
      for (int i = 0; i < count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        sum += std::fabs(temporal.weight(i, count)) * (errors[at] + own * std::fabs(rows[at]));
      }
      return sum;
    }
  }
  const auto value = static_cast<double>(temporal(rows));
  std::vector<double> moved(rows.begin(), rows.end());
  const auto change = [&] { return std::fabs(static_cast<double>(temporal(std::span<const double>(moved))) - value); };
  double up = 0, down = 0;
  for (std::size_t i = 0; i < moved.size(); ++i) moved[i] = rows[i] + errors[i];
  up = change();
  for (std::size_t i = 0; i < moved.size(); ++i) moved[i] = rows[i] - errors[i];
  down = change();
  double sum = 0;
  if constexpr (monotone_temporal_smoother<Temporal>) {
    sum = static_cast<double>(temporal(errors));
  } else {
    std::copy(rows.begin(), rows.end(), moved.begin());
    for (std::size_t i = 0; i < moved.size(); ++i) {
      moved[i] = rows[i] + errors[i];
      const double forward = change();
      moved[i] = rows[i] - errors[i];
      sum += 2 * std::max(forward, change());
      moved[i] = rows[i];
    }
  }
  return std::max({up, down, sum}) + own * std::fabs(value);
}

/// Averages shares over `width` neighbours of the past and scales them back to their sum, as the reference does, and
/// carries their errors along.
inline void pool_shares(bounded_attention& attention, int width, index_t past, const arithmetic& unit) {
  if (width <= 1) return;
  std::vector<double> pooled(static_cast<std::size_t>(past));
  std::vector<double> errors(pooled.size());
  double before = 0, after = 0, before_error = 0, after_error = 0;
  for (index_t n = 0; n < past; ++n) {
    const auto at = static_cast<std::size_t>(n);
    for (index_t m = std::max<index_t>(0, n - width / 2); m <= std::min(past - 1, n + width / 2); ++m) {
      pooled[at] += attention.row.share[static_cast<std::size_t>(m)] / width;
      errors[at] += attention.share_error[static_cast<std::size_t>(m)] / width;
    }
    before += attention.row.share[at];
    before_error += attention.share_error[at];
    after += pooled[at];
    after_error += errors[at];
  }
  const double scale = after > 0 ? before / after : 0.0;
  const double relative = after > 0 ? before_error / before + after_error / after : 0.0;
  for (index_t n = 0; n < past; ++n) {
    const auto at = static_cast<std::size_t>(n);
    attention.row.share[at] = pooled[at] * scale;
    attention.share_error[at] =
        errors[at] * scale + pooled[at] * scale * (relative + unit.gamma(2 * past + width + 4)) + unit.least;
  }
}

}  // namespace restkv::parity::detail
