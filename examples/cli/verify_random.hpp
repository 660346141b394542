// SPDX-License-Identifier: Apache-2.0
/// @file
/// The policies on which a backend is compared with the reference on generated problems. Included by one source for
/// each backend.
#pragma once

#include "verify_backends.hpp"

#include <restkv/verify/parity/selection.hpp>

namespace restkv::cli {

/// Between them: scores of attention alone, and of outputs through W_O; queries scored before and after smoothing;
/// every spatial smoother; budgets that compete and those that do not; rows for KV heads and for query heads; every
/// element type. Calls run(name, policy, element type) for each.
template <class Run>
void for_each_random_policy(const Run& run) {
  run("standard", eviction_policy<>{.window = 16, .spatial = {}, .budget = {}}, std::type_identity<float>{});
  run("snapkv",
      eviction_policy<snap_kv, mean, max_pool, uniform>{.window = 8, .spatial = {.width = 5}, .protect = {.sink = 2}},
      std::type_identity<half>{});
  run("released",
      eviction_policy<rest_kv, ema, adaptive_window, uniform>{.score = {.order = query_order::after},
                                                              .window = 8,
                                                              .spatial = {.min_width = 3, .scale = 20.0f},
                                                              .group = group_reduce::none},
      std::type_identity<bfloat16>{});
}

/// The outcome for every policy on one backend.
template <tensor_backend Backend>
[[nodiscard]] std::vector<random_outcome> random_on(Backend& backend, const parity::options& how) {
  std::vector<random_outcome> outcomes;
  reference_backend reference;
  for_each_random_policy([&]<class Policy, element T>(const char* name, const Policy& policy, std::type_identity<T>) {
    outcomes.push_back({name, parity::compare_selection<T>(reference, backend, policy, how)});
  });
  return outcomes;
}

}  // namespace restkv::cli
