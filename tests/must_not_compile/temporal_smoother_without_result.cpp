// SPDX-License-Identifier: Apache-2.0
// expect: a temporal smoother needs [\s\S]*reduces_rows<[\s\S]*smoother\(rows\)
// A temporal smoother must return the reduced value, and be const.
#include <restkv/policy.hpp>

struct newest {
  template <std::floating_point Real>
#ifdef RESTKV_CONTROL
  Real operator()(std::span<const Real> rows) const {
    return rows.back();
  }
#else
  void operator()(std::span<const Real> rows) {
    static_cast<void>(rows);
  }
#endif
};

auto policy = restkv::eviction_policy{.temporal = newest{}};
