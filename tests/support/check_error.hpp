// SPDX-License-Identifier: Apache-2.0
// Checks of failures: the code, and the numbers and words in the text.
#pragma once

#include "support/catch.hpp"

#include <restkv/core/status.hpp>

#include <cctype>
#include <string>
#include <vector>

namespace restkv_test {

using restkv::index_t;

/// True when a text names a number, not as a part of another.
inline bool names_number(const std::string& text, index_t number) {
  const std::string digits = std::to_string(number);
  for (std::size_t at = text.find(digits); at != std::string::npos; at = text.find(digits, at + 1)) {
    const auto alone = [&](std::size_t i) {
      return i >= text.size() || std::isdigit(static_cast<unsigned char>(text[i])) == 0;
    };
    if ((at == 0 || alone(at - 1)) && alone(at + digits.size())) return true;
  }
  return false;
}

/// Checks that a call failed with a code and named the numbers at odds.
inline void check_error(const restkv::status& outcome, restkv::errc code, const std::vector<index_t>& numbers,
                        const std::string& word = "") {
  INFO("message: " << outcome.message());
  CHECK(outcome.code() == code);
  for (const index_t number : numbers) {
    INFO("number: " << number);
    CHECK(names_number(outcome.message(), number));
  }
  CHECK(std::string(outcome.message()).find(word) != std::string::npos);
}

}  // namespace restkv_test
