// SPDX-License-Identifier: Apache-2.0
/// @file
/// The report of `restkv compare`: one HTML file that needs nothing else.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <string>

namespace restkv::cli {

/// The page that shows `data` (see comparison_json, kept sets included). Whatever texts the data hold, none of them
/// becomes markup or script. A program that was built without Chart.js makes pages with tables alone.
[[nodiscard]] std::string report_html(const nlohmann::json& data);

}  // namespace restkv::cli
