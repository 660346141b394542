// SPDX-License-Identifier: Apache-2.0
// Scores that are given something beside the cache: statistics of queries, filters, an array of scores.
#include "score/head_support.hpp"
#include "support/check_error.hpp"

#include <restkv/score/cap_kv.hpp>
#include <restkv/score/compactor.hpp>
#include <restkv/score/expected_attention.hpp>
#include <restkv/score/given_scores.hpp>
#include <restkv/score/q_filter.hpp>
#include <restkv/score/query_statistics.hpp>

#include <numbers>
#include <numeric>

using namespace restkv_test;
using restkv::errc;
using restkv::rotary_pairs;
using restkv::score_rows;

namespace {

/// Random means and covariances for a plan, with their memory.
struct random_statistics {
  random_statistics(random_engine& random, const problem_shape& shape)
      : mean(random, {shape.batch, shape.query_heads, shape.head_dim}, {}),
        covariance(random, {shape.batch, shape.query_heads, shape.head_dim, shape.head_dim}, {}) {
    for_each(mean.view(), [&](double& x) { x = normal(random); });
    for (index_t b = 0; b < shape.batch; ++b) {
      for (index_t h = 0; h < shape.query_heads; ++h) {
        matrix factor(static_cast<std::size_t>(shape.head_dim), row(static_cast<std::size_t>(shape.head_dim)));
        for (row& r : factor) {
          for (double& x : r) x = 0.5 * normal(random);
        }
        for (index_t r = 0; r < shape.head_dim; ++r) {
          for (index_t c = 0; c < shape.head_dim; ++c) {
            covariance.view()(b, h, r, c) =
                product(factor[static_cast<std::size_t>(r)], factor[static_cast<std::size_t>(c)]) +
                (r < c ? 0.3 : 0);  // not symmetric: a quadratic form does not mind
          }
        }
      }
    }
  }
  guarded_tensor<double, 3> mean;
  guarded_tensor<double, 4> covariance;
};

row softmax(const row& logits) {
  double largest = -HUGE_VAL;
  for (const double x : logits) largest = std::isnan(x) ? largest : std::max(largest, x);
  double sum = 0;
  row out;
  for (const double x : logits) {
    out.push_back(std::exp(x - largest));
    if (!std::isnan(x)) sum += out.back();
  }
  for (double& x : out) x /= sum;
  return out;
}

/// The first `sink` entries become the largest of the others.
void raise_sinks(row& scores, std::size_t sink) {
  double most = 0;
  for (std::size_t n = sink; n < scores.size(); ++n) most = std::isnan(scores[n]) ? most : std::max(most, scores[n]);
  std::fill(scores.begin(), scores.begin() + static_cast<std::ptrdiff_t>(std::min(sink, scores.size())), most);
}

auto oracle_expected_attention(const restkv::expected_attention& how) {
  return [how](const matrix& keys, const matrix& values, index_t b, index_t h) {
    const auto sink = static_cast<std::size_t>(how.sink);
    row logits;
    for (std::size_t n = sink; n < keys.size(); ++n) {
      const row& k = keys[n];
      const auto d = static_cast<index_t>(k.size());
      double linear = 0;
      double quadratic = 0;
      for (index_t r = 0; r < d; ++r) {
        linear += how.mean(b, h, r) * k[static_cast<std::size_t>(r)];
        for (index_t c = 0; how.use_covariance && c < d; ++c) {
          quadratic += k[static_cast<std::size_t>(r)] * how.covariance(b, h, r, c) * k[static_cast<std::size_t>(c)];
        }
      }
      const auto size = static_cast<double>(d);
      logits.push_back(finite(k) ? linear / std::sqrt(size) + quadratic / (2 * size) : not_a_number);
    }
    const row shares = softmax(logits);
    row out(std::min(sink, keys.size()));
    for (std::size_t n = sink; n < keys.size(); ++n) {
      const double share = shares[n - sink];
      out.push_back(!how.use_value_norm  ? share
                    : finite(values[n]) ? (share + how.epsilon) * length_of(values[n])
                                        : not_a_number);
    }
    raise_sinks(out, sink);
    return out;
  };
}

/// w v^T M^-1 v by Gauss-Jordan elimination.
auto oracle_cap_kv(const restkv::cap_kv& how) {
  return [how](const matrix& keys, const matrix& values, index_t b, index_t h) {
    const auto sink = static_cast<std::size_t>(how.sink);
    row query;
    for (index_t c = 0; c < how.mean.extent(2); ++c) query.push_back(how.mean(b, h, c));
    row weights(keys.size(), not_a_number);
    double largest = -HUGE_VAL;
    for (std::size_t n = sink; n < keys.size(); ++n) {
      if (!finite(keys[n])) continue;
      weights[n] = product(query, keys[n]);
      if (how.cosine) weights[n] /= length_of(query) * length_of(keys[n]);
      largest = std::max(largest, weights[n]);
    }
    const std::size_t d = query.size();
    matrix a(d, row(2 * d));
    for (std::size_t r = 0; r < d; ++r) a[r][r] = a[r][d + r] = 1;
    for (std::size_t n = sink; n < keys.size(); ++n) {
      weights[n] = finite(values[n]) ? std::exp(how.tau * (weights[n] - largest)) : not_a_number;
      for (std::size_t r = 0; !std::isnan(weights[n]) && r < d; ++r) {
        for (std::size_t c = 0; c < d; ++c) a[r][c] += weights[n] * values[n][r] * values[n][c];
      }
    }
    for (std::size_t p = 0; p < d; ++p) {
      for (std::size_t r = 0; r < d; ++r) {
        const double factor = a[r][p] / a[p][p];
        for (std::size_t c = 0; r != p && c < 2 * d; ++c) a[r][c] -= factor * a[p][c];
      }
    }
    row out(keys.size());
    for (std::size_t n = sink; n < keys.size(); ++n) {
      for (std::size_t r = 0; r < d; ++r) {
        for (std::size_t c = 0; c < d; ++c) {
          out[n] += weights[n] * values[n][r] * a[r][d + c] / a[r][r] * values[n][c];
        }
      }
    }
    raise_sinks(out, sink);
    return out;
  };
}

/// Random queries [2, 4, rows, 6] with means and dependent channels.
template <class T>
guarded_tensor<T, 4> random_queries(random_engine& random, index_t rows) {
  guarded_tensor<T, 4> queries(random, {2, 4, rows, 6}, {.reversed_axes = true});
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < rows; ++i) {
        double last = static_cast<double>(h) - 1;
        for (index_t c = 0; c < 6; ++c) {
          last = 0.7 * last + normal(random);
          queries.view()(b, h, i, c) = restkv::narrow<T>(last);
        }
      }
    }
  }
  return queries;
}

row query_of(const auto& queries, index_t b, index_t h, index_t i) {
  row out;
  for (index_t c = 0; c < queries.extent(3); ++c) out.push_back(restkv::widen<double>(queries(b, h, i, c)));
  return out;
}

/// x turned to a position, pair i by position * frequencies[i].
row turned(row x, const row& frequencies, rotary_pairs pairing, double position) {
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const std::size_t a = pairing == rotary_pairs::interleaved ? 2 * i : i;
    const std::size_t b = pairing == rotary_pairs::interleaved ? 2 * i + 1 : i + frequencies.size();
    const double s = std::sin(position * frequencies[i]);
    const double c = std::cos(position * frequencies[i]);
    const double turned_a = c * x[a] - s * x[b];
    x[b] = s * x[a] + c * x[b];
    x[a] = turned_a;
  }
  return x;
}

/// Statistics of queries from `skip` on: mean, and covariance row by row.
std::pair<row, matrix> plain_statistics(const matrix& queries, std::size_t skip) {
  const std::size_t d = queries[0].size();
  const auto count = static_cast<double>(queries.size() - skip);
  row mean(d);
  matrix covariance(d, row(d));
  for (std::size_t i = skip; i < queries.size(); ++i) {
    for (std::size_t c = 0; c < d; ++c) mean[c] += queries[i][c] / count;
  }
  for (std::size_t i = skip; i < queries.size(); ++i) {
    for (std::size_t r = 0; r < d; ++r) {
      for (std::size_t c = 0; c < d; ++c) {
        covariance[r][c] += (queries[i][r] - mean[r]) * (queries[i][c] - mean[c]) / count;
      }
    }
  }
  return {mean, covariance};
}

struct statistics_memory {
  std::vector<double> mean = std::vector<double>(2 * 4 * 6, -1);
  std::vector<double> covariance = std::vector<double>(2 * 4 * 6 * 6, -1);
  restkv::query_statistics_view view{{mean.data(), {2, 4, 6}}, {covariance.data(), {2, 4, 6, 6}}};
  std::vector<double> scratch = std::vector<double>(static_cast<std::size_t>(restkv::query_statistics_scratch(6)));
};

void check_statistics(const restkv::query_statistics_view& got, index_t b, index_t h,
                      const std::pair<row, matrix>& wanted, double tolerance = 1e-12) {
  for (index_t r = 0; r < 6; ++r) {
    CHECK(std::fabs(got.mean(b, h, r) - wanted.first[static_cast<std::size_t>(r)]) < tolerance);
    for (index_t c = 0; c < 6; ++c) {
      CHECK(std::fabs(got.covariance(b, h, r, c) -
                      wanted.second[static_cast<std::size_t>(r)][static_cast<std::size_t>(c)]) < tolerance);
    }
  }
}

}  // namespace

TEST_CASE("query_statistics: mean and covariance of the queries behind the first") {
  random_engine random(1);
  const auto queries = random_queries<half>(random, 23);
  statistics_memory memory;
  for (const index_t skip : {0, 4, 22}) {
    REQUIRE(restkv::query_statistics(queries.read(), memory.view, memory.scratch, skip).ok());
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        matrix rows;
        for (index_t i = 0; i < 23; ++i) rows.push_back(query_of(queries.read(), b, h, i));
        check_statistics(memory.view, b, h, plain_statistics(rows, static_cast<std::size_t>(skip)));
      }
    }
  }
}

TEST_CASE("query_statistics turns queries back, and average_rope turns what comes out to where queries will be") {
  random_engine random(2);
  const row frequencies{1.0, 0.03, 0.002};
  const auto plain = random_queries<double>(random, 19);
  for (const auto pairing : {rotary_pairs::half_split, rotary_pairs::interleaved}) {
    // Queries at positions 100, 101, ...
    auto carried = random_queries<double>(random, 19);
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        for (index_t i = 0; i < 19; ++i) {
          const row x = turned(query_of(plain.read(), b, h, i), frequencies, pairing, static_cast<double>(100 + i));
          for (index_t c = 0; c < 6; ++c) carried.view()(b, h, i, c) = x[static_cast<std::size_t>(c)];
        }
      }
    }
    statistics_memory memory;
    const restkv::carried_rope rope{frequencies, pairing, 100};
    REQUIRE(restkv::query_statistics(carried.read(), memory.view, memory.scratch, 4, rope).ok());
    std::vector<std::pair<row, matrix>> wanted;
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        matrix rows;
        for (index_t i = 0; i < 19; ++i) rows.push_back(query_of(plain.read(), b, h, i));
        wanted.push_back(plain_statistics(rows, 4));
        check_statistics(memory.view, b, h, wanted.back());
      }
    }
    // R column by column: the mean of unit vectors turned to 200, 201, ..., 231.
    matrix rotation(6, row(6));
    for (std::size_t c = 0; c < 6; ++c) {
      row unit(6);
      unit[c] = 1;
      for (int position = 200; position < 232; ++position) {
        const row image = turned(unit, frequencies, pairing, position);
        for (std::size_t r = 0; r < 6; ++r) rotation[r][c] += image[r] / 32;
      }
    }
    REQUIRE(restkv::average_rope(frequencies, pairing, 200, 32, memory.view).ok());
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        const auto& [mean, covariance] = wanted[static_cast<std::size_t>(4 * b + h)];
        std::pair<row, matrix> moved{row(6), matrix(6, row(6))};
        for (std::size_t r = 0; r < 6; ++r) {
          moved.first[r] = product(rotation[r], mean);
          for (std::size_t c = 0; c < 6; ++c) {
            for (std::size_t x = 0; x < 6; ++x) {
              for (std::size_t y = 0; y < 6; ++y) {
                moved.second[r][c] += rotation[r][x] * covariance[x][y] * rotation[c][y];
              }
            }
          }
        }
        check_statistics(memory.view, b, h, moved);
      }
    }
  }
}

TEST_CASE("query_statistics: a partial rotary dimension, rows that are not finite, no covariance") {
  random_engine random(3);
  auto queries = random_queries<float>(random, 12);
  const row frequencies{0.5};
  matrix rows;
  for (index_t i = 0; i < 12; ++i) {
    if (i == 5 || i == 9) {
      queries.view()(1, 2, i, i == 5 ? 0 : 5) = i == 5 ? std::nanf("") : HUGE_VALF;
      continue;
    }
    rows.push_back(turned(query_of(queries.read(), 1, 2, i), frequencies, rotary_pairs::half_split,
                          -static_cast<double>(i)));
  }
  statistics_memory memory;
  REQUIRE(restkv::query_statistics(queries.read(), memory.view, memory.scratch, 0, {.frequencies = frequencies}).ok());
  check_statistics(memory.view, 1, 2, plain_statistics(rows, 0));
  const std::vector<double> mean = memory.mean;
  memory.view.covariance = {};
  REQUIRE(restkv::query_statistics(queries.read(), memory.view, memory.scratch, 0, {.frequencies = frequencies}).ok());
  CHECK(memory.mean == mean);
  for (index_t i = 0; i < 12; ++i) queries.view()(0, 0, i, 3) = std::nanf("");
  REQUIRE(restkv::query_statistics(queries.read(), memory.view, memory.scratch, 0).ok());
  for (std::size_t c = 0; c < 6; ++c) CHECK(memory.mean[c] == 0);
}

TEST_CASE("expected_attention") {
  random_engine random(4);
  for (const bool covariance : {true, false}) {
    for (const bool value_norm : {true, false}) {
      std::vector<std::unique_ptr<random_statistics>> owners;
      const auto make = [&](const problem_shape& shape) {
        owners.push_back(std::make_unique<random_statistics>(random, shape));
        return restkv::expected_attention{.mean = owners.back()->mean.read(),
                                          .covariance = owners.back()->covariance.read(),
                                          .sink = covariance ? 4 : 0,
                                          .use_covariance = covariance,
                                          .use_value_norm = value_norm,
                                          .epsilon = value_norm ? 0.01 : 0};
      };
      restkv::expected_attention last;
      check_score([&](const problem_shape& shape) { return last = make(shape); },
                  [&](const problem_shape&) { return oracle_expected_attention(last); }, 1e-4);
    }
  }
}

TEST_CASE("expected_attention of a single query is its attention") {
  random_engine random(5);
  const random_cache<float> cache(random, {.kv_heads = 1, .group = 1, .tokens = 50});
  const random_statistics statistics(random, cache.shape);
  const restkv::expected_attention score{
      .mean = statistics.mean.read(), .sink = 0, .use_covariance = false, .use_value_norm = false};
  REQUIRE(score.check(cache.shape).ok());
  row query;
  for (index_t c = 0; c < 8; ++c) query.push_back(statistics.mean.view()(0, 0, c));
  row logits;
  for (const row& k : cache.rows(cache.key, 0, 0)) logits.push_back(product(query, k) / std::sqrt(8.0));
  check_row(scores_of<double>(score, cache.layer, cache.shape, 0, 0), softmax(logits), 1e-12);
}

TEST_CASE("expected_attention is the mean of exp(logit) over normal queries") {
  // With the mean and covariance of the law, not of the sample: numerator and denominator by sampling.
  random_engine random(6);
  const random_cache<double> cache(random, {.kv_heads = 1, .group = 1, .head_dim = 2, .tokens = 6});
  std::vector<double> mean{0.5, -0.3};
  std::vector<double> covariance{1, 0.5, 0.5, 1.25};  // of (x, x / 2 + y)
  const restkv::expected_attention score{.mean = {mean.data(), {1, 1, 2}},
                                         .covariance = {covariance.data(), {1, 1, 2, 2}},
                                         .sink = 0,
                                         .use_value_norm = false};
  const matrix keys = cache.rows(cache.key, 0, 0);
  row sums(6);
  for (int i = 0; i < 200000; ++i) {
    const double x = normal(random);
    const double y = normal(random);
    const row query{0.5 + x, -0.3 + x / 2 + y};
    for (std::size_t n = 0; n < 6; ++n) sums[n] += std::exp(product(query, keys[n]) / std::numbers::sqrt2);
  }
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
  for (double& x : sums) x /= total;
  check_row(scores_of<double>(score, cache.layer, cache.shape, 0, 0), sums, 0.02);
}

TEST_CASE("cap_kv") {
  random_engine random(7);
  for (const bool cosine : {true, false}) {
    std::vector<std::unique_ptr<random_statistics>> owners;
    restkv::cap_kv last;
    check_score(
        [&](const problem_shape& shape) {
          owners.push_back(std::make_unique<random_statistics>(random, shape));
          return last = {.mean = owners.back()->mean.read(), .tau = cosine ? 5 : 0.5, .sink = cosine ? 4 : 0,
                         .cosine = cosine};
        },
        [&](const problem_shape&) { return oracle_cap_kv(last); }, 1e-4);
  }
}

TEST_CASE("cap_kv with equal weights is the leverage of the values") {
  // The scores add up to the trace of M^-1 (M - I).
  random_engine random(8);
  const random_cache<float> cache(random, {.kv_heads = 1, .group = 1, .tokens = 400, .spread = 30});
  const random_statistics statistics(random, cache.shape);
  const auto got = scores_of<double>(restkv::cap_kv{.mean = statistics.mean.read(), .tau = 0, .sink = 0}, cache.layer,
                                     cache.shape, 0, 0);
  for (const double score : got) CHECK((score > 0 && score < 1));
  CHECK(std::accumulate(got.begin(), got.end(), 0.0) == Approx(8).epsilon(0.01));
}

TEST_CASE("q_filter") {
  random_engine random(9);
  std::vector<std::vector<float>> owners;
  restkv::q_filter last;
  check_score(
      [&](const problem_shape& shape) {
        owners.emplace_back();
        for (index_t i = 0; i < std::max<index_t>(shape.kv_heads * shape.head_dim, 1); ++i) {
          owners.back().push_back(static_cast<float>(normal(random)));
        }
        return last = {.filters = {owners.back().data(), {shape.kv_heads, shape.head_dim}}};
      },
      [&](const problem_shape& shape) {
        return [filters = last.filters, group = shape.group()](const matrix& keys, const matrix&, index_t, index_t h) {
          row filter;
          for (index_t c = 0; c < filters.extent(1); ++c) {
            filter.push_back(static_cast<double>(filters(h / group, c)));
          }
          row out;
          for (const row& k : keys) out.push_back(product(k, filter));
          return out;
        };
      });
}

TEST_CASE("find_q_filters: the leading direction of the queries, towards them") {
  random_engine random(10);
  auto queries = random_queries<half>(random, 40);
  queries.view()(0, 1, 3, 2) = half(std::nanf(""));
  std::vector<float> filters(2 * 6);
  std::vector<double> scratch(static_cast<std::size_t>(restkv::q_filter_scratch(6)));
  REQUIRE(restkv::find_q_filters(queries.read(), {filters.data(), {2, 6}}, scratch).ok());
  for (std::size_t k = 0; k < 2; ++k) {
    row wanted(6);
    for (const index_t h : {static_cast<index_t>(2 * k), static_cast<index_t>(2 * k + 1)}) {
      // Power iteration on the rows themselves.
      matrix rows;
      row mean(6);
      for (index_t b = 0; b < 2; ++b) {
        for (index_t i = 0; i < 40; ++i) {
          const row q = query_of(queries.read(), b, h, i);
          if (!finite(q)) continue;
          rows.push_back(q);
          for (std::size_t c = 0; c < 6; ++c) mean[c] += q[c];
        }
      }
      row x{1, 0.9, 0.8, 0.7, 0.6, 0.5};
      for (int step = 0; step < 2000; ++step) {
        row next(6);
        for (const row& q : rows) {
          const double along = product(q, x);
          for (std::size_t c = 0; c < 6; ++c) next[c] += along * q[c];
        }
        const double size = length_of(next);
        for (std::size_t c = 0; c < 6; ++c) x[c] = next[c] / size;
      }
      const double sign = product(x, mean) < 0 ? -1 : 1;
      for (std::size_t c = 0; c < 6; ++c) wanted[c] += sign * x[c] / 2;
    }
    for (std::size_t c = 0; c < 6; ++c) CHECK(filters[6 * k + c] == Approx(wanted[c]).margin(1e-6));
  }
  // Two directions of almost the same length.
  std::vector<float> close(4 * 6);
  for (std::size_t i = 0; i < 4; ++i) {
    close[6 * i + 1] = i % 2 == 0 ? -1.0f : 0.9999f;
    close[6 * i + 4] = i % 2 == 0 ? -1.0f : -0.9999f;
  }
  std::vector<float> one(6);
  REQUIRE(restkv::find_q_filters(tensor_view<const float, 4>(close.data(), {1, 1, 4, 6}), {one.data(), {1, 6}}, scratch)
              .ok());
  for (std::size_t c = 0; c < 6; ++c) CHECK(one[c] == Approx(c == 1 || c == 4 ? -std::sqrt(0.5) : 0).margin(1e-6));
  // Without a query there is no direction.
  const tensor_view<const half, 4> none(queries.view().data, {2, 4, 0, 6});
  REQUIRE(restkv::find_q_filters(none, {filters.data(), {2, 6}}, scratch).ok());
  CHECK(filters == std::vector<float>(12, 0.0f));
}

namespace {

/// Every query of a plan, with its memory; some are not finite.
struct every_query_of {
  every_query_of(random_engine& random, const problem_shape& shape)
      : query(random, {shape.batch, shape.query_heads, shape.tokens, shape.head_dim}, {.reversed_axes = true}) {
    for_each(query.view(), [&](half& x) { x = half(static_cast<float>(0.5 * normal(random))); });
    if (query.view().size() > 8) query.view()(0, 0, shape.tokens / 2, 0) = half(std::nanf(""));
  }
  guarded_tensor<half, 4> query;
};

/// Column sums of the softmax over a chunk, mean over the group, times ||v||; NaN for what is left out.
row plain_non_causal(const restkv::non_causal_attention<half>& how, const problem_shape& shape, index_t begin,
                     const matrix& keys, const matrix& values, index_t b, index_t kv) {
  const auto length = static_cast<index_t>(keys.size());
  const index_t first = std::min(how.sink, length);
  const index_t end = std::max(first, length - how.recent);
  row out(keys.size(), not_a_number);
  for (index_t n = first; n < end; ++n) {
    const row& k = keys[static_cast<std::size_t>(n)];
    const row& v = values[static_cast<std::size_t>(n)];
    if (!finite(k) || !finite(v)) continue;
    const index_t chunk = first + (n - first) / how.chunk * how.chunk;
    double sum = 0;
    for (index_t h = kv * shape.group(); h < (kv + 1) * shape.group(); ++h) {
      for (index_t t = chunk; t < std::min(chunk + how.chunk, end); ++t) {
        const row q = query_of(how.query, b, h, begin + t);
        if (!finite(q)) continue;
        double total = 0;
        for (index_t m = chunk; m < std::min(chunk + how.chunk, end); ++m) {
          const row& other = keys[static_cast<std::size_t>(m)];
          if (finite(other) && finite(values[static_cast<std::size_t>(m)])) total += std::exp(product(q, other));
        }
        sum += std::exp(product(q, k)) / total;
      }
    }
    out[static_cast<std::size_t>(n)] = sum / static_cast<double>(shape.group()) * length_of(v);
  }
  return out;
}

void plain_standardise(row& x) {
  double count = 0;
  double mean = 0;
  for (const double e : x) {
    if (std::isnan(e)) continue;
    ++count;
    mean += e;
  }
  mean /= count;
  double squares = 0;
  for (const double e : x) squares += std::isnan(e) ? 0 : (e - mean) * (e - mean);
  for (double& e : x) e = (e - mean) / std::max(1e-6, std::sqrt(squares / std::max(count - 1, 1.0)));
}

/// What is left out becomes the largest of the others.
row with_ends(const row& scores, index_t sink, index_t recent, double lowest) {
  const auto length = static_cast<index_t>(scores.size());
  const index_t first = std::min(sink, length);
  const index_t end = std::max(first, length - recent);
  double most = lowest;
  for (index_t n = first; n < end; ++n) {
    const double score = scores[static_cast<std::size_t>(n)];
    most = std::isnan(score) ? most : std::max(most, score);
  }
  row out = scores;
  for (index_t n = 0; n < length; ++n) {
    const bool none = most == std::numeric_limits<double>::lowest();
    if (n < first || n >= end) out[static_cast<std::size_t>(n)] = first == end || none ? 0 : most;
  }
  return out;
}

}  // namespace

TEST_CASE("non_causal_attention") {
  random_engine random(14);
  std::vector<std::unique_ptr<every_query_of>> owners;
  restkv::non_causal_attention<half> last;
  for (const index_t chunk : {1, 7, 256}) {
    const auto make = [&](const problem_shape& shape) {
      owners.push_back(std::make_unique<every_query_of>(random, shape));
      return last = {.query = owners.back()->query.read(), .chunk = chunk, .sink = chunk == 7 ? 2 : 0,
                     .recent = chunk == 7 ? 3 : 0};
    };
    const auto make_oracle = [&](const problem_shape& shape) {
      return [&, shape](const matrix& keys, const matrix& values, index_t b, index_t h, index_t begin) {
        return with_ends(plain_non_causal(last, shape, begin, keys, values, b, h / shape.group()), last.sink,
                         last.recent, 0);
      };
    };
    check_score(make, make_oracle, 1e-4);
  }
}

TEST_CASE("compactor: leverage and non-causal attention of the same tokens, each standardised") {
  random_engine random(15);
  std::vector<std::unique_ptr<every_query_of>> owners;
  restkv::compactor<half> last;
  const auto make = [&](const problem_shape& shape) {
    owners.push_back(std::make_unique<every_query_of>(random, shape));
    last.attention.query = owners.back()->query.read();
    last.attention.chunk = 16;
    last.attention.sink = 3;
    last.attention.recent = 2;
    return last;
  };
  const auto make_oracle = [&](const problem_shape& shape) {
    return [&, shape](const matrix& keys, const matrix& values, index_t b, index_t h, index_t begin) {
      row attended = plain_non_causal(last.attention, shape, begin, keys, values, b, h / shape.group());
      const row raw = attended;
      for (std::size_t n = 0; n < raw.size(); ++n) {
        for (const std::size_t other : {n - 1, n + 1}) {
          if (other < raw.size() && !std::isnan(raw[other])) attended[n] += raw[other];
        }
        attended[n] /= 3;
      }
      plain_standardise(attended);
      // The leverage is checked by itself: here, of a cache that is cut to the same tokens.
      const auto length = static_cast<index_t>(keys.size());
      const index_t first = std::min<index_t>(3, length);
      const index_t end = std::max(first, length - 2);
      std::vector<double> middle;
      for (index_t n = first; n < end; ++n) {
        const row& k = keys[static_cast<std::size_t>(n)];
        middle.insert(middle.end(), k.begin(), k.end());
      }
      middle.resize(std::max<std::size_t>(middle.size(), 1));
      restkv::layer_view<double> cut;
      // The same draws: batch and head are taken from the plan, so the views repeat.
      cut.key = tensor_view<const double, 4>(middle.data(), {shape.batch, shape.kv_heads, end - first, shape.head_dim},
                                             {0, 0, shape.head_dim, 1});
      row leverage = scores_of<double>(last.leverage, cut, shape, b, h);
      plain_standardise(leverage);
      row out(keys.size(), not_a_number);
      for (index_t n = first; n < end; ++n) {
        out[static_cast<std::size_t>(n)] =
            0.35 * leverage[static_cast<std::size_t>(n - first)] + attended[static_cast<std::size_t>(n)];
      }
      return with_ends(out, 3, 2, std::numeric_limits<double>::lowest());
    };
  };
  check_score(make, make_oracle, 1e-3);
}

TEST_CASE("given_scores: elements of the array, at the token axis") {
  random_engine random(11);
  const random_cache<half> cache(
      random, {.batch = 2, .tokens = 20, .lengths = {20, 7}, .pad = restkv::padding::left});
  const guarded_tensor<float, 3> kv(random, {2, 2, 24}, {.reversed_axes = true});
  const guarded_tensor<double, 3> query(random, {2, 4, 20}, {});
  for_each(kv.view(), [&](float& x) { x = static_cast<float>(normal(random)); });
  for_each(query.view(), [&](double& x) { x = normal(random); });
  kv.view()(1, 0, 15) = std::nanf("");
  const restkv::given_scores<> by_kv{kv.read()};
  const restkv::given_scores<score_rows::query_heads, double> by_query{query.read()};
  static_assert(!restkv::scores_query_heads<restkv::given_scores<>>());
  static_assert(restkv::scores_query_heads<decltype(by_query)>());
  CHECK(by_kv.check(cache.shape).ok());
  CHECK(by_query.check(cache.shape).ok());
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 4; ++h) {
      row from_kv;
      row from_query;
      for (index_t n = b == 0 ? 0 : 13; n < 20; ++n) {
        from_kv.push_back(static_cast<double>(kv.view()(b, h / 2, n)));
        from_query.push_back(query.view()(b, h, n));
      }
      check_row(scores_of<double>(by_kv, cache.layer, cache.shape, b, h), from_kv, 0);
      check_row(scores_of<double>(by_query, cache.layer, cache.shape, b, h), from_query, 0);
      check_row(scores_of<float>(by_query, cache.layer, cache.shape, b, h), from_query, 1e-7);
    }
  }
}

TEST_CASE("Statistics, filters and arrays that do not fit are refused, with both numbers") {
  random_engine random(12);
  const problem_shape shape{.batch = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 6, .tokens = 30};
  const random_statistics statistics(random, shape);
  const restkv::expected_attention expected{.mean = statistics.mean.read(),
                                            .covariance = statistics.covariance.read()};
  CHECK(expected.check(shape).ok());
  problem_shape other = shape;
  other.query_heads = 8;
  check_error(expected.check(other), errc::shape_mismatch, {4, 8}, "query heads");
  check_error(restkv::cap_kv{.mean = statistics.mean.read()}.check(other), errc::shape_mismatch, {4, 8}, "mean");
  other = shape;
  other.head_dim = 5;
  check_error(expected.check(other), errc::shape_mismatch, {6, 5}, "channels");
  restkv::expected_attention without = expected;
  without.covariance = {};
  check_error(without.check(shape), errc::missing_input, {}, "covariance");
  without.use_covariance = false;
  CHECK(without.check(shape).ok());
  check_error(restkv::expected_attention{}.check(shape), errc::missing_input, {}, "mean");
  check_error(restkv::expected_attention{.sink = -1}.check(), errc::invalid_argument, {-1, 0}, "sink");
  check_error(restkv::expected_attention{.epsilon = -1}.check(), errc::invalid_argument, {-1, 0}, "epsilon");
  check_error(restkv::cap_kv{.tau = -2}.check(), errc::invalid_argument, {-2, 0}, "tau");
  check_error(restkv::cap_kv{.sink = -2}.check(), errc::invalid_argument, {-2, 0}, "sink");

  std::vector<float> numbers(2 * 8 * 40);
  check_error(restkv::given_scores<>{}.check(shape), errc::missing_input, {}, "scores");
  check_error(restkv::given_scores<>{{numbers.data(), {1, 2, 40}}}.check(shape), errc::shape_mismatch, {1, 2}, "sequ");
  check_error(restkv::given_scores<>{{numbers.data(), {2, 4, 40}}}.check(shape), errc::shape_mismatch, {4, 2}, "KV");
  check_error(restkv::given_scores<score_rows::query_heads>{{numbers.data(), {2, 2, 40}}}.check(shape),
              errc::shape_mismatch, {2, 4}, "query heads");
  check_error(restkv::given_scores<>{{numbers.data(), {2, 2, 29}}}.check(shape), errc::shape_mismatch, {29, 30},
              "tokens");
  std::vector<half> all(2 * 4 * 30 * 6);
  const restkv::non_causal_attention<half> within{.query = {all.data(), {2, 4, 30, 6}}};
  CHECK(within.check(shape).ok());
  CHECK(restkv::compactor<half>{.attention = within}.check(shape).ok());
  check_error(restkv::non_causal_attention<half>{}.check(shape), errc::missing_input, {}, "queries");
  check_error(restkv::non_causal_attention<half>{.query = {all.data(), {2, 4, 29, 6}}}.check(shape),
              errc::shape_mismatch, {29, 30}, "rows");
  check_error(restkv::compactor<half>{.attention = {.query = {all.data(), {2, 3, 30, 6}}}}.check(shape),
              errc::shape_mismatch, {3, 4}, "heads");
  check_error(restkv::non_causal_attention<>{.chunk = 0}.check(), errc::invalid_argument, {0, 1}, "chunk");
  check_error(restkv::non_causal_attention<>{.recent = -1}.check(), errc::invalid_argument, {0, -1}, "recent");
  check_error(restkv::compactor<>{.blending = -1}.check(), errc::invalid_argument, {-1, 0}, "blending");
  check_error(restkv::compactor<>{.leverage = {.ridge = 0}}.check(), errc::invalid_argument, {0}, "ridge");
  CHECK(restkv::compactor<>{}.check().ok());
  check_error(restkv::q_filter{}.check(shape), errc::missing_input, {}, "filters");
  check_error(restkv::q_filter{{numbers.data(), {2, 7}}}.check(shape), errc::shape_mismatch, {2, 7, 6}, "filters");

  const auto queries = random_queries<float>(random, 5);
  statistics_memory memory;
  const auto before = memory.mean;
  const row frequencies{1, 2, 3, 4};
  check_error(restkv::query_statistics(queries.read(), memory.view, memory.scratch, 5), errc::invalid_argument, {5},
              "rows");
  check_error(restkv::query_statistics(queries.read(), memory.view, std::span(memory.scratch).first(9), 0),
              errc::workspace_too_small, {9, 60}, "scratch");
  check_error(restkv::query_statistics(queries.read(), memory.view, memory.scratch, 0, {.frequencies = frequencies}),
              errc::shape_mismatch, {4, 6, 3}, "pairs");
  check_error(restkv::query_statistics(queries.read(), {{memory.mean.data(), {2, 3, 6}}, {}}, memory.scratch),
              errc::shape_mismatch, {3, 4}, "mean");
  check_error(restkv::query_statistics(queries.read(), {}, memory.scratch), errc::missing_input, {}, "mean");
  check_error(restkv::average_rope(frequencies, rotary_pairs::half_split, 0, 8, memory.view), errc::shape_mismatch,
              {4, 6}, "frequencies");
  check_error(restkv::average_rope({}, rotary_pairs::half_split, 0, 0, memory.view), errc::invalid_argument, {0, 1},
              "positions");
  const row endless{1, HUGE_VAL};
  check_error(restkv::average_rope(endless, rotary_pairs::half_split, 0, 8, memory.view), errc::invalid_argument,
              {1, 2}, "finite");
  CHECK(memory.mean == before);

  std::vector<double> scratch(static_cast<std::size_t>(restkv::q_filter_scratch(6)));
  check_error(restkv::find_q_filters(queries.read(), {numbers.data(), {3, 6}}, scratch), errc::shape_mismatch, {4, 3},
              "multiple");
  check_error(restkv::find_q_filters(queries.read(), {numbers.data(), {2, 5}}, scratch), errc::shape_mismatch, {5, 6},
              "channels");
  check_error(restkv::find_q_filters(queries.read(), {numbers.data(), {2, 6}}, std::span(scratch).first(3)),
              errc::workspace_too_small, {3}, "scratch");
  check_error(restkv::find_q_filters(queries.read(), {}, scratch), errc::missing_input, {}, "filters");
}

TEST_CASE("Keys and values at the ends of a float's range give no NaN") {
  const float huge = std::numeric_limits<float>::max();
  std::vector<float> rows{0, 0, 1e-45f, 0, huge, huge, -huge, huge, 1, 2, 3, -1, 1e-30f, 1e-30f, -1e30f, 1e-30f};
  restkv::layer_view<float> layer;
  layer.key = layer.value = tensor_view<const float, 4>(rows.data(), {1, 1, 8, 2});
  const problem_shape shape{.query_heads = 1, .kv_heads = 1, .head_dim = 2, .tokens = 8};
  random_engine random(13);
  const random_statistics statistics(random, shape);
  const auto check = [&](const auto& score) {
    for (const double x : scores_of<double>(score, layer, shape, 0, 0)) CHECK(std::isfinite(x));
    for (const float x : scores_of<float>(score, layer, shape, 0, 0)) CHECK(!std::isnan(x));
  };
  check(restkv::expected_attention{.mean = statistics.mean.read(), .covariance = statistics.covariance.read(),
                                   .sink = 1});
  check(restkv::cap_kv{.mean = statistics.mean.read(), .sink = 1});
  check(restkv::cap_kv{.mean = statistics.mean.read(), .sink = 1, .cosine = false});
}
