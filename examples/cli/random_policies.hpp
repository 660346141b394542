// SPDX-License-Identifier: Apache-2.0
/// @file
/// The policies on which backends are compared with the reference on generated problems.
#pragma once

#include <restkv/presets.hpp>

#include <type_traits>

namespace restkv::cli {

///@{
/// Between them: scores of attention alone, and of outputs through W_O; queries scored before and after smoothing;
/// every spatial smoother; budgets that compete and those that do not; rows for KV heads and for query heads; every
/// element type.
using standard_policy = eviction_policy<>;
using snapkv_policy = eviction_policy<snap_kv, mean, max_pool, uniform>;
using released_policy = eviction_policy<rest_kv, ema, adaptive_window, uniform>;
///@}

/// Calls run(name, policy, element type) for each.
template <class Run>
void for_each_random_policy(const Run& run) {
  run("standard", standard_policy{.window = 16, .spatial = {}, .budget = {}}, std::type_identity<float>{});
  run("snapkv", snapkv_policy{.window = 8, .spatial = {.width = 5}, .protect = {.sink = 2}},
      std::type_identity<half>{});
  run("released",
      released_policy{.score = {.order = query_order::after},
                      .window = 8,
                      .spatial = {.min_width = 3, .scale = 20.0f},
                      .group = group_reduce::none},
      std::type_identity<bfloat16>{});
}

}  // namespace restkv::cli
