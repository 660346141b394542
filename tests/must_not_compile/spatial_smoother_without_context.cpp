// SPDX-License-Identifier: Apache-2.0
// expect: a spatial smoother needs [\s\S]*smooths_row<[\s\S]*smoother\(in, out, context\)
// A spatial smoother is called with the row's context, whether it uses it or not.
#include <restkv/policy.hpp>

struct negated {
  template <std::floating_point Real>
#ifdef RESTKV_CONTROL
  void operator()(std::span<const Real> in, std::span<Real> out, const restkv::row_context&) const {
#else
  void operator()(std::span<const Real> in, std::span<Real> out) const {
#endif
    for (std::size_t n = 0; n < in.size(); ++n) out[n] = -in[n];
  }
};

auto policy = restkv::eviction_policy{.spatial = negated{}};
