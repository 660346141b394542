// SPDX-License-Identifier: Apache-2.0
/// @file
/// Compaction on a `kernel_backend`: the kept keys and values of a cache copied to a dense, a ragged or a paged one, or
/// moved to the front of their heads, keys turned to their new positions where that is asked for, and quantised caches.
/// The kept set may lie where the host cannot read it, as `select` leaves it.
#pragma once

#include <restkv/backend/kernel_compact_copy.hpp>
#include <restkv/backend/kernel_compact_in_place.hpp>
#include <restkv/backend/kernel_compact_quantised.hpp>
