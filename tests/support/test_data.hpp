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

}  // namespace restkv_test
