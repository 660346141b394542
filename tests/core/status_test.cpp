// SPDX-License-Identifier: Apache-2.0
#include "support/check_error.hpp"

#include <restkv/core/status.hpp>

#include <type_traits>

using restkv::errc;
using restkv::status;

namespace {

static_assert(std::is_trivially_copyable_v<status> && std::is_nothrow_default_constructible_v<status>);
static_assert(status{}.ok() && status{}.code() == errc::ok && status{}.message()[0] == '\0');

int evaluations = 0;
status evaluated(const status& s) {
  ++evaluations;
  return s;
}
status first_failure(const status& a, const status& b) {
  RESTKV_RETURN_IF_FAILED(evaluated(a));
  RESTKV_RETURN_IF_FAILED(evaluated(b));
  return {};
}

}  // namespace

TEST_CASE("a failure carries its code and its text") {
  const status s = status::error(errc::shape_mismatch, "%s has %lld heads, %s has %zu at %g", "key", 3LL, "query",
                                 std::size_t{8}, 0.5);
  CHECK_FALSE(s.ok());
  CHECK_FALSE(static_cast<bool>(s));
  CHECK(s.code() == errc::shape_mismatch);
  CHECK(std::string(s.message()) == "key has 3 heads, query has 8 at 0.5");
  const status copy = s;
  CHECK(std::string(copy.message()) == s.message());
  CHECK(copy.code() == s.code());
}

TEST_CASE("a text without arguments is not taken for a format") {
  CHECK(std::string(status::error(errc::bad_file, "100% of %s and %n").message()) == "100% of %s and %n");
}

TEST_CASE("a long text is cut at 383 characters and still ends") {
  for (const std::size_t length : {382u, 383u, 384u, 5000u}) {
    const std::string text(length, 'x');
    for (const status& s : {status::error(errc::bad_file, text.c_str()),
                            status::error(errc::bad_file, "%s", text.c_str())}) {
      CHECK(std::string(s.message()) == text.substr(0, 383));
      CHECK(s.code() == errc::bad_file);
    }
  }
}

TEST_CASE("the macro returns the first failure and evaluates each expression once") {
  const status bad = status::error(errc::aliasing, "first");
  const status worse = status::error(errc::unsupported, "second");
  evaluations = 0;
  CHECK(first_failure({}, {}).ok());
  CHECK(evaluations == 2);
  CHECK(first_failure(bad, worse).code() == errc::aliasing);
  CHECK(evaluations == 3);
  CHECK(first_failure({}, worse).code() == errc::unsupported);
  CHECK(evaluations == 5);
}

TEST_CASE("throw_if_failed throws the code and the text") {
  CHECK_NOTHROW(restkv::throw_if_failed(status{}));
  try {
    restkv::throw_if_failed(status::error(errc::missing_input, "the layer has no %s", "value"));
    FAIL("nothing was thrown");
  } catch (const restkv::error& e) {
    CHECK(e.code() == errc::missing_input);
    CHECK(std::string(e.what()) == "the layer has no value");
  }
}
