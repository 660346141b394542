// SPDX-License-Identifier: Apache-2.0
/// @file
/// `exclusive_use`: one thread at a time changes an object.
#pragma once

#include "errors.hpp"

#include <fmt/format.h>

#include <atomic>

namespace restkv::python {

/// Held while a call changes an object. A second thread is told so: it would wait with the interpreter's lock, or
/// change what the first one reads.
class exclusive_use {
 public:
  /// `what` names the object in the message.
  exclusive_use(std::atomic<bool>& used, const char* what) : used_(used) {
    if (used_.exchange(true)) {
      throw failure(errc::invalid_argument, fmt::format("another thread is using the {}", what));
    }
  }
  exclusive_use(const exclusive_use&) = delete;
  exclusive_use& operator=(const exclusive_use&) = delete;
  ~exclusive_use() { used_ = false; }

 private:
  std::atomic<bool>& used_;
};

}  // namespace restkv::python
