// SPDX-License-Identifier: Apache-2.0
// expect: a score needs .*feature needs[\s\S]*satisf.*has_constant_needs[\s\S]*S::needs
// A score must say what it is computed from.
#include <restkv/policy.hpp>

struct half_attention {
#ifdef RESTKV_CONTROL
  static constexpr restkv::feature needs = restkv::feature::attention;
#endif
  template <std::floating_point Real>
  Real operator()(const restkv::token_features<Real>& token) const {
    return token.attention / 2;
  }
};

auto policy = restkv::eviction_policy{.score = half_attention{}};
