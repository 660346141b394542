// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include "report_parts.hpp"

#include <nlohmann/json.hpp>

#include <map>
#include <span>
#include <string_view>

namespace restkv::cli {
namespace {

std::string joined(std::span<const std::string_view> pieces) {
  std::string text;
  for (const std::string_view piece : pieces) text += piece;
  return text;
}

/// JSON that may stand in a script element: "<" occurs inside of strings only, where its escape means the same, and
/// without it nothing can end the element or open a comment.
std::string script_json(const nlohmann::json& data) {
  const std::string text = data.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  std::string safe;
  safe.reserve(text.size());
  for (const char c : text) {
    if (c == '<') {
      safe += "\\u003c";
    } else {
      safe += c;
    }
  }
  return safe;
}

}  // namespace

std::string report_html(const nlohmann::json& data) {
  const std::map<std::string_view, std::string> parts{{"style", joined(report_parts::style)},
                                                      {"licence", joined(report_parts::licence)},
                                                      {"chart", joined(report_parts::chart)},
                                                      {"script", joined(report_parts::script)},
                                                      {"data", script_json(data)}};
  // Every @@name@@ of the page once, from left to right: what is put in is not looked at again.
  const std::string page = joined(report_parts::page);
  std::string html;
  for (std::size_t at = 0;;) {
    const std::size_t begin = page.find("@@", at);
    html += page.substr(at, begin - at);
    if (begin == std::string::npos) return html;
    const std::size_t end = page.find("@@", begin + 2);
    html += parts.at(std::string_view(page).substr(begin + 2, end - begin - 2));
    at = end + 2;
  }
}

}  // namespace restkv::cli
