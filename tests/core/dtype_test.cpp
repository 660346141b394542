// SPDX-License-Identifier: Apache-2.0
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/core/dtype.hpp>

#include <cmath>
#include <limits>

using namespace restkv_test;
using restkv::bfloat16;
using restkv::half;
using restkv::narrow;
using restkv::widen;

namespace {

/// A 16-bit format by its definition: sign, exponent field of `exponent_bits` with a bias, fraction of the rest.
struct format {
  int exponent_bits;

  [[nodiscard]] int fraction_bits() const { return 15 - exponent_bits; }
  [[nodiscard]] int bias() const { return (1 << (exponent_bits - 1)) - 1; }

  /// (-1)^s 2^(e - bias) (1 + f / 2^m), and (-1)^s 2^(1 - bias) f / 2^m where e is 0.
  [[nodiscard]] double value(unsigned bits) const {
    const double sign = (bits >> 15) != 0 ? -1.0 : 1.0;
    const int exponent = static_cast<int>((bits >> fraction_bits()) & ((1u << exponent_bits) - 1));
    const double fraction = std::ldexp(static_cast<double>(bits & ((1u << fraction_bits()) - 1)), -fraction_bits());
    if (exponent == (1 << exponent_bits) - 1) {
      return fraction == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    }
    return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias()) : sign * std::ldexp(1 + fraction, exponent - bias());
  }
};

template <class T>
constexpr format format_of() {
  return {std::is_same_v<T, half> ? 5 : 8};
}

/// The same number, zeros told apart; any NaN equal to any NaN.
bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

}  // namespace

TEMPLATE_TEST_CASE("every 16-bit pattern has the value of its definition and survives the way there and back", "", half,
                   bfloat16) {
  const format definition = format_of<TestType>();
  int wrong = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto element = TestType::from_bits(static_cast<std::uint16_t>(bits));
    const auto widened = static_cast<float>(element);
    bool good = element.bits() == bits && same(static_cast<double>(widened), definition.value(bits));
    good = good && std::signbit(widened) == (bits >> 15 != 0);  // of NaN too
    good = good && widen<double>(element) == widened == !std::isnan(widened);
    good = good && (std::isnan(widened) ? std::isnan(static_cast<float>(TestType(widened)))
                                        : TestType(widened).bits() == bits);
    if (!good && ++wrong < 10) UNSCOPED_INFO("pattern " << bits << " gives " << widened);
  }
  CHECK(wrong == 0);
}

TEMPLATE_TEST_CASE("every boundary between two neighbours rounds to nearest, ties to even", "", half, bfloat16) {
  const format definition = format_of<TestType>();
  const unsigned infinity = ((1u << definition.exponent_bits) - 1) << definition.fraction_bits();
  int wrong = 0;
  for (unsigned bits = 0; bits < infinity; ++bits) {
    // Beyond the largest finite number the next one would have been 2^(bias + 1): there infinity begins.
    const double below = definition.value(bits);
    const double above = bits + 1 == infinity ? std::ldexp(1.0, definition.bias() + 1) : definition.value(bits + 1);
    const double middle = below + (above - below) / 2;
    const auto tie = static_cast<float>(middle);
    bool good = static_cast<double>(tie) == middle;  // exact, or the test itself is wrong
    const unsigned even = bits % 2 == 0 ? bits : bits + 1;
    for (const unsigned sign : {0u, 0x8000u}) {
      const float direction = sign == 0 ? 1.0f : -1.0f;
      const float beyond = std::numeric_limits<float>::infinity() * direction;
      const auto rounded = [](auto number) { return unsigned{narrow<TestType>(number).bits()}; };
      good = good && rounded(tie * direction) == (even | sign);
      good = good && rounded(std::nextafter(tie * direction, 0.0f)) == (bits | sign);
      good = good && rounded(std::nextafter(tie * direction, beyond)) == ((bits + 1) | sign);
      // From double, where the distance to the tie may be too small for a float to show.
      const double tie64 = middle * static_cast<double>(direction);
      good = good && rounded(tie64) == (even | sign);
      good = good && rounded(std::nextafter(tie64, 0.0)) == (bits | sign);
      good = good && rounded(std::nextafter(tie64, static_cast<double>(beyond))) == ((bits + 1) | sign);
    }
    if (!good && ++wrong < 10) UNSCOPED_INFO("between patterns " << bits << " and " << bits + 1);
  }
  CHECK(wrong == 0);
}

TEMPLATE_TEST_CASE("random numbers round to the nearer neighbour", "", half, bfloat16) {
  const format definition = format_of<TestType>();
  const unsigned infinity = ((1u << definition.exponent_bits) - 1) << definition.fraction_bits();
  random_engine random(7);
  int wrong = 0;
  for (int trial = 0; trial < 100000; ++trial) {
    const double x = std::ldexp(uniform_real(random, -1, 1), static_cast<int>(pick(random, -160, 160)));
    const unsigned bits = narrow<TestType>(x).bits();
    const double got = definition.value(bits);
    // No neighbour is nearer. (The neighbour of the largest finite number counts as 2^(bias + 1).)
    const unsigned magnitude = bits & 0x7fffu;
    const auto value_of = [&](unsigned m) {
      return m >= infinity ? std::ldexp(1.0, definition.bias() + 1) : definition.value(m);
    };
    const double distance = std::fabs(std::fabs(x) - value_of(magnitude));
    const bool beyond = magnitude == infinity && std::fabs(x) >= value_of(infinity);
    const auto nearer_than = [&](unsigned m) { return distance <= std::fabs(std::fabs(x) - value_of(m)); };
    const bool nearest = (magnitude == 0 || nearer_than(magnitude - 1)) &&
                         (magnitude == infinity || nearer_than(magnitude + 1));
    const bool good = std::signbit(got) == std::signbit(x) && (beyond || nearest);
    if (!good && ++wrong < 10) UNSCOPED_INFO(x << " gives pattern " << bits);
  }
  CHECK(wrong == 0);
}

TEMPLATE_TEST_CASE("NaN, infinities and zeros keep their kind and sign", "", half, bfloat16) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float x : {0.0f, -0.0f, infinity, -infinity}) {
    CAPTURE(x);
    CHECK(same(static_cast<double>(static_cast<float>(TestType(x))), static_cast<double>(x)));
    CHECK(same(widen<double>(narrow<TestType>(static_cast<double>(x))), static_cast<double>(x)));
  }
  for (const float x : {nan, -nan}) {
    CHECK(std::isnan(static_cast<float>(TestType(x))));
    CHECK(std::isnan(widen<double>(narrow<TestType>(static_cast<double>(x)))));
    CHECK(std::signbit(static_cast<float>(TestType(x))) == std::signbit(x));
  }
  // A NaN whose payload lies in the bits that are cut off must not become an infinity.
  CHECK(std::isnan(static_cast<float>(TestType(std::bit_cast<float>(0x7f800001u)))));
  CHECK(same(widen<double>(narrow<TestType>(1e300)), std::numeric_limits<double>::infinity()));
  CHECK(same(widen<double>(narrow<TestType>(-1e-300)), -0.0));
}

TEST_CASE("float and double pass through narrow and widen") {
  random_engine random(8);
  for (int trial = 0; trial < 1000; ++trial) {
    const double x = std::ldexp(normal(random), static_cast<int>(pick(random, -100, 100)));
    CHECK(narrow<double>(x) == x);
    CHECK(widen<double>(x) == x);
    CHECK(narrow<float>(x) == static_cast<float>(x));
    CHECK(widen<double>(static_cast<float>(x)) == static_cast<double>(static_cast<float>(x)));
    CHECK(widen<float>(x) == static_cast<float>(x));
  }
}

TEST_CASE("conversions are constant expressions that agree with those at run time") {
  static_assert(static_cast<float>(half(1.0f / 3.0f)) == 0.333251953125f);
  static_assert(static_cast<float>(bfloat16(1.0f / 3.0f)) == 0.333984375f);
  static_assert(narrow<half>(65519.99).bits() == 0x7bff && narrow<half>(65520.0).bits() == 0x7c00);
  static_assert(restkv::element<half> && restkv::element<const bfloat16> && restkv::element<double>);
  static_assert(!restkv::element<int> && !restkv::element<long double> && !restkv::element<float*>);
  int wrong = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    // A compiler that knows the machine's conversion uses it at run time.
    const float by_integers = restkv::detail::half_bits_to_float(static_cast<std::uint16_t>(bits));
    const float at_run_time = static_cast<float>(half::from_bits(static_cast<std::uint16_t>(bits)));
    wrong += same(static_cast<double>(by_integers), static_cast<double>(at_run_time)) ? 0 : 1;
  }
  CHECK(wrong == 0);
}
