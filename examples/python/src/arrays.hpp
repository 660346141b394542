// SPDX-License-Identifier: Apache-2.0
/// @file
/// Arrays of Python in and out, by DLPack: nothing is copied unless elements are widened.
#pragma once

#include "errors.hpp"
#include "numbers.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/core/tensor_view.hpp>

#include <nanobind/ndarray.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

namespace restkv::python {

/// Whose arrays come out: of the library whose arrays went in, NumPy's where it is not one that is known.
enum class framework { numpy, pytorch, tensorflow, jax, cupy };

[[nodiscard]] framework framework_of(nb::handle object);

/// An array that Python owns. The reference is held, so its memory lives as long as this does; to be destroyed with the
/// interpreter's lock held.
struct array {
  nb::ndarray<nb::ro> owner;
  nb::object object;     ///< what was given, without its gradient
  std::string name;      ///< of the argument
  framework from = framework::numpy;
  int device_type = 0;   ///< DLPack's number of the kind
  int device = 0;        ///< and of the one
  number type = number::other;
  nb::dlpack::dtype dtype{};
  index_t item_bytes = 0;
  const void* data = nullptr;
  std::vector<index_t> extents;
  std::vector<index_t> strides;  ///< in elements

  [[nodiscard]] bool missing() const noexcept { return !owner.is_valid(); }
  [[nodiscard]] index_t size() const noexcept;
  /// What is left of an axis; for views of the newest queries.
  void keep_last(std::size_t axis, index_t count) noexcept;
  /// As elements of a type of the same size.
  template <class T, std::size_t Rank>
  [[nodiscard]] tensor_view<T, Rank> view_as() const {
    tensor_view<T, Rank> made;
    made.data = static_cast<T*>(const_cast<void*>(data));
    for (std::size_t axis = 0; axis < Rank; ++axis) {
      made.extents[axis] = extents[axis];
      made.strides[axis] = strides[axis];
    }
    return made;
  }
};

/// What an argument may be.
struct array_rules {
  std::size_t rank;        ///< number of axes
  const char* axes;        ///< their names, for messages: "[batch, heads, tokens, head_dim]"
  bool detach = false;     ///< a tensor that requires grad is taken as it is: weights
  bool writable = false;
  bool numbers = true;     ///< must be one of `number`
  bool devices = false;    ///< may lie on a device that there is a library for (devices.hpp)
};

/// Takes an argument. Throws what becomes `restkv.Error`: no array, another number of axes, another device, elements
/// that are no floating-point numbers, memory that DLPack cannot share.
[[nodiscard]] array take_array(nb::handle object, const char* name, const array_rules& rules);

/// A small array of whole numbers or truth values, copied. `columns` is 0 for one axis.
[[nodiscard]] std::vector<std::int32_t> take_integers(nb::handle object, const char* name, const array_rules& rules,
                                                      std::vector<index_t>& extents);

/// Writes the elements, dense and row-major.
void widen_all(eigen_backend& backend, const array& from, float* to);

/// Elements as float: those of the array itself where it holds float32, else a copy, widened on the backend's threads
/// (float64 is rounded). Needs no lock of the interpreter.
template <std::size_t Rank>
class float_tensor {
 public:
  void read(eigen_backend& backend, const array& from) {
    if (from.type == number::float32) {
      view_ = from.view_as<const float, Rank>();
      return;
    }
    std::array<index_t, Rank> extents{};
    std::copy(from.extents.begin(), from.extents.end(), extents.begin());
    const index_t size = from.size();
    memory_.reset(new float[static_cast<std::size_t>(size)]);  // not filled with zeros first
    widen_all(backend, from, memory_.get());
    view_ = {memory_.get(), extents};
  }
  [[nodiscard]] const tensor_view<const float, Rank>& view() const noexcept { return view_; }

 private:
  std::unique_ptr<float[]> memory_;
  tensor_view<const float, Rank> view_;
};

/// An array of Python over memory that `owner` keeps alive; dense where no strides are given.
[[nodiscard]] nb::object give_array(framework to, const void* data, const std::vector<std::size_t>& shape,
                                    nb::dlpack::dtype dtype, nb::handle owner,
                                    const std::vector<std::int64_t>* strides = nullptr);

/// An array of Python over memory that it owns from now on.
[[nodiscard]] nb::object give_bytes(framework to, std::unique_ptr<std::byte[]> data,
                                    const std::vector<std::size_t>& shape, nb::dlpack::dtype dtype);

}  // namespace restkv::python
