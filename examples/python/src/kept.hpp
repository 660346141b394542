// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv.Kept`: a kept set that Python owns.
#pragma once

#include "devices.hpp"

#include <restkv/selection/kept_tokens.hpp>

#include <optional>
#include <vector>

namespace restkv::python {

/// A kept set in a device's memory, as arrays of the framework whose arrays were selected from.
struct kept_on_device {
  array_place place;
  nb::object positions;  ///< [batch, heads, room]
  nb::object lengths;    ///< [batch, heads]
  device_kept set;
  index_t tokens = 0;  ///< no position is beyond
};

/// The outcome of a selection. Where it lies on a device, the host's members are filled when somebody asks for them:
/// `fetch_lengths` and `fetch` wait for the device. To be copied with the interpreter's lock.
struct kept_set {
  index_t batch = 0;
  index_t heads = 0;
  index_t capacity = 0;
  std::vector<position_t> positions;  ///< [batch, heads, capacity], -1 behind a head's own
  std::vector<position_t> lengths;    ///< [batch, heads]
  framework from = framework::numpy;
  std::optional<kept_on_device> device;
  bool has_lengths = true;    ///< and the capacity
  bool has_positions = true;

  ///@{
  /// Fills in what is not there yet. With the interpreter's lock.
  void fetch_lengths();
  void fetch();
  ///@}
  /// Of what was fetched.
  [[nodiscard]] const_kept_tokens view() const noexcept {
    return {{positions.data(), {batch, heads, capacity}}, {lengths.data(), {batch, heads}}};
  }
};

/// A copy with no more room than the longest head needs.
[[nodiscard]] kept_set trimmed(const const_kept_tokens& kept, framework from);

/// What a device's selection left behind.
[[nodiscard]] kept_set kept_of(const call_memory& memory, const array_place& place, index_t tokens);

/// A set at a place, for a cache of `tokens` tokens: as it lies there, or copied and looked at. Its capacity is that of
/// the longest head. Throws `failure` where a position may be no token of the cache.
[[nodiscard]] kept_on_device set_at(kept_set& kept, const array_place& place, index_t tokens);

void add_kept(nb::module_& m);

}  // namespace restkv::python
