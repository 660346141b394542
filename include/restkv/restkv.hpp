// SPDX-License-Identifier: Apache-2.0
/// @file
/// Everything that runs on a CPU. Needs Eigen, for `eigen_backend`; every other header but those of interop/ needs the
/// standard library alone and can be included by itself.
#pragma once

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_gather.hpp>
#include <restkv/cache/paged_sequence.hpp>
#include <restkv/cache/quantised_gather.hpp>
#include <restkv/cache/rope.hpp>
#include <restkv/cache/split_kept.hpp>
#include <restkv/compact.hpp>
#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/select.hpp>
#include <restkv/verify/future_error.hpp>
#include <restkv/verify/output_error.hpp>
