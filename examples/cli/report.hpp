// SPDX-License-Identifier: Apache-2.0
/// @file
/// The report of `restkv compare`: one HTML file that needs nothing else.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <string>

namespace restkv::cli {

/// The page that shows `data` (see comparison_json, kept sets included). Whatever texts the data hold, none of them
/// becomes markup or script.
[[nodiscard]] std::string report_html(const nlohmann::json& data);

/// True when the plotting library was there when the program was built; a report without it has tables alone.
[[nodiscard]] bool report_has_plots() noexcept;

}  // namespace restkv::cli
