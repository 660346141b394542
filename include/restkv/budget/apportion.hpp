// SPDX-License-Identifier: Apache-2.0
/// @file
/// `apportion`: whole numbers in proportion to weights, which never rise when others join.
#pragma once

#include <restkv/core/config.hpp>

#include <algorithm>
#include <cmath>
#include <span>

namespace restkv {

namespace detail {

/// `apportion` among the shares with a positive weight(i), whose ceilings add up to `total` at least.
template <class Weight>
RESTKV_HD void apportion_positive(const Weight& weight, std::span<const index_t> ceilings, index_t total,
                        std::span<index_t> counts) noexcept {
  const std::size_t size = counts.size();
  const auto clipped = [&](std::size_t i, double scale) {
    return std::min(weight(i) * scale, static_cast<double>(ceilings[i]));
  };
  // The scale at which the shares, cut at their ceilings, add up to the total.
  double scale = 0;
  for (std::size_t full_before = size + 1, full = 0; full != full_before;) {
    full_before = full;
    double left = static_cast<double>(total);
    double weights = 0;
    for (std::size_t i = 0; i < size; ++i) {
      if (weight(i) <= 0) continue;
      if (full > 0 && weight(i) * scale >= static_cast<double>(ceilings[i])) {
        left -= static_cast<double>(ceilings[i]);
      } else {
        weights += weight(i);
      }
    }
    if (weights <= 0) break;
    scale = std::max(scale, left / weights);
    full = 0;
    for (std::size_t i = 0; i < size; ++i) {
      full += weight(i) > 0 && weight(i) * scale >= static_cast<double>(ceilings[i]) ? 1 : 0;
    }
  }
  index_t given = 0;
  for (std::size_t i = 0; i < size; ++i) {
    if (weight(i) <= 0) continue;
    // A little less, so that shares whose quotients tie are rounded alike: the ties are decided below.
    counts[i] = std::min(ceilings[i], static_cast<index_t>(std::floor(clipped(i, scale * (1 - 1e-9)) + 0.5)));
    given += counts[i];
  }
  // Seats of a divisor method: the next goes to the largest weight / (count + 1/2), the last came from the smallest
  // weight / (count - 1/2).
  while (given != total) {
    std::size_t best = size;
    double best_quotient = 0;
    for (std::size_t i = 0; i < size; ++i) {
      if (weight(i) <= 0 || (given < total ? counts[i] >= ceilings[i] : counts[i] <= 0)) continue;
      const double quotient = weight(i) / (static_cast<double>(counts[i]) + (given < total ? 0.5 : -0.5));
      if (best == size || (given < total ? quotient > best_quotient : quotient <= best_quotient)) {
        best = i;
        best_quotient = quotient;
      }
    }
    if (best == size) return;
    const index_t step = given < total ? 1 : -1;
    counts[best] += step;
    given += step;
  }
}

}  // namespace detail

/// Divides `total` among shares in proportion to their weights by the divisor method with standard rounding
/// (Sainte-Lague), share i at most ceilings[i]: counts[i] is about weight / x rounded to the nearest number, with one x
/// for all. The counts add up to `total`, or to all ceilings where those are less. Unlike largest remainders it is
/// monotone: when a share joins, or the total falls, no other share rises, so that what was evicted is never wanted
/// back. Ties go to the smaller index. Weights that are 0, negative or not numbers get what is left by the others,
/// evenly; infinite ones count as the largest number. Cost: O(n^2); allocates nothing.
RESTKV_HD inline void apportion(std::span<const double> weights, std::span<const index_t> ceilings, index_t total,
                      std::span<index_t> counts) noexcept {
  double largest = 0;
  for (const double weight : weights) largest = weight > largest ? weight : largest;
  if (!std::isfinite(largest)) largest = 1e300;
  // By a power of two, which keeps ties: sums of weights and quotients stay finite.
  const int exponent = largest > 0 ? std::ilogb(largest) : 0;
  const auto weight = [&](std::size_t i) {
    return weights[i] > 0 ? std::ldexp(std::min(weights[i], largest), -exponent) : 0.0;
  };
  index_t room = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    counts[i] = 0;
    if (weight(i) > 0) room += ceilings[i];
  }
  if (room > total) {
    detail::apportion_positive(weight, ceilings, total, counts);
    return;
  }
  index_t rest = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (weight(i) > 0) {
      counts[i] = ceilings[i];
    } else {
      rest += ceilings[i];
    }
  }
  if (rest == 0) return;
  const auto even = [&](std::size_t i) { return weight(i) > 0 ? 0.0 : 1.0; };
  detail::apportion_positive(even, ceilings, std::min(rest, total - room), counts);
}

}  // namespace restkv
