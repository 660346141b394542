// SPDX-License-Identifier: Apache-2.0
#include "arrays.hpp"

#include "devices.hpp"

#include <restkv/core/dtype.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace restkv::python {

namespace {

std::string full_type_name(nb::handle object) {
  return fmt::format("{}.{}", text_of(object.type().attr("__module__")),
                     text_of(object.type().attr("__qualname__")));
}

std::string dtype_name(const nb::dlpack::dtype& dtype) {
  const char* kind = "opaque";
  switch (static_cast<nb::dlpack::dtype_code>(dtype.code)) {
    case nb::dlpack::dtype_code::Int: kind = "int"; break;
    case nb::dlpack::dtype_code::UInt: kind = "uint"; break;
    case nb::dlpack::dtype_code::Float: kind = "float"; break;
    case nb::dlpack::dtype_code::Bfloat: kind = "bfloat"; break;
    case nb::dlpack::dtype_code::Complex: kind = "complex"; break;
    case nb::dlpack::dtype_code::Bool: kind = "bool"; break;
    default: break;
  }
  return fmt::format("{}{}", kind, int{dtype.bits});
}

number number_of(const nb::dlpack::dtype& dtype) {
  if (dtype.lanes != 1) return number::other;
  if (dtype.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16) {
    return number::bfloat16;
  }
  if (dtype.code != static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float)) return number::other;
  switch (dtype.bits) {
    case 16: return number::float16;
    case 32: return number::float32;
    case 64: return number::float64;
    default: return number::other;
  }
}

std::string device_name(int type, int id) {
  switch (type) {
    case nb::device::cuda::value: return fmt::format("cuda:{}", id);
    case nb::device::metal::value: return fmt::format("metal:{}", id);
    case nb::device::rocm::value: return fmt::format("rocm:{}", id);
    default: return fmt::format("a device of DLPack's type {}", type);
  }
}

/// Tensors of PyTorch that DLPack would refuse, with the reason.
nb::object checked_tensor(nb::handle object, const char* name, const array_rules& rules) {
  nb::object tensor = nb::borrow(object);
  if (nb::cast<bool>(tensor.attr("requires_grad"))) {
    if (!rules.detach) {
      throw failure(errc::invalid_argument,
                    fmt::format("{} requires grad: a selection has no gradient. Call it under torch.no_grad(), or with "
                                "{}.detach()",
                                name, name));
    }
    tensor = tensor.attr("detach")();
  }
  const auto device = text_of(tensor.attr("device").attr("type"));
  if (device == "meta") {
    throw failure(errc::invalid_argument, fmt::format("{} is a meta tensor: it has no memory", name));
  }
  const bool known = rules.devices && device == "cuda" && library_of(nb::device::cuda::value) != nullptr;
  if (device != "cpu" && !known) {
    throw failure(errc::unsupported,
                  fmt::format("{} lies on {}: this module computes on the CPU. Call it with {}.cpu()", name,
                              text_of(tensor.attr("device")), name));
  }
  const auto layout = text_of(tensor.attr("layout"));
  if (layout != "torch.strided") {
    throw failure(errc::unsupported, fmt::format("{} has the layout {}, must be torch.strided", name, layout));
  }
  return tensor;
}

/// PyTorch shares a tensor of the current GPU alone.
class device_of_tensor {
 public:
  explicit device_of_tensor(const nb::object& tensor, bool is_pytorch) {
    if (!is_pytorch || text_of(tensor.attr("device").attr("type")) == "cpu") return;
    device_ = nb::module_::import_("torch").attr("cuda").attr("device")(tensor.attr("device"));
    device_.attr("__enter__")();
  }
  device_of_tensor(const device_of_tensor&) = delete;
  device_of_tensor& operator=(const device_of_tensor&) = delete;
  ~device_of_tensor() {
    if (device_.is_valid()) device_.attr("__exit__")(nb::none(), nb::none(), nb::none());
  }

 private:
  nb::object device_;
};

/// Why an object could not be taken by DLPack, as it says itself.
std::string reason(nb::handle object) {
  if (!nb::hasattr(object, "__dlpack__")) return "it has no __dlpack__";
  try {
    [[maybe_unused]] const nb::object capsule = object.attr("__dlpack__")();
  } catch (nb::python_error& e) {
    std::string text = text_of(e.value());
    return text.substr(0, text.find('\n'));
  }
  return "DLPack does not share it";
}

template <class T>
void widen_row(const void* data, index_t offset, index_t stride, index_t count, float* to) {
  const T* const row = static_cast<const T*>(data) + offset;
  if (stride == 1) {
    for (index_t i = 0; i < count; ++i) to[i] = static_cast<float>(row[i]);
  } else {
    for (index_t i = 0; i < count; ++i) to[i] = static_cast<float>(row[i * stride]);
  }
}

}  // namespace

framework framework_of(nb::handle object) {
  for (const nb::handle type : object.type().attr("__mro__")) {
    const auto module_name = text_of(nb::getattr(type, "__module__", nb::str("")));
    const std::string root = module_name.substr(0, module_name.find('.'));
    if (root == "torch") return framework::pytorch;
    if (root == "numpy") return framework::numpy;
    if (root == "jax" || root == "jaxlib") return framework::jax;
    if (root == "tensorflow") return framework::tensorflow;
    if (root == "cupy") return framework::cupy;
  }
  return framework::numpy;
}

index_t array::size() const noexcept {
  index_t n = 1;
  for (const index_t extent : extents) n *= extent;
  return n;
}

void array::keep_last(std::size_t axis, index_t count) noexcept {
  const index_t dropped = extents[axis] - count;
  if (dropped <= 0) return;
  extents[axis] = count;
  if (data != nullptr) data = static_cast<const std::byte*>(data) + dropped * strides[axis] * item_bytes;
}

array take_array(nb::handle object, const char* name, const array_rules& rules) {
  array made;
  made.name = name;
  if (object.is_none()) throw failure(errc::missing_input, fmt::format("{} is None", name));
  made.from = framework_of(object);
  const nb::object source =
      made.from == framework::pytorch ? checked_tensor(object, name, rules) : nb::borrow(object);
  const device_of_tensor current(source, made.from == framework::pytorch);
  bool taken = false;
  if (rules.writable) {
    nb::ndarray<> writable;
    taken = nb::try_cast(source, writable, false);
    if (taken) made.owner = nb::ndarray<nb::ro>(writable);
  } else {
    taken = nb::try_cast(source, made.owner, false);
  }
  if (!taken) {
    nb::ndarray<nb::ro> read_only;
    const bool locked = rules.writable && nb::try_cast(source, read_only, false);
    throw failure(errc::invalid_argument,
                  locked ? fmt::format("{} is read-only, must be writable", name)
                         : fmt::format("{} is a {}, must be an array that DLPack can share: {}", name,
                                       full_type_name(object), reason(source)));
  }
  const nb::ndarray<nb::ro>& owner = made.owner;
  const int device = owner.device_type();
  const bool in_host_memory = device == nb::device::cpu::value || device == nb::device::cuda_host::value;
  if (!in_host_memory && !(rules.devices && library_of(device) != nullptr)) {
    throw failure(errc::unsupported, fmt::format("{} lies on {}: this module computes on the CPU", name,
                                                 device_name(device, owner.device_id())));
  }
  if (owner.ndim() != rules.rank) {
    throw failure(errc::shape_mismatch,
                  fmt::format("{} has {} axes, must have {}: {}", name, owner.ndim(), rules.rank, rules.axes));
  }
  made.object = source;
  made.device_type = in_host_memory ? host_device : device;
  made.device = in_host_memory ? 0 : owner.device_id();
  made.dtype = owner.dtype();
  made.type = number_of(made.dtype);
  if (rules.numbers && made.type == number::other) {
    throw failure(errc::invalid_argument,
                  fmt::format("{} has elements of type {}, must be float32, float16, bfloat16 or float64", name,
                              dtype_name(made.dtype)));
  }
  if (made.dtype.lanes != 1 || made.dtype.bits % 8 != 0) {
    throw failure(errc::unsupported,
                  fmt::format("{} has elements of {} bits and {} lanes: whole bytes and one lane can be copied", name,
                              int{made.dtype.bits}, int{made.dtype.lanes}));
  }
  made.item_bytes = made.dtype.bits / 8;
  made.data = owner.data();
  for (std::size_t axis = 0; axis < rules.rank; ++axis) {
    made.extents.push_back(static_cast<index_t>(owner.shape(axis)));
    made.strides.push_back(owner.stride(axis));
  }
  if (made.size() == 0) made.data = nullptr;
  if (reinterpret_cast<std::uintptr_t>(made.data) % static_cast<std::uintptr_t>(made.item_bytes) != 0) {
    throw failure(errc::unsupported, fmt::format("{} lies at an address that is no multiple of its {} bytes an element",
                                                 name, made.item_bytes));
  }
  return made;
}

std::vector<std::int32_t> take_integers(nb::handle object, const char* name, const array_rules& rules,
                                        std::vector<index_t>& extents) {
  array_rules any = rules;
  any.numbers = false;
  const array from = take_array(object, name, any);
  extents = from.extents;
  const auto code = static_cast<nb::dlpack::dtype_code>(from.dtype.code);
  const bool is_signed = code == nb::dlpack::dtype_code::Int;
  if (!is_signed && code != nb::dlpack::dtype_code::UInt && code != nb::dlpack::dtype_code::Bool) {
    throw failure(errc::invalid_argument, fmt::format("{} has elements of type {}, must be whole numbers", name,
                                                      dtype_name(from.dtype)));
  }
  std::vector<std::int32_t> made(static_cast<std::size_t>(from.size()));
  std::vector<index_t> at(extents.size(), 0);
  for (std::int32_t& to : made) {
    index_t offset = 0;
    for (std::size_t axis = 0; axis < at.size(); ++axis) offset += at[axis] * from.strides[axis];
    const auto read = [&]<class T>(T) -> std::int64_t {
      return static_cast<std::int64_t>(static_cast<const T*>(from.data)[offset]);
    };
    std::int64_t value = 0;
    switch (from.item_bytes) {
      case 1: value = is_signed ? read(std::int8_t{}) : read(std::uint8_t{}); break;
      case 2: value = is_signed ? read(std::int16_t{}) : read(std::uint16_t{}); break;
      case 4: value = is_signed ? read(std::int32_t{}) : read(std::uint32_t{}); break;
      default: value = read(std::int64_t{}); break;
    }
    if (value < std::numeric_limits<std::int32_t>::min() || value > std::numeric_limits<std::int32_t>::max()) {
      throw failure(errc::invalid_argument,
                    fmt::format("{} holds {}, must be within [{}, {}]", name, value,
                                std::numeric_limits<std::int32_t>::min(), std::numeric_limits<std::int32_t>::max()));
    }
    to = static_cast<std::int32_t>(value);
    for (std::size_t axis = at.size(); axis-- > 0;) {
      if (++at[axis] < extents[axis]) break;
      at[axis] = 0;
    }
  }
  return made;
}

void widen_all(eigen_backend& backend, const array& from, float* to) {
  const std::size_t last = from.extents.size() - 1;
  const index_t columns = from.extents[last];
  const index_t rows = columns == 0 ? 0 : from.size() / columns;
  constexpr index_t block = 256;  // rows at a time
  backend.parallel_for((rows + block - 1) / block, [&](index_t part) {
    for (index_t row = part * block; row < std::min(rows, (part + 1) * block); ++row) {
      index_t offset = 0;
      index_t rest = row;
      for (std::size_t axis = last; axis-- > 0;) {
        offset += rest % from.extents[axis] * from.strides[axis];
        rest /= from.extents[axis];
      }
      float* const out = to + row * columns;
      switch (from.type) {
        case number::float16: widen_row<half>(from.data, offset, from.strides[last], columns, out); break;
        case number::bfloat16: widen_row<bfloat16>(from.data, offset, from.strides[last], columns, out); break;
        case number::float64: widen_row<double>(from.data, offset, from.strides[last], columns, out); break;
        default: widen_row<float>(from.data, offset, from.strides[last], columns, out); break;
      }
    }
  });
}

nb::object give_array(framework to, const void* data, const std::vector<std::size_t>& shape, nb::dlpack::dtype dtype,
                      nb::handle owner, const std::vector<std::int64_t>* strides) {
  const nb::ndarray<> made(const_cast<void*>(data), shape.size(), shape.data(), owner,
                           strides == nullptr ? nullptr : strides->data(), dtype, nb::device::cpu::value);
  const auto as = [&]<class Framework>(Framework) {
    return nb::cast(nb::ndarray<Framework>(made), nb::rv_policy::reference);
  };
  switch (to) {
    case framework::pytorch: return as(nb::pytorch{});
    case framework::tensorflow: return as(nb::tensorflow{});
    case framework::jax: return as(nb::jax{});
    case framework::cupy:  // its arrays lie on a GPU
    case framework::numpy: break;
  }
  return as(nb::numpy{});
}

nb::object give_bytes(framework to, std::unique_ptr<std::byte[]> data, const std::vector<std::size_t>& shape,
                      nb::dlpack::dtype dtype) {
  const void* const memory = data.get();
  const nb::capsule owner(data.release(), [](void* p) noexcept { delete[] static_cast<std::byte*>(p); });
  return give_array(to, memory, shape, dtype, owner);
}

}  // namespace restkv::python
