// SPDX-License-Identifier: Apache-2.0
/// @file
/// Which element types a backend or a kernel is compared on.
#pragma once

#include <restkv/backend/backend.hpp>

#include <array>
#include <concepts>
#include <type_traits>

namespace restkv::parity {

namespace detail {

/// True for a type that is named, or where none is.
template <class T, class... Elements>
inline constexpr bool is_wanted = sizeof...(Elements) == 0 || (std::is_same_v<T, Elements> || ...);

/// Which element types `Mine` is compared on: those that are wanted, all of a backend's, or those of a callable that takes
/// `Calls::call<T>`.
template <class Mine, class Calls, class... Elements>
struct takes_elements {
  /// A callable is not even asked about types that are not wanted: its body may not compile with them.
  template <class T>
  [[nodiscard]] static constexpr bool takes() {
    if constexpr (!is_wanted<T, Elements...>) {
      return false;
    } else if constexpr (tensor_backend<std::remove_cvref_t<Mine>>) {
      return true;
    } else {
      return std::invocable<Mine&, const typename Calls::template call<T>&>;
    }
  }
  template <class T>
  using of = std::bool_constant<takes<T>()>;

  /// By element_type.
  static constexpr std::array<bool, 3> types{takes<float>(), takes<half>(), takes<bfloat16>()};
  static constexpr bool any = types[0] || types[1] || types[2];
};

}  // namespace detail

}  // namespace restkv::parity
