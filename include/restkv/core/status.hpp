// SPDX-License-Identifier: Apache-2.0
/// @file
/// `status`: what went wrong, where, with both numbers. Never allocates, so it can report an allocation failure.
#pragma once

#include <restkv/core/config.hpp>

#include <cstdio>
#if RESTKV_EXCEPTIONS
#include <stdexcept>
#endif

namespace restkv {

/// Kinds of failure; the text of the status says the rest.
enum class errc {
  ok,
  invalid_argument,     ///< a parameter is outside its range (alpha = 2, width = 4)
  shape_mismatch,       ///< two tensors, or a tensor and the plan, do not fit together
  missing_input,        ///< the policy needs a tensor that the layer does not hold
  workspace_too_small,  ///< the workspace is smaller than the plan said
  aliasing,             ///< an output overlaps an input where it may not
  unsupported,          ///< a valid request that this backend cannot serve
  out_of_memory,        ///< the backend's memory ran out
  device_failure,       ///< the device refused a launch or a copy; the text holds its error
  bad_file,             ///< a file is truncated, inconsistent or not of the expected format
  communication_failure,  ///< another rank, or the way to it, failed; see distributed/communicator.hpp
};

/// The outcome of a call. Copyable, never allocates; `message()` is a complete sentence fragment such as
/// "key has 3 heads, query has 8: query heads must be a multiple of kv heads".
class [[nodiscard]] status {
 public:
  constexpr status() noexcept = default;

  /// A failure with a printf-style text; a text over 383 characters is cut.
  template <class... Args>
  static status error(errc code, const char* format, Args... args) noexcept {
    status s;
    s.code_ = code;
    if constexpr (sizeof...(Args) == 0) {
      std::snprintf(s.text_, sizeof s.text_, "%s", format);
    } else {
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
#pragma GCC diagnostic ignored "-Wformat-security"
#endif
      std::snprintf(s.text_, sizeof s.text_, format, args...);
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
    }
    return s;
  }

  ///@{
  /// True when nothing went wrong.
  [[nodiscard]] constexpr bool ok() const noexcept { return code_ == errc::ok; }
  constexpr explicit operator bool() const noexcept { return ok(); }
  ///@}
  /// The kind of failure; errc::ok when there is none.
  [[nodiscard]] constexpr errc code() const noexcept { return code_; }
  /// What is wrong, where, with both numbers; empty when nothing is.
  [[nodiscard]] constexpr const char* message() const noexcept { return text_; }

 private:
  errc code_ = errc::ok;
  char text_[384] = {};
};

#if RESTKV_EXCEPTIONS
/// What the throwing wrappers throw; `code()` is the status's code, `what()` its message.
class error : public std::runtime_error {
 public:
  /// The exception of a failure.
  explicit error(const status& s) : std::runtime_error(s.message()), code_(s.code()) {}
  /// The kind of failure.
  [[nodiscard]] errc code() const noexcept { return code_; }

 private:
  errc code_;
};

/// Throws `restkv::error` unless `s` is ok.
inline void throw_if_failed(const status& s) {
  if (!s.ok()) throw error(s);
}
#endif

/// Returns from the calling function with the status of `expression` when that is a failure.
#define RESTKV_RETURN_IF_FAILED(expression)                                   \
  do {                                                                        \
    if (::restkv::status restkv_status_ = (expression); !restkv_status_.ok()) \
      return restkv_status_;                                                  \
  } while (false)

}  // namespace restkv
