// SPDX-License-Identifier: Apache-2.0
// Where the files in tests/data and examples/data lie, and tensors read from them. Needs nlohmann/json.
#pragma once

#include "support/catch.hpp"

#include <restkv/interop/safetensors.hpp>

#include <string>
#include <vector>

namespace restkv_test {

/// "golden/set-error-0.safetensors" and the like.
inline std::string test_data(const std::string& path) { return std::string(RESTKV_TEST_DATA) + "/" + path; }
inline std::string example_data(const std::string& path) { return std::string(RESTKV_EXAMPLE_DATA) + "/" + path; }

inline restkv::safetensors_file open_file(const std::string& path) {
  restkv::safetensors_file file;
  const restkv::status outcome = restkv::safetensors_file::open(path, file);
  INFO(outcome.message());
  REQUIRE(outcome.ok());
  return file;
}

/// A copy of a file's tensor.
template <class T, std::size_t Rank>
struct file_tensor {
  file_tensor(const restkv::safetensors_view& file, const std::string& name) {
    const restkv::status outcome = file.convert(name, storage, view);
    INFO(outcome.message());
    REQUIRE(outcome.ok());
  }
  file_tensor(const file_tensor&) = delete;
  file_tensor& operator=(const file_tensor&) = delete;

  std::vector<T> storage;
  restkv::tensor_view<T, Rank> view;
};

/// A tensor of a file's layer with a batch of 1 in front.
template <class T, std::size_t Rank>
restkv::tensor_view<const T, Rank + 1> batched(const restkv::tensor_view<T, Rank>& view) {
  restkv::tensor_view<const T, Rank + 1> one;
  one.data = view.data;
  one.extents[0] = 1;
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    one.extents[axis + 1] = view.extents[axis];
    one.strides[axis + 1] = view.strides[axis];
  }
  return one;
}

}  // namespace restkv_test
