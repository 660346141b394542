// SPDX-License-Identifier: Apache-2.0
/// @file
/// Generated problems on each backend: what comes out, and the functions that do it, each in a source of its own.
/// Includes nothing that nvcc would have to read for nothing.
#pragma once

#include <restkv/verify/parity/report.hpp>

#include <vector>

namespace restkv::cli {

/// Generated problems on one policy, compared with the reference.
struct random_outcome {
  const char* policy = "";
  parity::report report{};
};

///@{
/// Generated problems on one backend. Those of a device throw input_error where there is none.
[[nodiscard]] std::vector<random_outcome> random_on_eigen(const parity::options& how, int threads);
[[nodiscard]] std::vector<random_outcome> random_on_thrust_cpp(const parity::options& how, int threads);
[[nodiscard]] std::vector<random_outcome> random_on_thrust_omp(const parity::options& how, int threads);
[[nodiscard]] std::vector<random_outcome> random_on_thrust_cuda(const parity::options& how, int threads);
[[nodiscard]] std::vector<random_outcome> random_on_host_kernels(const parity::options& how, int threads);
[[nodiscard]] std::vector<random_outcome> random_on_cuda(const parity::options& how, int threads);
///@}

}  // namespace restkv::cli
