// SPDX-License-Identifier: Apache-2.0
/// @file
/// Version, index types and the two macros the library defines. Every public header includes this one.
#pragma once

#include <cstddef>
#include <cstdint>

///@{
/// The version of the library; a breaking change of the interface raises the first number that is not 0.
#define RESTKV_VERSION_MAJOR 0
#define RESTKV_VERSION_MINOR 1
#define RESTKV_VERSION_PATCH 0
///@}

/// Marks a function that also compiles for the device, so that the CPU and GPU versions of an element-wise formula
/// are one function.
#if defined(__CUDACC__)
#define RESTKV_HD __host__ __device__
#else
#define RESTKV_HD
#endif

/// 1 where the compiler has exceptions: only then do the throwing wrappers exist.
#if defined(__cpp_exceptions)
#define RESTKV_EXCEPTIONS 1
#else
#define RESTKV_EXCEPTIONS 0
#endif

/// Everything of the library but its macros.
namespace restkv {

/// Extents, strides and offsets, in elements. 64 bits: a cache of 8 heads x 2^20 tokens x 256 channels passes 2^31.
using index_t = std::int64_t;

/// A token's position on the cache's token axis. 32 bits keep index lists small; plans reject longer axes.
using position_t = std::int32_t;

}  // namespace restkv
