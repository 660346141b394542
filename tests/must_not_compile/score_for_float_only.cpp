// SPDX-License-Identifier: Apache-2.0
// expect: a score needs [\s\S]*scores_token_features<.*double[\s\S]*score\(features\)
// A score must work in double too, or the reference backend could not check it.
#include <restkv/policy.hpp>

struct half_attention {
  static constexpr restkv::feature needs = restkv::feature::attention;
  float operator()(const restkv::token_features<float>& token) const { return token.attention / 2; }
#ifdef RESTKV_CONTROL
  double operator()(const restkv::token_features<double>& token) const { return token.attention / 2; }
#endif
};

auto policy = restkv::eviction_policy{.score = half_attention{}};
