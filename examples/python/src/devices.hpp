// SPDX-License-Identifier: Apache-2.0
/// @file
/// Arrays in the memory of devices: the library that computes there, and what frameworks do with such arrays.
#pragma once

#include "arrays.hpp"
#include "device/device_library.hpp"

#include <vector>

namespace restkv::python {

/// The library for a kind of device, by DLPack's number; null where there is none.
[[nodiscard]] device_library* library_of(int device_type) noexcept;

/// DLPack's number of the host's memory.
inline constexpr int host_device = nb::device::cpu::value;

/// Where arrays lie, and whose they are.
struct array_place {
  framework from = framework::numpy;
  int device_type = host_device;
  int device = 0;

  explicit array_place(const array& of) : from(of.from), device_type(of.device_type), device(of.device) {}
  [[nodiscard]] bool operator==(const array_place&) const = default;
  [[nodiscard]] device_library* library() const noexcept { return library_of(device_type); }
  [[nodiscard]] std::string text() const;
};

///@{
/// Arrays at a place, by its framework: PyTorch, CuPy or NumPy. Throws `failure` for others. In the order of the
/// caller's stream, as the framework has it.
[[nodiscard]] nb::object empty_array(const array_place& place, const std::vector<index_t>& extents, nb::handle dtype);
[[nodiscard]] nb::object dtype_named(const array_place& place, const char* name);
/// The same elements at a place, of another type where one is given.
[[nodiscard]] nb::object moved_to(const array_place& place, nb::handle from, nb::handle dtype = nb::none());
/// A host array with the same elements: this waits for them.
[[nodiscard]] nb::object on_host(const array_place& place, nb::handle from);
/// Where the elements begin, of arrays that these functions made.
[[nodiscard]] void* address_of(const array_place& place, nb::handle from);
///@}

/// The caller's stream on a device, as its framework has it.
[[nodiscard]] device_call call_at(const array_place& place);

[[nodiscard]] device_tensor tensor_of(const array& from);

/// Memory of one call, from the framework of its arrays. To be made and destroyed with the interpreter's lock; the
/// calls take it.
class call_memory final : public device_memory {
 public:
  explicit call_memory(const array_place& place) : place_(place) {}
  [[nodiscard]] void* scratch(std::size_t bytes) override;
  [[nodiscard]] device_kept kept(index_t batch, index_t heads, index_t room) override;
  [[nodiscard]] double* tables(index_t elements) override;

  ///@{
  /// What was asked for.
  nb::object positions;
  nb::object lengths;
  device_kept set;
  nb::object figures;
  ///@}

 private:
  array_place place_;
  std::vector<nb::object> scratch_;
};

void add_devices(nb::module_& m);

}  // namespace restkv::python
