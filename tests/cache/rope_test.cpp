// SPDX-License-Identifier: Apache-2.0
#include "cache/cache_support.hpp"

#include <restkv/cache/compact.hpp>
#include <restkv/cache/rope.hpp>

#include <complex>

using namespace restkv_test;
using restkv::dense_layout;
using restkv::errc;
using restkv::linear_rope;
using restkv::llama3_rope;
using restkv::ragged_layout;
using restkv::rope_frequencies;
using restkv::rope_parameters;
using restkv::rotary_pairs;
using restkv::rotate_keys;
using restkv::status;
using restkv::yarn_rope;

namespace {

const long double pi = std::acos(-1.0L);

/// theta^(-2 i / dim) by repeated multiplication instead of pow.
std::vector<long double> plain_frequencies(long double theta, index_t dim) {
  const long double ratio = std::exp(-2.0L * std::log(theta) / static_cast<long double>(dim));
  std::vector<long double> f{1.0L};
  while (static_cast<index_t>(f.size()) < dim / 2) f.push_back(f.back() * ratio);
  return f;
}

template <class Scaling>
std::vector<double> frequencies_of(const rope_parameters<Scaling>& parameters) {
  std::vector<double> f(static_cast<std::size_t>(parameters.rotary_dim / 2), -1.0);
  const status outcome = rope_frequencies(parameters, f);
  INFO(outcome.message());
  REQUIRE(outcome.ok());
  return f;
}

void check_close(const std::vector<double>& has, const std::vector<long double>& want) {
  REQUIRE(has.size() == want.size());
  for (std::size_t i = 0; i < has.size(); ++i) {
    CAPTURE(i, has[i], static_cast<double>(want[i]));
    CHECK(std::abs(static_cast<long double>(has[i]) - want[i]) <= 1e-14L * want[i]);
  }
}

/// Unit roundoff of an element type.
template <class T>
constexpr double roundoff() {
  if constexpr (std::is_same_v<T, double>) return 0x1p-53;
  if constexpr (std::is_same_v<T, float>) return 0x1p-24;
  if constexpr (std::is_same_v<T, restkv::half>) return 0x1p-11;
  return 0x1p-8;
}

/// RoPE by its definition: the pair as a complex number times e^(i position frequency), in long double.
std::complex<long double> turned(long double x, long double y, long double position, long double frequency) {
  return std::complex<long double>(x, y) * std::polar(1.0L, std::remainder(position * frequency, 2 * pi));
}

std::pair<index_t, index_t> channels_of(index_t pair, index_t pairs, rotary_pairs how) {
  if (how == rotary_pairs::half_split) return {pair, pair + pairs};
  return {2 * pair, 2 * pair + 1};
}

}  // namespace

TEST_CASE("rope_frequencies: plain and linear, from the definition") {
  random_engine random(21);
  for (int trial = 0; trial < 50; ++trial) {
    const index_t dim = 2 * pick(random, 1, 128);
    const double theta = std::array{10000.0, 500000.0, 1e6, 2.0}[static_cast<std::size_t>(pick(random, 0, 3))];
    auto want = plain_frequencies(theta, dim);
    check_close(frequencies_of(rope_parameters{.rotary_dim = dim, .theta = theta}), want);
    for (long double& f : want) f /= 2.5L;
    check_close(frequencies_of(rope_parameters{.rotary_dim = dim, .theta = theta, .scaling = linear_rope{2.5}}), want);
  }
  CHECK(frequencies_of(rope_parameters{.rotary_dim = 4}) == std::vector<double>{1.0, 0.01});
}

TEST_CASE("rope_frequencies: Llama 3.1, from the wavelengths of its release") {
  for (const double factor : {8.0, 32.0}) {
    const llama3_rope scaling{.factor = factor};
    auto want = plain_frequencies(500000, 128);
    std::array<int, 3> bands{};
    for (long double& f : want) {
      const long double wavelength = 2 * pi / f;
      if (wavelength < 8192.0L / 4) {
        ++bands[0];
      } else if (wavelength > 8192.0L) {
        f /= factor;
        ++bands[1];
      } else {
        const long double smooth = (8192.0L / wavelength - 1) / (4 - 1);
        f = (1 - smooth) * f / factor + smooth * f;
        ++bands[2];
      }
    }
    CHECK(bands[0] > 0);
    CHECK(bands[1] > 0);
    CHECK(bands[2] > 0);
    check_close(frequencies_of(rope_parameters{.rotary_dim = 128, .theta = 500000, .scaling = scaling}), want);
  }
}

TEST_CASE("rope_frequencies: YaRN, its range of pairs found by bisection") {
  struct model {
    index_t dim, positions;
    double theta, factor, fast, slow;
    bool truncate;
  };
  for (const model& m : {model{64, 512, 1e4, 4, 32, 1, true}, model{128, 32768, 1e6, 4, 32, 1, true},
                         model{64, 4096, 1.5e5, 32, 32, 1, false}, model{32, 4096, 1e4, 16, 20, 2, true},
                         model{8, 4096, 1e4, 2, 32, 31, true}, model{64, 64, 1e4, 2, 32, 1, true}}) {
    CAPTURE(m.dim, m.positions);
    // The pair, as a real number, that makes so many turns within the original context: turns fall with the pair.
    const auto pair_of = [&](long double turns) {
      long double low = -1000;
      long double high = 1000;
      for (int step = 0; step < 200; ++step) {
        const long double middle = (low + high) / 2;
        const long double here =
            static_cast<long double>(m.positions) /
            (2 * pi * std::pow(static_cast<long double>(m.theta), 2 * middle / static_cast<long double>(m.dim)));
        (here > turns ? low : high) = middle;
      }
      return low;
    };
    long double low = pair_of(m.fast);
    long double high = pair_of(m.slow);
    if (m.truncate) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::max(low, 0.0L);
    high = std::min(high, static_cast<long double>(m.dim) - 1);
    auto want = plain_frequencies(m.theta, m.dim);
    for (std::size_t i = 0; i < want.size(); ++i) {
      const auto pair = static_cast<long double>(i);
      const long double blend = pair <= low ? 0 : pair >= high ? 1 : (pair - low) / (high - low);
      want[i] *= 1 - blend + blend / static_cast<long double>(m.factor);
    }
    const yarn_rope scaling{.factor = m.factor,
                            .original_max_positions = m.positions,
                            .beta_fast = m.fast,
                            .beta_slow = m.slow,
                            .truncate = m.truncate};
    check_close(frequencies_of(rope_parameters{.rotary_dim = m.dim, .theta = m.theta, .scaling = scaling}), want);
  }

  // 512 positions, 64 channels, theta 10000: 32 turns at pair 3.25, one turn at pair 15.29.
  const auto f = frequencies_of(
      rope_parameters{.rotary_dim = 64, .scaling = yarn_rope{.factor = 4, .original_max_positions = 512}});
  const auto plain = plain_frequencies(10000, 64);
  CHECK(f[3] == Approx(static_cast<double>(plain[3])).epsilon(1e-14));
  CHECK(f[4] < 0.999 * static_cast<double>(plain[4]));
  CHECK(f[15] > 1.001 * static_cast<double>(plain[15] / 4));
  CHECK(f[16] == Approx(static_cast<double>(plain[16] / 4)).epsilon(1e-14));
}

TEST_CASE("rope_frequencies: a scaling of the user's own") {
  struct square_root {
    [[nodiscard]] status check(const restkv::rope_base& base) const {
      if (base.rotary_dim == 6) return status::error(errc::unsupported, "not %d", 6);
      return {};
    }
    [[nodiscard]] double operator()(index_t pair, double f, const restkv::rope_base&) const {
      return static_cast<double>(pair) * std::sqrt(f);
    }
  };
  CHECK(frequencies_of(rope_parameters{.rotary_dim = 4, .scaling = square_root{}}) == std::vector<double>{0.0, 0.1});
  std::vector<double> out(3, -1.0);
  check_error(rope_frequencies(rope_parameters{.rotary_dim = 6, .scaling = square_root{}}, out), errc::unsupported,
              {6});
  CHECK(out == std::vector<double>(3, -1.0));
}

TEST_CASE("rope_frequencies names the parameter that is wrong, and writes nothing") {
  std::vector<double> out(4, -1.0);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  const auto fails = [&](const auto& parameters, const std::string& word, const std::vector<index_t>& numbers = {}) {
    const status outcome = rope_frequencies(parameters, out);
    check_error(outcome, outcome.code() == errc::shape_mismatch ? errc::shape_mismatch : errc::invalid_argument,
                numbers, word);
    CHECK(out == std::vector<double>(4, -1.0));
  };
  fails(rope_parameters{}, "rotary_dim", {0});
  fails(rope_parameters{.rotary_dim = 7}, "rotary_dim", {7, 2});
  fails(rope_parameters{.rotary_dim = -8}, "rotary_dim", {-8, 2});
  fails(rope_parameters{.rotary_dim = 10}, "frequencies", {4, 10, 5});
  for (const double theta : {1.0, -10000.0, nan, inf}) fails(rope_parameters{.rotary_dim = 8, .theta = theta}, "theta");
  for (const double bad : {0.0, -2.0, nan, inf}) {
    fails(rope_parameters{.rotary_dim = 8, .scaling = linear_rope{bad}}, "linear_rope");
    fails(rope_parameters{.rotary_dim = 8, .scaling = llama3_rope{.factor = bad}}, "factor");
    fails(rope_parameters{.rotary_dim = 8, .scaling = llama3_rope{.low_freq_factor = bad}}, "low_freq_factor");
    fails(rope_parameters{.rotary_dim = 8, .scaling = llama3_rope{.high_freq_factor = bad}}, "high_freq_factor");
    fails(rope_parameters{.rotary_dim = 8, .scaling = yarn_rope{.factor = bad, .original_max_positions = 4096}},
          "factor");
    fails(rope_parameters{.rotary_dim = 8, .scaling = yarn_rope{.original_max_positions = 4096, .beta_fast = bad}},
          "beta_fast");
    fails(rope_parameters{.rotary_dim = 8, .scaling = yarn_rope{.original_max_positions = 4096, .beta_slow = bad}},
          "beta_slow");
  }
  fails(rope_parameters{.rotary_dim = 8, .scaling = llama3_rope{.original_max_positions = 0}}, "original_max_positions",
        {0});
  fails(rope_parameters{.rotary_dim = 8, .scaling = llama3_rope{.low_freq_factor = 4}}, "low_freq_factor", {4});
  fails(rope_parameters{.rotary_dim = 8, .scaling = yarn_rope{}}, "original_max_positions", {0});
  fails(rope_parameters{.rotary_dim = 8, .scaling = yarn_rope{.original_max_positions = 4096, .beta_slow = 32}},
        "beta_fast", {32});
  fails(rope_parameters{.rotary_dim = 8, .theta = 10, .scaling = yarn_rope{.original_max_positions = 1}}, "blend",
        {0, -3, 1});
}

TEMPLATE_TEST_CASE("rotate_keys: a cached key moves to where rotating the original key would have put it", "", double,
                   float, restkv::half, restkv::bfloat16) {
  using T = TestType;
  constexpr double u = roundoff<T>();
  random_engine random(22);
  std::normal_distribution<double> normal;
  for (int trial = 0; trial < 150; ++trial) {
    const index_t batch = pick(random, 0, 2);
    const index_t heads = pick(random, 1, 3);
    const index_t capacity = pick(random, 0, 12);
    const bool large = chance(random, 15);  // more pairs than fit one block
    const index_t rotary = 2 * (large ? pick(random, 120, 200) : pick(random, 1, 20));
    const index_t head_dim = rotary + (chance(random, 50) ? 0 : pick(random, 1, 9));
    const rotary_pairs how = chance(random, 50) ? rotary_pairs::half_split : rotary_pairs::interleaved;
    const bool far = chance(random, 50);
    const random_kept kept(random, batch, heads, 40, capacity);
    const auto lengths = kept.set().lengths;
    const auto old = kept.set().positions;
    for (index_t b = 0; b < batch; ++b) {  // stretch the positions up to 2^20, not ascending for once
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < lengths(b, h); ++i) {
          if (far) old(b, h, i) = static_cast<position_t>(pick(random, 990000, 1 << 20));
        }
      }
    }
    const auto target = [&](index_t b, index_t h, index_t slot) -> index_t { return slot + (far ? 1000 * h : 0) + b; };
    const auto parameters = rope_parameters{.rotary_dim = rotary, .theta = 1e4};
    const std::vector<double> frequencies = frequencies_of(parameters);
    const auto exact = plain_frequencies(1e4, rotary);
    CAPTURE(trial, batch, heads, capacity, rotary, head_dim, far);

    // The cache: keys rotated to their old positions, rounded to T; channels behind rotary_dim are not touched.
    const guarded_tensor<T, 4> keys(random, {batch, heads, capacity, head_dim},
                                    {.contiguous_channels = chance(random, 50), .reversed_axes = chance(random, 30)});
    const guarded_tensor<T, 4> original(keys);
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t slot = 0; slot < lengths(b, h); ++slot) {
          for (index_t pair = 0; pair < rotary / 2; ++pair) {
            const auto [first, second] = channels_of(pair, rotary / 2, how);
            const T x = restkv::narrow<T>(normal(random));
            const T y = restkv::narrow<T>(normal(random));
            const auto z = turned(restkv::widen<double>(x), restkv::widen<double>(y), old(b, h, slot),
                                  exact[static_cast<std::size_t>(pair)]);
            original.view()(b, h, slot, first) = x;
            original.view()(b, h, slot, second) = y;
            keys.view()(b, h, slot, first) = restkv::narrow<T>(static_cast<double>(z.real()));
            keys.view()(b, h, slot, second) = restkv::narrow<T>(static_cast<double>(z.imag()));
          }
        }
      }
    }
    const guarded_tensor<T, 4> cached(keys);
    const backward_for loop;
    const status outcome = rotate_keys(kept.read(), keys.view(), frequencies, how, target, loop);
    INFO(outcome.message());
    REQUIRE(outcome.ok());
    CHECK(loop.rows == batch * heads);

    // Two roundings to T, then float arithmetic with rounded cosines and sines; in double the angle's rounding counts.
    const double bound =
        2 * u + 4 * (std::is_same_v<T, double> ? u : roundoff<float>()) + (far ? 3e6 : 300.0) * roundoff<double>();
    const guarded_tensor<T, 4> reference(cached);  // to be overwritten where a key may differ
    double worst = 0;
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t slot = 0; slot < lengths(b, h); ++slot) {
          const bool moves = target(b, h, slot) != old(b, h, slot);
          for (index_t pair = 0; pair < rotary / 2; ++pair) {
            const auto [first, second] = channels_of(pair, rotary / 2, how);
            const auto x = restkv::widen<double>(original.view()(b, h, slot, first));
            const auto y = restkv::widen<double>(original.view()(b, h, slot, second));
            const auto want =
                turned(x, y, static_cast<long double>(target(b, h, slot)), exact[static_cast<std::size_t>(pair)]);
            const auto error =
                std::abs(want - std::complex<long double>(restkv::widen<double>(keys.view()(b, h, slot, first)),
                                                          restkv::widen<double>(keys.view()(b, h, slot, second))));
            const double scale = std::hypot(x, y) + (std::is_same_v<T, restkv::half> ? 1e-4 : 1e-30);
            worst = std::max(worst, static_cast<double>(error) / scale);
            if (!moves) continue;
            reference.view()(b, h, slot, first) = keys.view()(b, h, slot, first);
            reference.view()(b, h, slot, second) = keys.view()(b, h, slot, second);
          }
        }
      }
    }
    CAPTURE(worst / bound);
    CHECK(worst <= bound);
    CHECK(keys.same_bytes(reference));  // unrotated channels, keys that stay, unused slots, guards: bit by bit

    // Back again.
    std::vector<position_t> now(static_cast<std::size_t>(batch * heads * capacity));
    const tensor_view<position_t, 3> moved(now.data(), {batch, heads, capacity});
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t slot = 0; slot < capacity; ++slot) moved(b, h, slot) = static_cast<position_t>(target(b, h, slot));
      }
    }
    REQUIRE(rotate_keys(restkv::const_kept_tokens(moved, lengths), dense_layout(keys.view()), frequencies, how,
                        [&](index_t b, index_t h, index_t slot) { return old(b, h, slot); })
                .ok());
    double drift = 0;
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t slot = 0; slot < lengths(b, h); ++slot) {
          for (index_t pair = 0; pair < rotary / 2; ++pair) {
            const auto [first, second] = channels_of(pair, rotary / 2, how);
            const auto at = [&](const guarded_tensor<T, 4>& t, index_t c) {
              return restkv::widen<double>(t.view()(b, h, slot, c));
            };
            const double length = std::hypot(at(cached, first), at(cached, second));
            const double error = std::hypot(at(keys, first) - at(cached, first), at(keys, second) - at(cached, second));
            drift = std::max(drift, error / (length + (std::is_same_v<T, restkv::half> ? 1e-4 : 1e-30)));
          }
        }
      }
    }
    CHECK(drift <= 2 * bound);
  }
}

TEST_CASE("rotate_keys: by default to slot indices, after compaction, ragged as dense, per query head too") {
  random_engine random(23);
  for (int trial = 0; trial < 60; ++trial) {
    const index_t heads = 2 * pick(random, 1, 3);
    const guarded_tensor<float, 4> cache(random, {2, 2, 30, 12}, {});
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 2; ++h) {
        for (index_t n = 0; n < 30; ++n) {
          for (index_t c = 0; c < 12; ++c) cache.view()(b, h, n, c) = static_cast<float>(pick(random, -999, 999));
        }
      }
    }
    const random_kept kept(random, 2, heads, 30, 30);
    const auto frequencies = frequencies_of(rope_parameters{.rotary_dim = 12, .theta = 100});
    std::vector<std::int64_t> offsets(static_cast<std::size_t>(2 * heads + 1));
    const tensor_view<std::int64_t, 1> ends(offsets.data(), {2 * heads + 1});
    REQUIRE(restkv::ragged_offsets(kept.read(), ends).ok());
    const guarded_tensor<float, 2> rows(random, {offsets.back(), 12}, {});
    const guarded_tensor<float, 4> dense(random, {2, heads, 30, 12}, {});
    const ragged_layout<float> ragged{rows.view(), ends, 2, heads};
    REQUIRE(restkv::gather_tokens(kept.read(), cache.view(), ragged).ok());
    REQUIRE(restkv::gather_tokens(kept.read(), cache.view(), dense_layout(dense.view())).ok());
    REQUIRE(rotate_keys(kept.read(), ragged, frequencies).ok());
    REQUIRE(rotate_keys(kept.read(), dense.view(), frequencies).ok());
    double worst = 0;
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t slot = 0; slot < kept.set().lengths(b, h); ++slot) {
          const index_t token = kept.set().positions(b, h, slot);
          for (index_t pair = 0; pair < 6; ++pair) {
            const auto want = turned(
                cache.view()(b, h / (heads / 2), token, pair), cache.view()(b, h / (heads / 2), token, pair + 6),
                static_cast<long double>(slot - token), plain_frequencies(100, 12)[static_cast<std::size_t>(pair)]);
            worst = std::max(worst, std::abs(static_cast<double>(want.real()) -
                                             static_cast<double>(dense.view()(b, h, slot, pair))));
            worst = std::max(worst, std::abs(static_cast<double>(want.imag()) -
                                             static_cast<double>(dense.view()(b, h, slot, pair + 6))));
          }
          for (index_t c = 0; c < 12; ++c) {
            CHECK(same_bits(dense.view()(b, h, slot, c), ragged.row(b, h, slot)(c)));
          }
        }
      }
    }
    CHECK(worst <= 1500 * 5 * roundoff<float>());
  }
}

TEST_CASE("rotate_keys: a quarter turn by hand, in both pairings") {
  const double quarter[] = {std::acos(-1.0) / 2, 0.0};
  std::vector<position_t> at{0};
  std::vector<position_t> one{1};
  const restkv::kept_tokens kept({at.data(), {1, 1, 1}}, {one.data(), {1, 1}});
  const auto ahead = [](index_t, index_t, index_t slot) { return slot + 1; };
  std::vector<double> key{1, 2, 3, 4, 5};
  const tensor_view<double, 4> keys(key.data(), {1, 1, 1, 5});
  REQUIRE(rotate_keys(kept, keys, quarter, rotary_pairs::half_split, ahead).ok());
  CHECK(key[0] == Approx(-3).margin(1e-15));  // (1, 3) -> (-3, 1)
  CHECK(key[2] == Approx(1).margin(1e-15));
  CHECK(std::vector<double>{key[1], key[3], key[4]} == std::vector<double>{2, 4, 5});
  key = {1, 2, 3, 4, 5};
  REQUIRE(rotate_keys(kept, keys, quarter, rotary_pairs::interleaved, ahead).ok());
  CHECK(key[0] == Approx(-2).margin(1e-15));  // (1, 2) -> (-2, 1)
  CHECK(key[1] == Approx(1).margin(1e-15));
  CHECK(std::vector<double>{key[2], key[3], key[4]} == std::vector<double>{3, 4, 5});
}

TEST_CASE("rotate_keys: attention depends on distances only") {
  // <R(m) q, R(n) k> = <R(m + s) q, R(n + s) k>: shifting all positions by s, here far, changes no dot product.
  random_engine random(24);
  std::normal_distribution<double> normal;
  const auto frequencies = frequencies_of(rope_parameters{.rotary_dim = 16, .scaling = llama3_rope{}});
  std::vector<double> vectors(2 * 16);
  for (double& x : vectors) x = normal(random);
  std::vector<position_t> at{123456, 123400};
  std::vector<position_t> two{2};
  const tensor_view<double, 4> view(vectors.data(), {1, 1, 2, 16});
  const auto product = [&] {
    double sum = 0;
    for (std::size_t c = 0; c < 16; ++c) sum += vectors[c] * vectors[16 + c];
    return sum;
  };
  const double before = product();
  REQUIRE(rotate_keys({{at.data(), {1, 1, 2}}, {two.data(), {1, 1}}}, view, frequencies, rotary_pairs::interleaved,
                      [](index_t, index_t, index_t slot) -> index_t { return slot == 0 ? 1000056 : 1000000; })
              .ok());
  CHECK(product() == Approx(before).epsilon(1e-8));
}

TEST_CASE("rotate_keys: NaN and infinity stay within their pair, keys that stay keep their bits") {
  const double inf = std::numeric_limits<double>::infinity();
  std::vector<restkv::half> key(2 * 4);
  key[0] = restkv::half::from_bits(0x7d01);  // a signalling NaN with a payload
  key[1] = restkv::half(1.0f);
  key[4] = restkv::half(static_cast<float>(inf));
  key[5] = restkv::half(65504.0f);
  key[7] = restkv::half(65504.0f);
  const auto before = key;
  std::vector<position_t> at{0, 40};
  std::vector<position_t> two{2};
  const restkv::kept_tokens kept({at.data(), {1, 1, 2}}, {two.data(), {1, 1}});
  const double frequencies[] = {1.0, std::acos(-1.0) / 4};
  const tensor_view<restkv::half, 4> keys(key.data(), {1, 1, 2, 4});
  REQUIRE(rotate_keys(kept, keys, frequencies, rotary_pairs::half_split, [](index_t, index_t, index_t slot) {
            return slot == 0 ? 0 : 41;
          }).ok());
  for (std::size_t c = 0; c < 4; ++c) CHECK(key[c].bits() == before[c].bits());
  CHECK_FALSE(std::isfinite(static_cast<float>(key[4])));
  CHECK_FALSE(std::isfinite(static_cast<float>(key[6])));
  CHECK(static_cast<float>(key[7]) == static_cast<float>(inf));  // 65504 * sqrt(2)
  CHECK(std::abs(static_cast<float>(key[5])) < 100.0f);
}

TEST_CASE("rotate_keys: extreme positions are no undefined behaviour") {
  std::vector<float> key{1, 2};
  std::vector<position_t> at{std::numeric_limits<position_t>::min()};
  std::vector<position_t> one{1};
  const restkv::kept_tokens kept({at.data(), {1, 1, 1}}, {one.data(), {1, 1}});
  const double frequencies[] = {1.0};
  REQUIRE(rotate_keys(kept, tensor_view<float, 4>(key.data(), {1, 1, 1, 2}), frequencies, rotary_pairs::half_split,
                      [](index_t, index_t, index_t) { return std::numeric_limits<index_t>::max(); })
              .ok());
  CHECK(std::hypot(key[0], key[1]) == Approx(std::sqrt(5.0)).epsilon(1e-6));
}

TEST_CASE("rotate_keys names what does not fit, and writes nothing") {
  random_engine random(25);
  const guarded_tensor<float, 4> keys(random, {2, 3, 4, 8}, {});
  const guarded_tensor<float, 4> before(keys);
  std::vector<position_t> positions(2 * 3 * 4, 17);
  std::vector<position_t> lengths(2 * 3, 4);
  restkv::kept_tokens kept({positions.data(), {2, 3, 4}}, {lengths.data(), {2, 3}});
  std::vector<double> frequencies(4, 0.5);
  tensor_view<float, 4> view = keys.view();
  const auto fails = [&](errc code, const std::vector<index_t>& numbers, const std::string& word = "") {
    check_error(rotate_keys(kept, view, frequencies), code, numbers, word);
    CHECK(keys.same_bytes(before));
  };
  SECTION("it fits as it stands") { CHECK(rotate_keys(kept, view, frequencies).ok()); }
  SECTION("no frequencies") {
    frequencies.clear();
    fails(errc::shape_mismatch, {0, 1, 4, 8}, "frequencies");
  }
  SECTION("too many frequencies") {
    frequencies.push_back(1.0);
    fails(errc::shape_mismatch, {5, 4, 8}, "frequencies");
  }
  SECTION("frequencies that are not finite") {
    frequencies[2] = std::numeric_limits<double>::quiet_NaN();
    fails(errc::invalid_argument, {2, 4}, "finite");
    frequencies[2] = std::numeric_limits<double>::infinity();
    fails(errc::invalid_argument, {2, 4}, "finite");
  }
  SECTION("lengths") {
    lengths[4] = 5;
    fails(errc::invalid_argument, {1, 5, 4});
    lengths[4] = -2;
    fails(errc::invalid_argument, {1, -2, 4});
  }
  SECTION("too few slots") {
    view.extents[2] = 3;
    fails(errc::shape_mismatch, {4, 3}, "room");
  }
  SECTION("other heads and sequences") {
    view.extents[1] = 2;
    fails(errc::shape_mismatch, {2, 3}, "heads");
    view.extents[1] = 3;
    view.extents[0] = 1;
    fails(errc::shape_mismatch, {1, 2}, "sequences");
    view.extents[0] = 2;
    kept.positions.extents[1] = 2;
    fails(errc::shape_mismatch, {2, 3}, "kept.positions");
    kept.positions.extents = {1, 3, 4};
    fails(errc::shape_mismatch, {1, 2}, "kept.positions");
  }
  SECTION("null pointers") {
    view.data = nullptr;
    fails(errc::missing_input, {192}, "keys");
    view = keys.view();
    kept.positions.data = nullptr;
    fails(errc::missing_input, {24}, "kept.positions");
    kept.positions.data = positions.data();
    kept.lengths.data = nullptr;
    fails(errc::missing_input, {6}, "kept.lengths");
  }
  SECTION("keys that share rows would turn twice") {
    view.strides[1] = 0;
    fails(errc::aliasing, {192, 4}, "overlaps itself");
  }
  SECTION("keys over the kept set, and over the frequencies") {
    view = tensor_view<float, 4>(reinterpret_cast<float*>(positions.data()), {2, 3, 4, 1});
    fails(errc::aliasing, {96}, "kept.positions");
    std::vector<double> table(96);
    view = tensor_view<float, 4>(reinterpret_cast<float*>(table.data()), {2, 3, 4, 8});
    check_error(rotate_keys(kept, view, std::span<const double>(table).first(4)), errc::aliasing, {768, 32},
                "frequencies");
    CHECK(positions == std::vector<position_t>(24, 17));
  }
}
