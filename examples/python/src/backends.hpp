// SPDX-License-Identifier: Apache-2.0
/// @file
/// Backends are kept between calls, so that their threads need not be started each time.
#pragma once

#include <restkv/backend/eigen/backend.hpp>

#include <memory>
#include <optional>

namespace restkv::python {

/// A backend for one call; given back at its end. Several calls at a time have one each.
class borrowed_backend {
 public:
  /// `threads` in all; without a number those of `default_threads`. Throws `failure` below 1.
  explicit borrowed_backend(std::optional<int> threads);
  borrowed_backend(const borrowed_backend&) = delete;
  borrowed_backend& operator=(const borrowed_backend&) = delete;
  ~borrowed_backend();

  [[nodiscard]] eigen_backend& operator*() const noexcept { return *backend_; }

 private:
  std::unique_ptr<eigen_backend> backend_;
};

/// OMP_NUM_THREADS where it is set, else the CPUs that this process may run on.
[[nodiscard]] int default_threads();

}  // namespace restkv::python
