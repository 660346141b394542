// SPDX-License-Identifier: Apache-2.0
/// @file
/// `host_kernel_backend`: the bodies of the GPU's kernels on the CPU, so that they can be tested and debugged anywhere.
#pragma once

#include <restkv/backend/kernel_backend.hpp>

namespace restkv {

/// One thread that runs the work items of each phase of a kernel in a shuffled order; for tests, not for speed. Takes a
/// seed for the order and, optionally, a recorder of conflicts between work items.
using host_kernel_backend = kernel_backend<kernel::host_executor>;

}  // namespace restkv
