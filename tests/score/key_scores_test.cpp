// SPDX-License-Identifier: Apache-2.0
// Scores of keys and values alone: published numbers, direct evaluations in double, and what must hold for any cache.
#include "score/head_support.hpp"
#include "support/check_error.hpp"
#include "support/test_data.hpp"

#include <restkv/score/cur_dkv.hpp>
#include <restkv/score/key_diff.hpp>
#include <restkv/score/key_redundancy.hpp>
#include <restkv/score/knorm.hpp>
#include <restkv/score/lag_kv.hpp>
#include <restkv/score/leverage_score.hpp>
#include <restkv/score/value_range.hpp>

#include <nlohmann/json.hpp>

#include <numeric>

using namespace restkv_test;
using restkv::cur_leverage;
using restkv::errc;

namespace {

/// A case file's expected scores against one of a score's rows for each KV head. marked(n, length): tokens that hold a
/// marker instead of a score there.
template <class Score, class Marked>
void check_golden(const std::string& name, const Score& score, double tolerance, const Marked& marked) {
  INFO(name);
  const auto file = open_file(test_data("golden/" + name + ".safetensors"));
  const file_tensor<half, 3> k(file, "k");
  const file_tensor<half, 3> v(file, "v");
  const file_tensor<double, 2> wanted(file, "expected.score");
  const auto& n = k.view.extents;
  restkv::layer_view<half> layer;
  layer.key = tensor_view<const half, 4>(k.storage.data(), {1, n[0], n[1], n[2]});
  layer.value = tensor_view<const half, 4>(v.storage.data(), {1, n[0], n[1], n[2]});
  const problem_shape shape{.query_heads = n[0], .kv_heads = n[0], .head_dim = n[2], .tokens = n[1]};
  REQUIRE(wanted.view.extent(0) == n[0]);
  REQUIRE(wanted.view.extent(1) == n[1]);
  for (index_t h = 0; h < n[0]; ++h) {
    const auto got = scores_of<float>(score, layer, shape, 0, h);
    const auto precise = scores_of<double>(score, layer, shape, 0, h);
    double largest = 0;
    double error = 0;
    double precise_error = 0;
    index_t compared = 0;
    for (index_t t = 0; t < n[1]; ++t) {
      if (marked(t, n[1])) continue;
      ++compared;
      largest = std::max(largest, std::fabs(wanted.view(h, t)));
      error = std::max(error, std::fabs(wanted.view(h, t) - static_cast<double>(got[static_cast<std::size_t>(t)])));
      precise_error = std::max(precise_error, std::fabs(wanted.view(h, t) - precise[static_cast<std::size_t>(t)]));
    }
    CAPTURE(h, largest, error, precise_error);
    CHECK(compared > n[1] / 2);
    CHECK(error <= tolerance * largest);
    CHECK(precise_error <= tolerance * largest);
  }
}

constexpr auto none_marked = [](index_t, index_t) { return false; };

row oracle_knorm(const matrix& keys) {
  row out;
  for (const row& k : keys) out.push_back(-length_of(k));
  return out;
}

row oracle_key_diff(const matrix& keys) {
  if (keys.empty()) return {};
  row mean(keys[0].size());
  for (const row& k : keys) {
    if (!finite(k)) continue;
    for (std::size_t c = 0; c < k.size(); ++c) mean[c] += k[c] / length_of(k);
  }
  row out;
  for (const row& k : keys) {
    out.push_back(finite(k) ? -product(k, mean) / (length_of(k) * length_of(mean)) : not_a_number);
  }
  return out;
}

row oracle_value_range(const matrix& values) {
  row out;
  for (const row& v : values) {
    const bool numbers = std::none_of(v.begin(), v.end(), [](double x) { return std::isnan(x); });
    out.push_back(numbers ? *std::max_element(v.begin(), v.end()) - *std::min_element(v.begin(), v.end())
                          : not_a_number);
  }
  return out;
}

/// The softmax of each token's deviation against the next chunk; written from the formula, chunk by chunk.
row lag_shares(const matrix& x, index_t first, index_t lag) {
  const std::size_t channels = x[0].size();
  row low(channels, HUGE_VAL);
  row high(channels, -HUGE_VAL);
  for (index_t n = first + lag; n < first + 2 * lag; ++n) {
    const row& r = x[static_cast<std::size_t>(n)];
    for (std::size_t c = 0; finite(r) && c < channels; ++c) {
      low[c] = std::min(low[c], r[c]);
      high[c] = std::max(high[c], r[c]);
    }
  }
  row deviations;
  for (index_t n = first; n < first + lag; ++n) {
    const row& r = x[static_cast<std::size_t>(n)];
    if (!finite(r)) {
      deviations.push_back(not_a_number);
      continue;
    }
    row scaled;
    for (std::size_t c = 0; c < channels; ++c) {
      scaled.push_back(high[c] > low[c] ? (r[c] - low[c]) / (high[c] - low[c]) : 0);
    }
    const double mean = std::accumulate(scaled.begin(), scaled.end(), 0.0) / static_cast<double>(channels);
    double squares = 0;
    for (const double s : scaled) squares += (s - mean) * (s - mean);
    deviations.push_back(channels < 2 ? 0 : std::sqrt(squares / static_cast<double>(channels - 1)));
  }
  double sum = 0;
  for (const double x_n : deviations) sum += std::isnan(x_n) ? 0 : std::exp(x_n);
  for (double& x_n : deviations) x_n = std::exp(x_n) / sum;
  return deviations;
}

auto oracle_lag_kv(const restkv::lag_kv& how) {
  return [how](const matrix& keys, const matrix& values, index_t, index_t) {
    const auto length = static_cast<index_t>(keys.size());
    row out(keys.size(), 1.0);
    if (length < how.sink + 2 * how.lag) {
      for (index_t n = how.sink; n < length; ++n) {
        out[static_cast<std::size_t>(n)] = static_cast<double>(n - how.sink) / static_cast<double>(length - how.sink);
      }
      return out;
    }
    for (index_t first = how.sink; first + 2 * how.lag <= length; first += how.lag) {
      const row k = lag_shares(keys, first, how.lag);
      const row v = lag_shares(values, first, how.lag);
      for (std::size_t i = 0; i < k.size(); ++i) {
        const double score = k[i] / 2 + v[i] / 2;
        index_t smaller = 0;
        for (std::size_t j = 0; j < k.size(); ++j) {
          const double other = k[j] / 2 + v[j] / 2;
          smaller += other < score || (other == score && j > i) ? 1 : 0;
        }
        const double rank = static_cast<double>(smaller) / static_cast<double>(how.lag);
        out[static_cast<std::size_t>(first) + i] = std::isnan(score) ? not_a_number : how.cross_scoring ? score : rank;
      }
    }
    return out;
  };
}

auto oracle_cur_dkv(const restkv::cur_dkv& how) {
  return [how](const matrix& keys, const matrix& values, index_t, index_t) {
    const auto shares = [&](const matrix& x) {
      row out(x.size());
      const std::size_t width = how.local_window == 0 ? x.size() : static_cast<std::size_t>(how.local_window);
      for (std::size_t n = 0; n < x.size(); ++n) {
        double sum = 0;
        for (std::size_t m = n / width * width; m < std::min(x.size(), n / width * width + width); ++m) {
          if (finite(x[m])) sum += product(x[m], x[m]);
        }
        out[n] = finite(x[n]) ? product(x[n], x[n]) / sum : not_a_number;
      }
      return out;
    };
    const row p = shares(keys);
    const row q = shares(values);
    row out(keys.size());
    double sum = 0;
    for (std::size_t n = 0; n < out.size(); ++n) {
      out[n] = how.leverage == cur_leverage::key     ? p[n]
               : how.leverage == cur_leverage::value ? q[n]
               : how.leverage == cur_leverage::mean  ? (p[n] + q[n]) / 2
                                                     : p[n] * q[n];
      if (!std::isnan(out[n])) sum += out[n];
    }
    for (double& x : out) x /= sum;
    return out;
  };
}

/// x^T (X^T X + ridge I)^-1 x by Gauss-Jordan elimination.
row leverage_of(matrix x, double ridge) {
  row out(x.size(), not_a_number);
  std::vector<std::size_t> at;
  for (std::size_t n = 0; n < x.size(); ++n) {
    if (finite(x[n])) at.push_back(n);
  }
  if (at.empty()) return out;
  const std::size_t d = x[0].size();
  row mean(d);
  for (const std::size_t n : at) {
    for (std::size_t c = 0; c < d; ++c) mean[c] += x[n][c] / static_cast<double>(at.size());
  }
  matrix a(d, row(2 * d));
  for (const std::size_t n : at) {
    for (std::size_t c = 0; c < d; ++c) x[n][c] -= mean[c];
    for (std::size_t r = 0; r < d; ++r) {
      for (std::size_t c = 0; c < d; ++c) a[r][c] += x[n][r] * x[n][c];
    }
  }
  for (std::size_t r = 0; r < d; ++r) {
    a[r][r] += ridge;
    a[r][d + r] = 1;
  }
  for (std::size_t p = 0; p < d; ++p) {
    for (std::size_t r = 0; r < d; ++r) {
      const double factor = a[r][p] / a[p][p];
      for (std::size_t c = 0; r != p && c < 2 * d; ++c) a[r][c] -= factor * a[p][c];
    }
  }
  for (const std::size_t n : at) {
    out[n] = 0;
    for (std::size_t r = 0; r < d; ++r) {
      for (std::size_t c = 0; c < d; ++c) out[n] += x[n][r] * a[r][d + c] / a[r][r] * x[n][c];
    }
  }
  return out;
}

auto oracle_redundancy(const restkv::key_redundancy& how) {
  return [how](const matrix& keys, const matrix&, index_t, index_t) {
    std::vector<std::size_t> at;
    for (std::size_t n = 0; n < keys.size(); ++n) {
      if (finite(keys[n])) at.push_back(n);
    }
    matrix similar(keys.size(), row(keys.size()));
    for (const std::size_t i : at) {
      index_t found = 0;
      for (auto j = at.rbegin(); j != at.rend(); ++j) {
        if (*j == i) continue;
        const double cosine = product(keys[i], keys[*j]) / (length_of(keys[i]) * length_of(keys[*j]));
        const bool excused = cosine > how.threshold && found < how.recent;
        found += excused ? 1 : 0;
        similar[i][*j] = excused ? 0 : cosine;
      }
    }
    row out(keys.size(), not_a_number);
    double sum = 0;
    for (const std::size_t j : at) {
      double mean = 0;
      for (const std::size_t i : at) mean += similar[i][j] / static_cast<double>(at.size());
      out[j] = std::exp(mean);
      sum += out[j];
    }
    for (double& x : out) x /= -sum;
    return out;
  };
}

}  // namespace

TEST_CASE("Published scores of keys and values") {
  for (const char* number : {"0", "1", "2"}) {
    check_golden(std::string("knorm-") + number, restkv::knorm{}, 1e-6, none_marked);
    check_golden(std::string("keydiff-") + number, restkv::key_diff{}, 2e-6, none_marked);
    // Sinks, the last chunk and what is behind it are a part of the score: nothing is a marker.
    check_golden(std::string("lagkv-") + number, restkv::lag_kv{.sink = 4, .lag = 32}, 1e-7, none_marked);
    check_golden(std::string("curdkv-") + number, restkv::cur_dkv{}, 1e-6, [](index_t n, index_t) { return n < 4; });
  }
}

TEST_CASE("knorm") {
  check_score(always(restkv::knorm{}), always([](const matrix& keys, const matrix&, index_t, index_t) {
                return oracle_knorm(keys);
              }));
}

TEST_CASE("key_diff") {
  check_score(always(restkv::key_diff{}), always([](const matrix& keys, const matrix&, index_t, index_t) {
                return oracle_key_diff(keys);
              }));
}

TEST_CASE("value_range") {
  check_score(always(restkv::value_range{}), always([](const matrix&, const matrix& values, index_t, index_t) {
                return oracle_value_range(values);
              }));
}

TEST_CASE("lag_kv") {
  for (const bool cross : {false, true}) {
    for (const restkv::lag_kv how : {restkv::lag_kv{.sink = 4, .lag = 8, .cross_scoring = cross},
                                     restkv::lag_kv{.sink = 0, .lag = 1, .cross_scoring = cross},
                                     restkv::lag_kv{.sink = 2, .lag = 29, .cross_scoring = cross},
                                     restkv::lag_kv{.cross_scoring = cross}}) {
      CAPTURE(how.sink, how.lag, cross);
      check_score(always(how), always(oracle_lag_kv(how)));
    }
  }
}

TEST_CASE("lag_kv: ties rank the earlier token higher, channels without a range do not count") {
  std::vector<float> ones(8 * 4, 1.0f);
  restkv::layer_view<float> layer;
  layer.key = layer.value = tensor_view<const float, 4>(ones.data(), {1, 1, 8, 4});
  const problem_shape shape{.query_heads = 1, .kv_heads = 1, .head_dim = 4, .tokens = 8};
  const auto scores = scores_of<float>(restkv::lag_kv{.sink = 0, .lag = 4}, layer, shape, 0, 0);
  CHECK(scores == std::vector<float>{0.75f, 0.5f, 0.25f, 0, 1, 1, 1, 1});
}

TEST_CASE("cur_dkv") {
  for (const auto leverage : {cur_leverage::key, cur_leverage::value, cur_leverage::mean, cur_leverage::product}) {
    for (const index_t window : {0, 1, 7, 16}) {
      CAPTURE(static_cast<int>(leverage), window);
      const restkv::cur_dkv how{.leverage = leverage, .local_window = window};
      check_score(always(how), always(oracle_cur_dkv(how)));
    }
  }
}

TEST_CASE("leverage_score, exact") {
  const restkv::leverage_score how{.sketch = 0};
  check_score(always(how), always([](const matrix& keys, const matrix&, index_t, index_t) {
                return leverage_of(keys, 0.01);
              }));
}

TEST_CASE("leverage_score adds up to the dimension of the keys, whatever their scale and direction") {
  random_engine random(3);
  const random_cache<double> cache(random, {.kv_heads = 1, .group = 1, .head_dim = 24, .tokens = 300, .spread = 1000});
  const auto sum_of = [&](const restkv::leverage_score& how) {
    const auto scores = scores_of<double>(how, cache.layer, cache.shape, 0, 0);
    for (const double score : scores) CHECK((score >= 0 && score < 1));
    return std::accumulate(scores.begin(), scores.end(), 0.0);
  };
  CHECK(sum_of({.sketch = 0, .ridge = 1e-9}) == Approx(24).epsilon(1e-6));
  CHECK(sum_of({.sketch = 10, .ridge = 1e-9}) == Approx(10).epsilon(1e-6));
  CHECK(sum_of({.sketch = 48}) < 24.0001);
}

TEST_CASE("leverage_score's sketch: the exact score of the keys times a matrix of signs") {
  random_engine random(5);
  const random_cache<float> cache(random, {.batch = 2, .group = 1, .head_dim = 2, .tokens = 12});
  std::vector<unsigned> drawn;
  for (const std::uint64_t seed : {0, 1, 2, 3, 4, 5, 6, 7}) {
    for (const index_t b : {0, 1}) {
      for (const index_t h : {0, 1}) {
        const restkv::leverage_score how{.sketch = 3, .ridge = 0.5, .seed = seed};
        const auto got = scores_of<double>(how, cache.layer, cache.shape, b, h);
        CHECK(got == scores_of<double>(how, cache.layer, cache.shape, b, h));
        // One of the 2^6 matrices gives these scores.
        unsigned signs = 0;
        for (; signs < 64; ++signs) {
          matrix x;
          for (const row& k : cache.rows(cache.key, b, h)) {
            x.emplace_back();
            for (unsigned j = 0; j < 3; ++j) {
              x.back().push_back(((signs >> j & 1u) != 0 ? k[0] : -k[0]) / std::sqrt(3.0) +
                                 ((signs >> (3 + j) & 1u) != 0 ? k[1] : -k[1]) / std::sqrt(3.0));
            }
          }
          const row wanted = leverage_of(x, 0.5);
          double error = 0;
          for (std::size_t n = 0; n < got.size(); ++n) error = std::max(error, std::fabs(got[n] - wanted[n]));
          if (error < 1e-12) break;
        }
        CHECK(signs < 64);
        drawn.push_back(signs);
      }
    }
  }
  // Matrices that differ in signs and order of columns give the same scores: 4 kinds are left.
  std::sort(drawn.begin(), drawn.end());
  drawn.erase(std::unique(drawn.begin(), drawn.end()), drawn.end());
  CHECK(drawn.size() >= 3);
}

TEST_CASE("leverage_score, standardised: mean 0 and deviation 1, in the same order") {
  random_engine random(6);
  const random_cache<half> cache(random, {.tokens = 200});
  const auto raw = scores_of<double>(restkv::leverage_score{}, cache.layer, cache.shape, 0, 0);
  const auto got = scores_of<double>(restkv::leverage_score{.standardised = true}, cache.layer, cache.shape, 0, 0);
  const double mean = std::accumulate(got.begin(), got.end(), 0.0) / 200;
  double squares = 0;
  for (const double x : got) squares += (x - mean) * (x - mean);
  CHECK(mean == Approx(0).margin(1e-12));
  CHECK(squares / 199 == Approx(1));
  for (std::size_t n = 1; n < raw.size(); ++n) CHECK((raw[n] > raw[n - 1]) == (got[n] > got[n - 1]));
}

TEST_CASE("key_redundancy") {
  for (const double threshold : {0.5, 0.9, -0.2}) {
    for (const index_t recent : {0, 1, 3}) {
      CAPTURE(threshold, recent);
      const restkv::key_redundancy how{.threshold = threshold, .recent = recent};
      check_score(always(how), always(oracle_redundancy(how)));
      check_score(always(how), always(oracle_redundancy(how)), 2e-5, {.tokens = 150, .spread = 0.3});
    }
  }
}

TEST_CASE("key_redundancy: a key of 0 resembles none") {
  std::vector<float> rows{1, 0, 0, 0, -2, 0};
  restkv::layer_view<float> layer;
  layer.key = tensor_view<const float, 4>(rows.data(), {1, 1, 3, 2});
  const problem_shape shape{.query_heads = 1, .kv_heads = 1, .head_dim = 2, .tokens = 3};
  const double least = std::exp(-1.0 / 3);  // the cosine of the others is -1
  const double sum = 1 + 2 * least;
  for (const index_t recent : {0, 2}) {
    check_row(scores_of<double>(restkv::key_redundancy{.recent = recent}, layer, shape, 0, 0),
              {-least / sum, -1 / sum, -least / sum}, 1e-12);
  }
}

TEST_CASE("Keys that hold nothing, and keys at the ends of a float's range") {
  const float tiny = std::numeric_limits<float>::denorm_min();
  const float huge = std::numeric_limits<float>::max();
  std::vector<float> rows{0, 0, 0, tiny, huge, huge, -huge, huge, 1, 2, 3, -1, 1e-30f, 1e-30f, -1e30f, 1e-30f};
  restkv::layer_view<float> layer;
  layer.key = layer.value = tensor_view<const float, 4>(rows.data(), {1, 1, 8, 2});
  const problem_shape shape{.query_heads = 1, .kv_heads = 1, .head_dim = 2, .tokens = 8};
  const auto check = [&](const auto& score, const char* name) {
    INFO(name);
    for (const double x : scores_of<double>(score, layer, shape, 0, 0)) CHECK(std::isfinite(x));
    for (const float x : scores_of<float>(score, layer, shape, 0, 0)) CHECK(!std::isnan(x));
  };
  check(restkv::knorm{}, "knorm");
  check(restkv::key_diff{}, "key_diff");
  check(restkv::value_range{}, "value_range");
  check(restkv::lag_kv{.sink = 0, .lag = 2}, "lag_kv");
  check(restkv::lag_kv{.sink = 0, .lag = 2, .cross_scoring = true}, "lag_kv across chunks");
  check(restkv::cur_dkv{.local_window = 2}, "cur_dkv");
  check(restkv::leverage_score{}, "leverage_score");
  check(restkv::leverage_score{.sketch = 0, .standardised = true}, "leverage_score, exact");
  check(restkv::key_redundancy{}, "key_redundancy");
  CHECK(scores_of<float>(restkv::knorm{}, layer, shape, 0, 0)[6] == Approx(-1.41421356e-30f).margin(0));
  CHECK(scores_of<float>(restkv::knorm{}, layer, shape, 0, 0)[1] == -tiny);
  CHECK(scores_of<float>(restkv::key_diff{}, layer, shape, 0, 0)[0] == 0);
}

TEST_CASE("Scores of a set of keys do not depend on their order") {
  random_engine random(8);
  const index_t tokens = 90;
  const random_cache<float> cache(random, {.kv_heads = 1, .group = 1, .tokens = tokens});
  std::vector<index_t> order(static_cast<std::size_t>(tokens));
  std::iota(order.begin(), order.end(), index_t{0});
  std::shuffle(order.begin(), order.end(), random);
  std::vector<float> key;
  std::vector<float> value;
  for (const index_t n : order) {
    for (index_t c = 0; c < 8; ++c) {
      key.push_back(cache.key.view()(0, 0, n, c));
      value.push_back(cache.value.view()(0, 0, n, c));
    }
  }
  restkv::layer_view<float> layer;
  layer.key = tensor_view<const float, 4>(key.data(), {1, 1, tokens, 8});
  layer.value = tensor_view<const float, 4>(value.data(), {1, 1, tokens, 8});
  const auto check = [&](const auto& score) {
    const auto before = scores_of<double>(score, cache.layer, cache.shape, 0, 0);
    row wanted;
    for (const index_t n : order) wanted.push_back(before[static_cast<std::size_t>(n)]);
    check_row(scores_of<double>(score, layer, cache.shape, 0, 0), wanted, 1e-10);
  };
  check(restkv::knorm{});
  check(restkv::key_diff{});
  check(restkv::value_range{});
  check(restkv::cur_dkv{.local_window = 0});
  check(restkv::leverage_score{});
  check(restkv::key_redundancy{.recent = 0});
}

TEST_CASE("Parameters of scores of keys and values outside their ranges") {
  check_error(restkv::lag_kv{.sink = -1}.check(), errc::invalid_argument, {-1, 0}, "sink");
  check_error(restkv::lag_kv{.lag = 0}.check(), errc::invalid_argument, {0, 1}, "lag");
  check_error(restkv::cur_dkv{.local_window = -3}.check(), errc::invalid_argument, {-3, 0}, "local_window");
  check_error(restkv::leverage_score{.sketch = 5000}.check(), errc::invalid_argument, {5000, 4096}, "sketch");
  check_error(restkv::leverage_score{.ridge = 0}.check(), errc::invalid_argument, {0}, "ridge");
  check_error(restkv::key_redundancy{.recent = -1}.check(), errc::invalid_argument, {-1, 0}, "recent");
  check_error(restkv::key_redundancy{.threshold = 2}.check(), errc::invalid_argument, {2, 1}, "threshold");
  CHECK(restkv::lag_kv{}.check().ok());
  CHECK(restkv::cur_dkv{}.check().ok());
  CHECK(restkv::leverage_score{}.check().ok());
  CHECK(restkv::key_redundancy{}.check().ok());
}
