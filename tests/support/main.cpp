// SPDX-License-Identifier: Apache-2.0
// The main function of every test program, compiled once.

#if __has_include(<catch2/catch_session.hpp>)

#include <catch2/catch_session.hpp>

int main(int argc, char** argv) {
  const int result = Catch::Session().run(argc, argv);
  constexpr int all_tests_skipped = 4;  // Catch2's own code for it
  return result == all_tests_skipped ? 77 : result;
}

#else

#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>

#include <cstddef>
#include <cstdio>

namespace restkv_test {

namespace {
std::size_t skipped_cases = 0;
std::size_t run_cases = 0;

struct case_counter : Catch::TestEventListenerBase {
  using Catch::TestEventListenerBase::TestEventListenerBase;
  void testRunEnded(const Catch::TestRunStats& stats) override { run_cases = stats.totals.testCases.total(); }
};
CATCH_REGISTER_LISTENER(case_counter)
}  // namespace

void note_skip(const char* reason) {
  ++skipped_cases;
  std::fprintf(stderr, "skipped: %s\n", reason);
}

}  // namespace restkv_test

int main(int argc, char** argv) {
  const int result = Catch::Session().run(argc, argv);
  const bool all_skipped = restkv_test::skipped_cases > 0 && restkv_test::skipped_cases == restkv_test::run_cases;
  return result == 0 && all_skipped ? 77 : result;
}

#endif
