// SPDX-License-Identifier: Apache-2.0
// Random numbers for tests: always from an engine with a fixed seed.
#pragma once

#include <restkv/core/config.hpp>

#include <random>

namespace restkv_test {

using restkv::index_t;

using random_engine = std::mt19937;

/// Uniform in [low, high].
inline index_t pick(random_engine& random, index_t low, index_t high) {
  return std::uniform_int_distribution<index_t>(low, high)(random);
}

inline bool chance(random_engine& random, int percent) { return pick(random, 0, 99) < percent; }

/// Uniform in [low, high).
inline double uniform_real(random_engine& random, double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random);
}

/// Standard normal.
inline double normal(random_engine& random) { return std::normal_distribution<double>()(random); }

}  // namespace restkv_test
