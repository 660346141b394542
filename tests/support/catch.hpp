// SPDX-License-Identifier: Apache-2.0
// Catch2, version 2 or 3: the same test sources compile with both.
//
// Use it instead of a Catch2 header. It gives TEST_CASE, SECTION, REQUIRE, CHECK, INFO, CAPTURE, TEMPLATE_TEST_CASE,
// GENERATE, `Approx`, and SKIP("reason"), which must stand directly in the body of a TEST_CASE. A program all of whose
// tests were skipped exits with 77, which Meson shows as skipped.
#pragma once

#if __has_include(<catch2/catch_test_macros.hpp>)

#include <catch2/catch_approx.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/catch_tostring.hpp>
#include <catch2/generators/catch_generators_all.hpp>
#include <catch2/matchers/catch_matchers_all.hpp>

using Catch::Approx;

#else

#include <catch2/catch.hpp>

namespace restkv_test {
/// Notes that the running test case was skipped, and why (main.cpp).
void note_skip(const char* reason);
}  // namespace restkv_test

// Catch2 2 has no SKIP of its own.
#define SKIP(reason)                  \
  do {                                \
    ::restkv_test::note_skip(reason); \
    return;                           \
  } while (false)

#endif
