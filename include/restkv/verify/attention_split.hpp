// SPDX-License-Identifier: Apache-2.0
/// @file
/// The attention of a query split by what a kept set does to it: shares of the kept tokens, of the evicted token with
/// the largest logit and of the other evicted ones, none of them by subtraction. On the CPU and on devices.
#pragma once

#include <restkv/core/config.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv::detail {

/// The logit of a product of a query and a key, `root` being sqrt(head_dim). As in the reference, one that is not a
/// number counts as the lowest.
[[nodiscard]] RESTKV_HD inline double verified_logit(double product, double root) noexcept {
  constexpr double most = std::numeric_limits<double>::max();
  return product != product ? -most : std::clamp(product / root, -most, most);
}

/// sum_n e^(s_n - largest) over some tokens; sum is 0 where there are none. Two masses are compared without ever
/// leaving the range of double, however far their logits lie apart.
struct attention_mass {
  double largest = -std::numeric_limits<double>::infinity();
  double sum = 0;
};

[[nodiscard]] RESTKV_HD inline attention_mass join(const attention_mass& a, const attention_mass& b) noexcept {
  if (a.sum == 0) return b;
  if (b.sum == 0) return a;
  const double largest = std::max(a.largest, b.largest);
  return {largest, a.sum * std::exp(a.largest - largest) + b.sum * std::exp(b.largest - largest)};
}

/// a / (a + b): the attention of the tokens of `a` among those of both. 0 where `a` has none.
[[nodiscard]] RESTKV_HD inline double share(const attention_mass& a, const attention_mass& b) noexcept {
  if (a.sum == 0) return 0;
  return a.sum * std::exp(a.largest - join(a, b).largest) / join(a, b).sum;
}

/// The masses of one query.
struct split_masses {
  attention_mass kept;
  attention_mass top;     ///< the evicted token with the largest logit, the first of equals
  attention_mass others;  ///< the rest of the evicted ones
};

/// What follows from them. Every share is a mass over a sum of masses, so that neither one near 0 nor one near 1 loses
/// digits.
struct split_shares {
  double evicted = 0;            ///< A_E
  double kept = 0;               ///< 1 - A_E
  double top_of_evicted = 0;     ///< of A_E
  double others_of_evicted = 0;  ///< of A_E
  double kept_of_rest = 0;       ///< of all but the top evicted token
  double others_of_rest = 0;     ///< of all but the top evicted token
  double top = 0;                ///< the top evicted token's, of all
  double other_scale = 0;        ///< attention of an other evicted token, per unit of e^(s - others.largest)

  RESTKV_HD explicit split_shares(const split_masses& m) noexcept
      : evicted(share(join(m.top, m.others), m.kept)),
        kept(share(m.kept, join(m.top, m.others))),
        top_of_evicted(share(m.top, m.others)),
        others_of_evicted(share(m.others, m.top)),
        kept_of_rest(share(m.kept, m.others)),
        others_of_rest(share(m.others, m.kept)),
        top(share(m.top, join(m.kept, m.others))),
        other_scale(share(m.others, join(m.kept, m.top)) / std::max(m.others.sum, 1.0)) {}

  /// One channel of a query's outputs.
  struct channel {
    double change = 0;          ///< of o' - o = A_E (o' - m)
    double output = 0;          ///< of o
    double top_difference = 0;  ///< of o without the top evicted token, less its value: a_T of it is what it costs
  };

  /// From the output of the kept tokens' own softmax, the top evicted token's value and the output of the others' own
  /// softmax; 0 where there are none.
  [[nodiscard]] RESTKV_HD channel of(double kept_output, double top_value, double others_output) const noexcept {
    const double mean = top_of_evicted * top_value + others_of_evicted * others_output;
    return {evicted * (kept_output - mean), kept * kept_output + evicted * mean,
            kept_of_rest * kept_output + others_of_rest * others_output - top_value};
  }
};

}  // namespace restkv::detail
