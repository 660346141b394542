// SPDX-License-Identifier: Apache-2.0
#include "cache/cache_support.hpp"
#include "support/quantised_recipe.hpp"

#include <restkv/cache/quantise.hpp>
#include <restkv/cache/quantised_gather.hpp>

#include <array>
#include <cmath>
#include <limits>

using namespace restkv_test;
using restkv::cache_axis;
using restkv::code_format;
using restkv::dequantise;
using restkv::element;
using restkv::errc;
using restkv::half;
using restkv::quantisation_kind;
using restkv::quantise;
using restkv::quantised_view;
using restkv::status;

namespace {

quantised_recipe random_recipe(random_engine& random, index_t heads) {
  quantised_recipe made;
  made.batch = pick(random, 0, 2);
  made.heads = heads;
  made.tokens = chance(random, 10) ? pick(random, 0, 1) : pick(random, 2, 30);
  made.channels = chance(random, 4) ? pick(random, 60, 140) : pick(random, 0, 13);
  made.tokens_per_group = chance(random, 40) ? 1 : pick(random, 2, 8);
  made.channels_per_group = chance(random, 30)   ? 1
                            : chance(random, 40) ? std::max<index_t>(1, made.channels)
                                                 : pick(random, 2, 5);
  made.format.bits = 1 << pick(random, 1, 3);
  made.kind = static_cast<quantisation_kind>(pick(random, 0, 2));
  made.format.is_signed = made.kind == quantisation_kind::symmetric || chance(random, 50);
  made.format.packed = chance(random, 50) ? cache_axis::channels : cache_axis::tokens;
  return made;
}

/// A quantised cache with its memory.
template <class Scale>
struct quantised_memory {
  quantised_recipe how;
  guarded_tensor<std::uint8_t, 4> codes;
  guarded_tensor<Scale, 4> scale, second;

  quantised_memory(random_engine& random, const quantised_recipe& made)
      : how(made),
        codes(random, made.codes(), {.reversed_axes = chance(random, 30), .gaps = true}),
        scale(random, made.parameters(), {.reversed_axes = chance(random, 30)}),
        second(random, made.parameters(), {.gaps = chance(random, 50)}) {}

  [[nodiscard]] quantised_view<Scale> view() const {
    return quantised_view_of<Scale>(how, codes.view(), scale.view(), second.view());
  }
  [[nodiscard]] quantised_view<const Scale> read() const { return view(); }
};

/// Visits every number of a cache.
template <class Visit>
void each(const quantised_recipe& how, const Visit& visit) {
  for (index_t b = 0; b < how.batch; ++b) {
    for (index_t h = 0; h < how.heads; ++h) {
      for (index_t n = 0; n < how.tokens; ++n) {
        for (index_t c = 0; c < how.channels; ++c) visit(b, h, n, c);
      }
    }
  }
}

/// A code read bit by bit from its bytes.
template <class Scale>
int code_by_bits(const quantised_view<Scale>& cache, index_t b, index_t h, index_t n, index_t c) {
  const int bits = cache.format.bits;
  const bool along_channels = cache.format.packed == cache_axis::channels;
  const index_t first_bit = (along_channels ? c : n) * bits;
  const unsigned byte = along_channels ? cache.codes(b, h, n, first_bit / 8) : cache.codes(b, h, first_bit / 8, c);
  int code = 0;
  for (int i = 0; i < bits; ++i) code += static_cast<int>(byte >> (first_bit % 8 + i) & 1u) << i;
  return cache.format.is_signed && code >= 1 << (bits - 1) ? code - (1 << bits) : code;
}

/// Rounding of a parameter to its type, relative and absolute.
template <class Scale>
double rounding(double number) {
  if constexpr (std::is_same_v<Scale, half>) return std::abs(number) * 0x1p-11 + 0x1p-25;
  return std::abs(number) * 0x1p-24 + 0x1p-150;
}

template <class T>
void fill(random_engine& random, const tensor_view<T, 4>& tensor, const quantised_recipe& how) {
  const double scale = std::pow(10.0, static_cast<double>(pick(random, -3, 3)));
  const double shift = chance(random, 50) ? 0 : scale * static_cast<double>(pick(random, -4, 4));
  each(how, [&](index_t b, index_t h, index_t n, index_t c) {
    tensor(b, h, n, c) = restkv::narrow<T>(chance(random, 5) ? 0.0 : normal(random) * scale + shift);
  });
}

}  // namespace

TEMPLATE_TEST_CASE("quantised numbers are the nearest codes of their group's range", "", float, half) {
  using Scale = TestType;
  random_engine random(31 + sizeof(Scale));
  for (int trial = 0; trial < 150; ++trial) {
    const quantised_recipe how = random_recipe(random, pick(random, 1, 2));
    const quantised_memory<Scale> memory(random, how);
    const guarded_tensor<float, 4> numbers(random, {how.batch, how.heads, how.tokens, how.channels}, {.gaps = true});
    fill(random, numbers.view(), how);
    const auto cache = memory.view();
    CAPTURE(trial, how.tokens, how.channels, how.tokens_per_group, how.channels_per_group, how.format.bits);
    const status outcome = quantise(numbers.read(), cache, backward_for{});
    INFO(outcome.message());
    REQUIRE(outcome.ok());

    const guarded_tensor<float, 4> back(random, {how.batch, how.heads, how.tokens, how.channels},
                                        {.reversed_axes = true});
    REQUIRE(dequantise(cache, back.view()).ok());
    const int levels = how.format.highest() - how.format.lowest();
    each(how, [&](index_t b, index_t h, index_t n, index_t c) {
      // The group's range, by definition.
      double low = numbers.view()(b, h, n, c), high = low;
      const index_t first = n / how.tokens_per_group * how.tokens_per_group;
      const index_t from = c / how.channels_per_group * how.channels_per_group;
      for (index_t i = first; i < std::min(how.tokens, first + how.tokens_per_group); ++i) {
        for (index_t j = from; j < std::min(how.channels, from + how.channels_per_group); ++j) {
          low = std::min<double>(low, numbers.view()(b, h, i, j));
          high = std::max<double>(high, numbers.view()(b, h, i, j));
        }
      }
      const double number = numbers.view()(b, h, n, c);
      const double scale =
          restkv::widen<double>(cache.scale(b, h, n / how.tokens_per_group, c / how.channels_per_group));
      const double second =
          how.kind == quantisation_kind::symmetric
              ? 0
              : restkv::widen<double>(memory.second.view()(b, h, n / how.tokens_per_group, c / how.channels_per_group));
      const int code = code_by_bits(cache, b, h, n, c);
      REQUIRE(cache.code(b, h, n, c) == code);
      double slack = levels * rounding<Scale>(scale);
      double value = scale * code;
      if (how.kind == quantisation_kind::symmetric) {
        const double expected = std::max(std::abs(low), std::abs(high)) / how.format.highest();
        REQUIRE(std::abs(scale - expected) <= rounding<Scale>(expected));
        REQUIRE(code != how.format.lowest());
      } else if (how.kind == quantisation_kind::zero) {
        const double expected = (std::max(high, 0.0) - std::min(low, 0.0)) / levels;
        REQUIRE(std::abs(scale - expected) <= rounding<Scale>(expected));
        REQUIRE(second == std::round(second));
        REQUIRE((second >= how.format.lowest() && second <= how.format.highest()));
        value = scale * (code - second);
      } else {
        REQUIRE(std::abs(scale - (high - low) / levels) <= rounding<Scale>((high - low) / levels));
        const double lowest_at = second + how.format.lowest() * scale;
        REQUIRE(std::abs(lowest_at - low) <= rounding<Scale>(second) + 1e-12 * std::abs(low));
        value = scale * code + second;
        slack += rounding<Scale>(second);
      }
      REQUIRE(std::abs(value - number) <= scale / 2 + slack);
      // No other code is nearer.
      for (int other = how.format.lowest() + (how.kind == quantisation_kind::symmetric ? 1 : 0);
           other <= how.format.highest(); ++other) {
        const double there = how.kind == quantisation_kind::zero ? scale * (other - second) : scale * other + second;
        if (how.kind == quantisation_kind::symmetric || how.kind == quantisation_kind::zero || scale > 0) {
          if (std::abs(there - number) < std::abs(value - number) * (1 - 1e-9))
            FAIL("code " << other << " is nearer than " << code);
        }
      }
      REQUIRE(std::abs(back.view()(b, h, n, c) - value) <= 1e-6 * (scale * 2 * levels + std::abs(second)));
      REQUIRE(back.view()(b, h, n, c) == cache.value(b, h, n, c));
    });
  }
}

TEST_CASE("codes are rounded to even, and saturate") {
  std::array<std::uint8_t, 8> codes{};
  std::array<float, 1> scale{}, second{};
  const auto cache_of = [&](const code_format& format, quantisation_kind kind) {
    quantised_view<float> made{.codes = {codes.data(), {1, 1, 1, format.bytes(8)}},
                               .scale = {scale.data(), {1, 1, 1, 1}},
                               .tokens = 1,
                               .channels = 8,
                               .channels_per_group = 8,
                               .format = format};
    if (kind == quantisation_kind::zero) made.zero = {second.data(), {1, 1, 1, 1}};
    if (kind == quantisation_kind::offset) made.offset = {second.data(), {1, 1, 1, 1}};
    return made;
  };
  const auto coded = [&](const std::array<double, 8>& numbers, const code_format& format, quantisation_kind kind) {
    const auto cache = cache_of(format, kind);
    REQUIRE(quantise(tensor_view<const double, 4>(numbers.data(), {1, 1, 1, 8}), cache).ok());
    std::vector<int> made;
    for (index_t c = 0; c < 8; ++c) made.push_back(cache.code(0, 0, 0, c));
    return made;
  };
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const code_format int8{}, nibble{.bits = 4, .is_signed = false}, pair{.bits = 2, .is_signed = false};

  CHECK(coded({127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127}, int8, quantisation_kind::symmetric) ==
        std::vector<int>{127, 0, 2, 2, 0, -2, -2, -127});
  CHECK(coded({-3, 12, 0, 0.5, 1.5, -0.5, 11.5, -2.5}, nibble, quantisation_kind::zero) ==
        std::vector<int>{0, 15, 3, 4, 4, 2, 14, 0});
  CHECK(second[0] == 3);
  CHECK(coded({10, 13, 10.5, 11.5, 12.5, 11, 12, 10}, pair, quantisation_kind::offset) ==
        std::vector<int>{0, 3, 0, 2, 2, 1, 2, 0});
  CHECK(second[0] == 10);
  CHECK(codes[0] == (0 | 3 << 2 | 0 << 4 | 2 << 6));  // the first in the lowest bits

  // A group of equal numbers is exact.
  CHECK(coded({0.1f, 0.1f, 0.1f, 0.1f, 0.1f, 0.1f, 0.1f, 0.1f}, pair, quantisation_kind::offset) ==
        std::vector<int>(8, 0));
  CHECK(scale[0] == 0);
  CHECK(cache_of(pair, quantisation_kind::offset).value(0, 0, 0, 3) == 0.1f);
  for (const auto kind : {quantisation_kind::symmetric, quantisation_kind::zero, quantisation_kind::offset}) {
    code_format format = int8;
    coded({0, 0, -0.0, 0, 0, 0, 0, 0}, format, kind);
    for (index_t c = 0; c < 8; ++c) CHECK(cache_of(format, kind).value(0, 0, 0, c) == 0);
    // Only what is finite shapes the range.
    coded({inf, 2, -2, -inf, nan, 1, 0, 0}, format, kind);
    const auto cache = cache_of(format, kind);
    CHECK(cache.value(0, 0, 0, 0) == Approx(2).epsilon(0.01));
    CHECK(cache.value(0, 0, 0, 3) == Approx(-2).epsilon(0.01));
    CHECK(cache.value(0, 0, 0, 4) == cache.value(0, 0, 0, 6));
    CHECK(std::abs(cache.value(0, 0, 0, 4)) <= scale[0] / 2);
    // Nothing is.
    coded({inf, nan, -inf, inf, nan, nan, nan, nan}, format, kind);
    for (index_t c = 0; c < 8; ++c) CHECK(cache.value(0, 0, 0, c) == 0);
    // More than a float holds.
    coded({1e300, -1e308, 1, 0, 0, 0, 0, 0}, format, kind);
    for (index_t c = 0; c < 8; ++c) CHECK_FALSE(std::isnan(cache.value(0, 0, 0, c)));
    CHECK(scale[0] == std::numeric_limits<float>::max());
    // Less: the scale is 0 or the smallest there is.
    coded({1e-45, -1e-45, 0, 0, 0, 0, 0, 0}, format, kind);
    for (index_t c = 0; c < 8; ++c) CHECK(std::abs(cache.value(0, 0, 0, c)) <= 1e-43f);
  }
  coded({nan, 100, 101, 102, 100, 100, 100, 100}, int8, quantisation_kind::offset);
  CHECK(cache_of(int8, quantisation_kind::offset).code(0, 0, 0, 0) == -128);  // the value nearest to 0

  std::array<half, 1> small{};
  quantised_view<half> cache{.codes = {codes.data(), {1, 1, 1, 8}},
                             .scale = {small.data(), {1, 1, 1, 1}},
                             .tokens = 1,
                             .channels = 8,
                             .channels_per_group = 8};
  const std::array<float, 8> large{1e9f, -1e9f, 65504, 0, 0, 0, 0, 0};
  REQUIRE(quantise(tensor_view<const float, 4>(large.data(), {1, 1, 1, 8}), cache).ok());
  CHECK(static_cast<float>(small[0]) == 65504);
  CHECK(cache.value(0, 0, 0, 1) == -127.0f * 65504.0f);
}

TEMPLATE_TEST_CASE("kept tokens of quantised caches keep their numbers", "", float, half) {
  using Scale = TestType;
  random_engine random(41 + sizeof(Scale));
  index_t exact_groups = 0, new_groups = 0;
  for (int trial = 0; trial < 250; ++trial) {
    const index_t kv_heads = pick(random, 1, 3);
    const index_t group = chance(random, 30) ? 2 : 1;
    const quantised_recipe how = random_recipe(random, kv_heads);
    const quantised_memory<Scale> memory(random, how);
    const guarded_tensor<float, 4> numbers(random, {how.batch, how.heads, how.tokens, how.channels}, {});
    fill(random, numbers.view(), how);
    REQUIRE(quantise(numbers.read(), memory.view()).ok());
    const random_kept made(random, how.batch, group * kv_heads, how.tokens, how.tokens);
    const auto kept = made.read();
    quantised_recipe smaller = how;
    smaller.heads = group * kv_heads;
    smaller.tokens = 0;
    for (index_t b = 0; b < how.batch; ++b) {
      for (index_t h = 0; h < smaller.heads; ++h)
        smaller.tokens = std::max<index_t>(smaller.tokens, kept.lengths(b, h));
    }
    if (chance(random, 50)) smaller.tokens += 3;
    if (chance(random, 50)) smaller.format.packed = chance(random, 50) ? cache_axis::tokens : cache_axis::channels;
    const quantised_memory<Scale> out(random, smaller), before(out);
    CAPTURE(trial, how.tokens, how.channels, how.tokens_per_group, how.channels_per_group, how.format.bits);
    const status outcome = restkv::gather_tokens(kept, memory.read(), out.view(), backward_for{});
    INFO(outcome.message());
    REQUIRE(outcome.ok());
    const auto from = memory.view(), to = out.view();
    const index_t size = how.tokens_per_group;
    const int levels = how.format.highest() - how.format.lowest();
    each(smaller, [&](index_t b, index_t h, index_t n, index_t c) {
      const index_t length = kept.lengths(b, h);
      if (n >= length) {
        REQUIRE(code_by_bits(to, b, h, n, c) == code_by_bits(before.view(), b, h, n, c));
        return;
      }
      const index_t position = kept.positions(b, h, n);
      const index_t last = std::min(length, (n / size + 1) * size) - 1;
      const bool alone = kept.positions(b, h, n / size * size) / size == kept.positions(b, h, last) / size;
      (alone ? exact_groups : new_groups) += 1;
      if (alone) {
        REQUIRE(code_by_bits(to, b, h, n, c) == code_by_bits(from, b, h / group, position, c));
        REQUIRE(to.template value<double>(b, h, n, c) == from.template value<double>(b, h / group, position, c));
        return;
      }
      const double scale = restkv::widen<double>(to.scale(b, h, n / size, c / how.channels_per_group));
      double slack = levels * rounding<Scale>(scale);
      if (how.kind == quantisation_kind::offset) {
        slack += rounding<Scale>(restkv::widen<double>(to.offset(b, h, n / size, c / how.channels_per_group)));
      }
      const double value = to.template value<double>(b, h, n, c);
      const double there = from.template value<double>(b, h / group, position, c);
      REQUIRE(std::abs(value - there) <= scale / 2 + slack);
      const double old_scale =
          restkv::widen<double>(from.scale(b, h / group, position / size, c / how.channels_per_group));
      double old_slack = levels * rounding<Scale>(old_scale);
      if (how.kind == quantisation_kind::offset) {
        old_slack += rounding<Scale>(
            restkv::widen<double>(from.offset(b, h / group, position / size, c / how.channels_per_group)));
      }
      REQUIRE(std::abs(value - numbers.view()(b, h / group, position, c)) <=
              scale / 2 + old_scale / 2 + slack + old_slack);
    });

    // In place: the same, bit by bit, for the slots in use.
    if (group != 1) continue;
    REQUIRE(restkv::compact_in_place(kept, memory.view()).ok());
    each(smaller, [&](index_t b, index_t h, index_t n, index_t c) {
      if (n >= kept.lengths(b, h)) return;
      REQUIRE(code_by_bits(from, b, h, n, c) == code_by_bits(to, b, h, n, c));
      REQUIRE(from.template value<double>(b, h, n, c) == to.template value<double>(b, h, n, c));
    });
  }
  CHECK(exact_groups > 5000);
  CHECK(new_groups > 3000);
}

TEST_CASE("a range of tokens, and a whole cache in a workspace") {
  random_engine random(51);
  const quantised_recipe how{.batch = 2,
                             .heads = 2,
                             .tokens = 21,
                             .channels = 6,
                             .tokens_per_group = 4,
                             .format = {.bits = 4, .is_signed = false, .packed = cache_axis::tokens},
                             .kind = quantisation_kind::offset};
  const quantised_memory<half> memory(random, how);
  const guarded_tensor<float, 4> numbers(random, {2, 2, 21, 6}, {});
  fill(random, numbers.view(), how);
  REQUIRE(quantise(numbers.read(), memory.view()).ok());
  const guarded_tensor<double, 4> part(random, {2, 2, 9, 6}, {.reversed_axes = true});
  REQUIRE(dequantise(memory.read(), part.view(), 7, backward_for{}).ok());
  for (index_t n = 0; n < 9; ++n) CHECK(part.view()(1, 0, n, 5) == memory.view().value<double>(1, 0, 7 + n, 5));
  check_error(dequantise(memory.read(), part.view(), 13), errc::shape_mismatch, {9, 13, 21});
  check_error(dequantise(memory.read(), part.view(), -1), errc::shape_mismatch, {-1, 21});

  restkv::workspace counted;
  tensor_view<half, 4> tensor;
  REQUIRE(dequantise(memory.view(), counted, tensor).ok());
  CHECK(tensor.data == nullptr);
  std::vector<std::byte> bytes(counted.required_bytes());
  restkv::workspace space(bytes);
  REQUIRE(dequantise(memory.view(), space, tensor).ok());
  each(how, [&](index_t b, index_t h, index_t n, index_t c) {
    REQUIRE(tensor(b, h, n, c).bits() == half(memory.view().value(b, h, n, c)).bits());
  });
  restkv::workspace small(bytes.data(), 500);
  const half* const old = tensor.data;
  check_error(dequantise(memory.view(), small, tensor), errc::workspace_too_small, {500});
  CHECK(tensor.data == old);
}

TEST_CASE("damaged parameters damage their own group alone") {
  random_engine random(57);
  const quantised_recipe how{.batch = 1,
                             .heads = 1,
                             .tokens = 12,
                             .channels = 2,
                             .tokens_per_group = 4,
                             .format = {.bits = 4, .is_signed = false},
                             .kind = quantisation_kind::offset};
  for (const float damage : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const quantised_memory<float> memory(random, how);
    const guarded_tensor<float, 4> numbers(random, {1, 1, 12, 2}, {});
    fill(random, numbers.view(), how);
    const auto cache = memory.view();
    REQUIRE(quantise(numbers.read(), cache).ok());
    cache.scale(0, 0, 1, 1) = damage;
    const float kept_value = cache.value(0, 0, 9, 1), other_channel = cache.value(0, 0, 6, 0);
    // Tokens 5 and 6, of the damaged group, meet 9 and 10.
    std::vector<position_t> positions{5, 6, 9, 10}, lengths{4};
    REQUIRE(restkv::compact_in_place(restkv::const_kept_tokens({positions.data(), {1, 1, 4}}, {lengths.data(), {1, 1}}),
                                     cache)
                .ok());
    CHECK(std::isfinite(cache.scale(0, 0, 0, 1)));
    CHECK(std::abs(cache.value(0, 0, 2, 1) - kept_value) <= cache.scale(0, 0, 0, 1) * 0.5001f);
    CHECK(std::abs(cache.value(0, 0, 1, 0) - other_channel) <= cache.scale(0, 0, 0, 0) * 0.5001f);
  }
}

TEST_CASE("quantised caches that do not fit are refused, with nothing written") {
  random_engine random(61);
  const quantised_recipe how{.batch = 1,
                             .heads = 2,
                             .tokens = 10,
                             .channels = 6,
                             .tokens_per_group = 4,
                             .channels_per_group = 3,
                             .format = {.bits = 4},
                             .kind = quantisation_kind::zero};
  const quantised_memory<float> memory(random, how), out(random, how);
  const guarded_tensor<float, 4> numbers(random, {1, 2, 10, 6}, {});
  fill(random, numbers.view(), how);
  REQUIRE(quantise(numbers.read(), memory.view()).ok());
  const quantised_memory<float> untouched(out);
  std::vector<position_t> positions{0, 3, 9, 2, 4, 5}, lengths{3, 3};
  const restkv::const_kept_tokens kept({positions.data(), {1, 2, 3}}, {lengths.data(), {1, 2}});
  const auto gather = [&](const quantised_view<float>& to) { return restkv::gather_tokens(kept, memory.view(), to); };

  auto view = out.view();
  view.format.bits = 3;
  check_error(view.check(), errc::invalid_argument, {3});
  view = out.view();
  view.tokens = 11;
  check_error(gather(view), errc::shape_mismatch, {10, 11}, "codes");
  view = out.view();
  view.tokens_per_group = 5;
  check_error(gather(view), errc::shape_mismatch, {3, 2}, "scale");
  view.tokens_per_group = 0;
  check_error(view.check(), errc::invalid_argument, {0, 3});
  view = out.view();
  view.channels = -1;
  check_error(view.check(), errc::invalid_argument, {-1, 10});
  view = out.view();
  view.offset = view.zero;
  check_error(gather(view), errc::unsupported, {12});
  view.zero = {};
  check_error(gather(view), errc::shape_mismatch, {4, -8}, "kind");
  view = out.view();
  view.zero.data = nullptr;
  check_error(gather(view), errc::missing_input, {12}, "zero");
  view = out.view();
  view.zero = view.scale;
  check_error(gather(view), errc::aliasing, {});
  view = out.view();
  view.scale.strides[1] = 0;
  check_error(gather(view), errc::aliasing, {12}, "itself");
  CHECK(view.check().ok());  // to be read
  view = out.view();
  view.format.is_signed = false;
  check_error(gather(view), errc::shape_mismatch, {0, -8});
  view.zero = {};
  check_error(quantise(numbers.read(), view), errc::unsupported, {4});
  check_error(gather(memory.view()), errc::aliasing, {});
  positions[2] = 10;
  check_error(gather(out.view()), errc::invalid_argument, {10});
  check_error(restkv::compact_in_place(kept, memory.view()), errc::invalid_argument, {10});
  positions[2] = 9;
  const restkv::const_kept_tokens of_queries({positions.data(), {1, 4, 1}}, {lengths.data(), {1, 4}, {0, 0}});
  lengths[0] = 1;
  check_error(restkv::compact_in_place(of_queries, memory.view()), errc::unsupported, {4, 2});
  check_error(restkv::gather_tokens(of_queries, memory.view(), out.view()), errc::shape_mismatch, {2, 4}, "heads");
  lengths[0] = 3;
  const guarded_tensor<float, 4> other(random, {1, 2, 9, 6}, {});
  check_error(quantise(other.read(), out.view()), errc::shape_mismatch, {9, 10});
  check_error(quantise(out.scale.read(), out.view()), errc::shape_mismatch, {3, 10});
  CHECK(out.codes.same_bytes(untouched.codes));
  CHECK(out.scale.same_bytes(untouched.scale));
  CHECK(out.second.same_bytes(untouched.second));
  CHECK(gather(out.view()).ok());
}

TEST_CASE("a scale may lie behind its token's codes") {
  // Rows of 8 codes and a float, 2 heads of 5 tokens.
  alignas(4) std::array<std::uint8_t, 2 * 5 * 12> rows{};
  auto* const scales = reinterpret_cast<float*>(rows.data() + 8);
  const quantised_view<float> cache{.codes = {rows.data(), {1, 2, 5, 8}, {120, 60, 12, 1}},
                                    .scale = {scales, {1, 2, 5, 1}, {30, 15, 3, 1}},
                                    .tokens = 5,
                                    .channels = 8,
                                    .channels_per_group = 8};
  random_engine random(71);
  const guarded_tensor<float, 4> numbers(random, {1, 2, 5, 8}, {});
  fill(random, numbers.view(), {.batch = 1, .heads = 2, .tokens = 5, .channels = 8});
  REQUIRE(quantise(numbers.read(), cache).ok());
  const float last = cache.value(0, 1, 4, 7);
  std::vector<position_t> positions{0, 3, 1, 4}, lengths{2, 2};
  REQUIRE(restkv::compact_in_place(restkv::const_kept_tokens({positions.data(), {1, 2, 2}}, {lengths.data(), {1, 2}}),
                                   cache)
              .ok());
  CHECK(cache.value(0, 1, 1, 7) == last);
  auto inside = cache;
  inside.scale.data -= 1;  // the last 4 codes of each row
  check_error(quantise(numbers.read(), inside), errc::aliasing, {});
}
