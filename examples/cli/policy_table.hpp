// SPDX-License-Identifier: Apache-2.0
/// @file
/// Policies by name: what `restkv compare` compares, `--preset` takes and the gallery shows.
#pragma once

#include "anticipated.hpp"
#include "configuration.hpp"

#include <string>
#include <vector>

namespace restkv::cli {

/// A heading of the table.
struct policy_group {
  const char* name;   ///< on the command line
  const char* title;  ///< for people
};

/// A policy with a name.
struct named_policy {
  std::string name;
  std::string description;
  std::string group;  ///< the name of its policy_group
  configuration policy;
  bool seeded = false;  ///< drawn at random: repeated with several seeds
  bool keeps_all = false;
  refinement refined = refinement::none;  ///< what is done beyond the policy's selection
};

/// The headings, in their order.
[[nodiscard]] const std::vector<policy_group>& policy_groups();

/// The title of the heading of that name, which must exist.
[[nodiscard]] const char* title_of(const std::string& group);

/// Every policy, ordered by group. Their budgets are to be set. Add yours to policy_table.cpp.
[[nodiscard]] const std::vector<named_policy>& policy_table();

/// The policy of that name; null where there is none.
[[nodiscard]] const named_policy* find_policy(const std::string& name);

/// A policy by its name in the table, or in the library. Throws input_error for one that is not known, or is more than a
/// selection from the prompt.
[[nodiscard]] configuration policy_of(const std::string& name);

}  // namespace restkv::cli
