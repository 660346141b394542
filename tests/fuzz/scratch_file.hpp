// SPDX-License-Identifier: Apache-2.0
// A file with what a fuzzer hands over.
#pragma once

#include "fuzz/byte_source.hpp"

#include <unistd.h>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>

namespace restkv_test {

/// A file that is written again for every input.
class scratch_file {
 public:
  scratch_file() : path_((std::filesystem::temp_directory_path() / "restkv_fuzz_XXXXXX").string()) {
    descriptor_ = mkstemp(path_.data());
    require(descriptor_ >= 0);
  }
  scratch_file(const scratch_file&) = delete;
  scratch_file& operator=(const scratch_file&) = delete;
  ~scratch_file() {
    close(descriptor_);
    std::remove(path_.c_str());
  }

  const std::string& holding(const std::uint8_t* data, std::size_t size) {
    require(ftruncate(descriptor_, 0) == 0);
    require(pwrite(descriptor_, data, size, 0) == static_cast<ssize_t>(size));
    return path_;
  }

 private:
  std::string path_;
  int descriptor_ = -1;
};

}  // namespace restkv_test
