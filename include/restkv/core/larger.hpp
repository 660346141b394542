// SPDX-License-Identifier: Apache-2.0
/// @file
/// `detail::larger`: a maximum that does not lose a NaN.
#pragma once

#include <restkv/core/config.hpp>

#include <concepts>

namespace restkv::detail {

/// `value` where it is greater than `running`, or NaN; a running NaN stays.
template <std::floating_point Real>
[[nodiscard]] RESTKV_HD constexpr Real larger(Real running, Real value) noexcept {
  return value > running || value != value ? value : running;
}

}  // namespace restkv::detail
