// SPDX-License-Identifier: Apache-2.0
// half and bfloat16 against their definition: the nearest multiple of the spacing at that magnitude, ties to even. The
// definition is computed in double with ldexp and nearbyint and shares no code with the library.
#include <restkv/core/dtype.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

struct format {
  int precision;     // significant bits, the hidden one included
  int min_exponent;  // of the smallest normal number, 2^min_exponent
  double overflow;   // from here on, in magnitude, the rounded value is infinite
};
constexpr format binary16{11, -14, 65536.0};
const format brain16{8, -126, std::ldexp(1.0, 128)};

/// `x` rounded to the format, as a double.
double rounded(double x, const format& f) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent = 0;
  std::frexp(x, &exponent);  // |x| = m * 2^exponent, m in [0.5, 1)
  const int lowest = f.min_exponent - (f.precision - 1);
  const int spacing = std::max(exponent - f.precision, lowest);
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -spacing)), spacing);
  return std::fabs(y) >= f.overflow ? std::copysign(std::numeric_limits<double>::infinity(), x) : y;
}

/// The same value, zeros told apart by their sign, any NaN equal to any NaN.
bool same(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

template <class T>
void check_value(float x, const format& f) {
  const T narrowed(x);
  require(same(static_cast<float>(narrowed), rounded(static_cast<double>(x), f)));
  require(std::signbit(static_cast<float>(narrowed)) == std::signbit(x));  // NaN keeps its sign too
}

template <class T>
void check_bits(std::uint16_t bits, const format& f) {
  const float widened = static_cast<float>(T::from_bits(bits));
  require(same(rounded(static_cast<double>(widened), f), static_cast<double>(widened)));  // representable
  const std::uint16_t back = T(widened).bits();
  if (std::isnan(widened)) {
    require(std::isnan(static_cast<float>(T::from_bits(back))));
  } else {
    require(back == bits);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  for (; size >= 4; data += 4, size -= 4) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, data, sizeof bits);
    const float x = std::bit_cast<float>(bits);
    check_value<restkv::half>(x, binary16);
    check_value<restkv::bfloat16>(x, brain16);
    // The neighbourhood of every half: most random floats are far outside its range.
    const auto low = static_cast<std::uint16_t>(bits);
    check_bits<restkv::half>(low, binary16);
    check_bits<restkv::bfloat16>(low, brain16);
    const float near_half = static_cast<float>(restkv::half::from_bits(low));
    check_value<restkv::half>(near_half * (1.0f + std::ldexp(1.0f, -11)), binary16);
    check_value<restkv::half>(std::nextafter(near_half * (1.0f + std::ldexp(1.0f, -11)), 0.0f), binary16);
  }
  return 0;
}
