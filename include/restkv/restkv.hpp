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
#include <restkv/model/cake_budget.hpp>
#include <restkv/model/error_bounded.hpp>
#include <restkv/model/global_budget.hpp>
#include <restkv/model/lava_budget.hpp>
#include <restkv/model/model_selection.hpp>
#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/score/compactor.hpp>
#include <restkv/score/given_attention.hpp>
#include <restkv/score/kv_zip.hpp>
#include <restkv/score/query_statistics.hpp>
#include <restkv/select.hpp>
#include <restkv/session/session_archive.hpp>
#include <restkv/verify/future_error.hpp>
#include <restkv/verify/output_error.hpp>
