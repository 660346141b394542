// SPDX-License-Identifier: Apache-2.0
/// @file
/// A backend compared with the reference on generated problems. Included by one source for each backend.
#pragma once

#include "random_policies.hpp"
#include "verify_outcome.hpp"

#include <restkv/verify/parity/selection.hpp>

namespace restkv::cli {

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
