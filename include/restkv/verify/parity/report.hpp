// SPDX-License-Identifier: Apache-2.0
/// @file
/// `parity::options` and `parity::report`: what a comparison is asked for, and what it says.
#pragma once

#include <restkv/verify/parity/problem.hpp>

#include <cstdio>
#include <functional>
#include <optional>
#include <string>

namespace restkv::parity {

namespace detail {

/// A number as text, NaN without its sign.
[[nodiscard]] inline std::string number_text(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.9g", value);
  return value != value ? "NaN" : text;
}

}  // namespace detail

/// What a comparison does. Every member may be left as it is.
struct options {
  index_t cases = 200;            ///< problems to try
  std::uint64_t seed = 1;         ///< the same seed gives the same problems, anywhere
  index_t most_tokens = 1100;     ///< the longest token axis
  index_t most_head_dim = 128;    ///< the widest head
  index_t shrink_steps = 400;     ///< most problems tried to make a failing one smaller
  double unit_roundoff = 0;       ///< of the arithmetic that is checked; 0: that of its scores, 2^-24 for float
  std::optional<problem> only{};  ///< this problem alone: a reported one, again
  std::function<bool(const problem&)>
      accepts{};  ///< false for what the implementation does not claim to do; empty: all
  /// Called before each problem with its index: a progress line. Empty: none.
  std::function<void(index_t)> progress{};
};

/// What was counted while comparing.
struct tally {
  index_t values_compared = 0;   ///< numbers that had to lie within their bound, or be equal bit by bit
  index_t values_unbounded = 0;  ///< numbers that rounding leaves open: overflow, NaN among what they are made of
  index_t sets_compared = 0;     ///< kept sets that had to be equal, position by position
  index_t near_ties = 0;         ///< tokens that changed places with one whose score lies within the bounds of its own
  index_t other_budgets = 0;     ///< heads whose count depends on scores and came out otherwise by rounding
  index_t refused = 0;           ///< problems that both sides refused
  double largest_part = 0;       ///< of its bound that a difference came to, over all that passed
};

/// The outcome of a comparison. True when no difference was found.
class report {
 public:
  index_t cases = 0;                  ///< problems that were tried
  tally counts{};                     ///< over all of them
  index_t values_compared = 0;        ///< counts.values_compared, for those who want one number
  std::optional<problem> first{};     ///< the first problem that shows a difference
  std::optional<problem> smallest{};  ///< the smallest that still does
  std::string difference{};           ///< what differs there, a sentence
  index_t shrink_steps = 0;           ///< problems tried on the way

  /// True when there was something to compare and nothing differs.
  explicit operator bool() const noexcept { return ok(); }
  /// The same.
  [[nodiscard]] bool ok() const noexcept { return !smallest && difference.empty(); }
  /// All of it in a few lines: what differs first, and the smallest problem that shows it; or what was compared.
  [[nodiscard]] const char* text() const noexcept { return text_.c_str(); }

  /// Writes the text, when everything else is filled in. `what` was compared.
  void finish(const std::string& what) {
    values_compared = counts.values_compared;
    char numbers[256];
    std::snprintf(numbers, sizeof numbers, "%lld cases, %lld values, %lld kept sets", static_cast<long long>(cases),
                  static_cast<long long>(counts.values_compared), static_cast<long long>(counts.sets_compared));
    text_ = what + ": ";
    if (ok()) {
      text_ += std::string("no difference (") + numbers;
      if (counts.largest_part > 0) {
        std::snprintf(numbers, sizeof numbers, "; %.2g of the bound at most", counts.largest_part);
        text_ += numbers;
      }
      if (counts.near_ties > 0) text_ += "; " + std::to_string(counts.near_ties) + " near ties broken otherwise";
      if (counts.values_unbounded > 0) text_ += "; " + std::to_string(counts.values_unbounded) + " values unbounded";
      text_ += ")";
      return;
    }
    text_ += difference;
    if (!smallest) return;
    text_ += "\n  smallest case: " + to_string(*smallest);
    text_ += "\n  first found in case " + std::to_string(cases) + ": " + to_string(*first);
    text_ +=
        "\n  again: options.only = the smallest case (" + std::to_string(shrink_steps) + " problems tried to find it)";
  }

 private:
  std::string text_;
};

}  // namespace restkv::parity
