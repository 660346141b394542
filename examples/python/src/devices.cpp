// SPDX-License-Identifier: Apache-2.0
#include "devices.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>

namespace restkv::python {

namespace {

constexpr std::size_t most_kinds = 17;  // of devices, by DLPack's numbers

/// Written when modules are imported, with the interpreter's lock.
std::array<device_library*, most_kinds>& libraries() {
  static std::array<device_library*, most_kinds> all{};
  return all;
}

void use_devices(const nb::capsule& library) {
  if (library.name() == nullptr || std::string_view(library.name()) != device_library_capsule) {
    throw failure(errc::unsupported,
                  fmt::format("a library of devices is '{}', this module takes '{}'",
                              library.name() == nullptr ? "" : library.name(), device_library_capsule));
  }
  auto* const given = static_cast<device_library*>(library.data());
  libraries()[static_cast<std::size_t>(given->device_type())] = given;
}

void forget_devices(std::size_t device_type) {
  if (device_type < most_kinds) libraries()[device_type] = nullptr;
}

/// What makes arrays of a framework.
nb::module_ module_of(const array_place& place) {
  switch (place.from) {
    case framework::pytorch: return nb::module_::import_("torch");
    case framework::cupy: return nb::module_::import_("cupy");
    case framework::numpy:
      if (place.device_type == host_device) return nb::module_::import_("numpy");
      break;
    case framework::tensorflow:
    case framework::jax: break;
  }
  throw failure(errc::unsupported, fmt::format("arrays on {} are taken from PyTorch and CuPy alone", place.text()));
}

/// PyTorch's name of a device.
std::string device_of(const array_place& place) {
  return place.device_type == host_device ? "cpu" : fmt::format("cuda:{}", place.device);
}

/// CuPy makes arrays on the current device.
class cupy_device {
 public:
  explicit cupy_device(const array_place& place) {
    if (place.from != framework::cupy) return;
    device_ = module_of(place).attr("cuda").attr("Device")(place.device);
    device_.attr("__enter__")();
  }
  cupy_device(const cupy_device&) = delete;
  cupy_device& operator=(const cupy_device&) = delete;
  ~cupy_device() {
    if (device_.is_valid()) device_.attr("__exit__")(nb::none(), nb::none(), nb::none());
  }

 private:
  nb::object device_;
};

}  // namespace

device_library* library_of(int device_type) noexcept {
  const auto at = static_cast<std::size_t>(device_type);
  return device_type >= 0 && at < most_kinds ? libraries()[at] : nullptr;
}

std::string array_place::text() const {
  return device_type == host_device ? "the CPU" : fmt::format("cuda:{}", device);
}

nb::object empty_array(const array_place& place, const std::vector<index_t>& extents, nb::handle dtype) {
  nb::list shape;
  for (const index_t extent : extents) shape.append(extent);
  const nb::tuple of(shape);
  const nb::module_ arrays = module_of(place);
  if (place.from == framework::pytorch) {
    return arrays.attr("empty")(of, nb::arg("dtype") = dtype, nb::arg("device") = device_of(place));
  }
  const cupy_device current(place);
  return arrays.attr("empty")(of, nb::arg("dtype") = dtype);
}

nb::object dtype_named(const array_place& place, const char* name) {
  const nb::module_ arrays = module_of(place);
  return place.from == framework::pytorch ? nb::object(arrays.attr(name)) : arrays.attr("dtype")(name);
}

nb::object moved_to(const array_place& place, nb::handle from, nb::handle dtype) {
  const nb::module_ arrays = module_of(place);
  if (place.from == framework::pytorch) {
    const nb::object tensor = arrays.attr("as_tensor")(from).attr("detach")();
    return tensor.attr("to")(nb::arg("device") = device_of(place), nb::arg("dtype") = dtype);
  }
  const cupy_device current(place);
  return arrays.attr("asarray")(from, nb::arg("dtype") = dtype);
}

nb::object on_host(const array_place& place, nb::handle from) {
  if (place.device_type == host_device) return nb::borrow(from);
  return place.from == framework::pytorch ? from.attr("detach")().attr("cpu")() : from.attr("get")();
}

void* address_of(const array_place& place, nb::handle from) {
  std::uintptr_t address = 0;
  switch (place.from) {
    case framework::pytorch: address = nb::cast<std::uintptr_t>(from.attr("data_ptr")()); break;
    case framework::cupy: address = nb::cast<std::uintptr_t>(from.attr("data").attr("ptr")); break;
    default: address = nb::cast<std::uintptr_t>(from.attr("ctypes").attr("data")); break;
  }
  return reinterpret_cast<void*>(address);
}

device_call call_at(const array_place& place) {
  device_call call{.device = place.device};
  if (place.device_type == host_device) return call;
  const nb::module_ arrays = module_of(place);
  if (place.from == framework::pytorch) {
    call.stream =
        nb::cast<std::uintptr_t>(arrays.attr("cuda").attr("current_stream")(device_of(place)).attr("cuda_stream"));
  } else {
    const cupy_device current(place);
    call.stream = nb::cast<std::uintptr_t>(arrays.attr("cuda").attr("get_current_stream")().attr("ptr"));
  }
  return call;
}

device_tensor tensor_of(const array& from) {
  device_tensor made{
      .given = !from.missing(), .data = const_cast<void*>(from.data), .type = from.type, .item_bytes = from.item_bytes};
  std::copy_n(from.extents.begin(), std::min<std::size_t>(from.extents.size(), 4), made.extents.begin());
  std::copy_n(from.strides.begin(), std::min<std::size_t>(from.strides.size(), 4), made.strides.begin());
  return made;
}

void* call_memory::scratch(std::size_t bytes) {
  constexpr std::size_t alignment = 256;
  const nb::gil_scoped_acquire locked;
  scratch_.push_back(empty_array(place_, {static_cast<index_t>(bytes + alignment)}, dtype_named(place_, "uint8")));
  const auto address = reinterpret_cast<std::uintptr_t>(address_of(place_, scratch_.back()));
  return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
}

device_kept call_memory::kept(index_t batch, index_t heads, index_t room) {
  const nb::gil_scoped_acquire locked;
  const nb::object dtype = dtype_named(place_, "int32");
  positions = empty_array(place_, {batch, heads, room}, dtype);
  lengths = empty_array(place_, {batch, heads}, dtype);
  set = {.batch = batch,
         .heads = heads,
         .room = room,
         .capacity = room,
         .positions = static_cast<position_t*>(address_of(place_, positions)),
         .lengths = static_cast<position_t*>(address_of(place_, lengths))};
  return set;
}

double* call_memory::tables(index_t elements) {
  const nb::gil_scoped_acquire locked;
  figures = empty_array(place_, {elements}, dtype_named(place_, "float64"));
  return static_cast<double*>(address_of(place_, figures));
}

void add_devices(nb::module_& m) {
  m.def("_use_devices", &use_devices, nb::arg("library"), "Takes a library of devices: `library` of its module.");
  m.def("_forget_devices", &forget_devices, nb::arg("device_type"), "Undoes that, by DLPack's kind of device.");
  m.def(
      "_devices",
      [] {
        nb::list names;
        for (const device_library* const library : libraries()) {
          if (library != nullptr) names.append(library->name());
        }
        return nb::tuple(names);
      },
      nb::sig("def _devices() -> tuple[str, ...]"), "Devices that there are libraries for.");
}

}  // namespace restkv::python
