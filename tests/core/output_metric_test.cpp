// SPDX-License-Identifier: Apache-2.0
#include "support/check_error.hpp"
#include "support/guarded_tensor.hpp"
#include "support/layer_metric.hpp"

#include <cmath>
#include <functional>
#include <limits>

using namespace restkv_test;
using restkv::errc;
using restkv::output_metric;

namespace {

struct sizes {
  index_t heads = 1;
  index_t head_dim = 1;
  index_t hidden = 1;
};

/// W_O with random strides.
guarded_tensor<float, 2> random_projection(random_engine& random, const sizes& size) {
  guarded_tensor<float, 2> w(random, {size.hidden, size.heads * size.head_dim}, {.reversed_axes = true});
  for_each(w.view(), [&](float& weight) { weight = static_cast<float>(normal(random)); });
  return w;
}

/// G[h](r, c) = sum over rows of W[h](i, r) W[h](i, c), and the same of magnitudes: what rounding is measured by.
struct gram_entry {
  double value = 0;
  double magnitude = 0;

  gram_entry(const tensor_view<const float, 2>& w, index_t head_dim, index_t h, index_t r, index_t c) {
    for (index_t i = 0; i < w.extent(0); ++i) {
      const double product = static_cast<double>(w(i, h * head_dim + r)) * static_cast<double>(w(i, h * head_dim + c));
      value += product;
      magnitude += std::fabs(product);
    }
  }
};

void check_metric(const output_metric& metric, const tensor_view<const float, 2>& w, const sizes& size) {
  const auto view = metric.view();
  const index_t d = size.head_dim;
  REQUIRE(view.gram.extents == std::array{size.heads, d, d});
  REQUIRE(view.factor.extents == std::array{size.heads, d, d});
  REQUIRE(view.spectrum.extents == std::array{size.heads, d});
  for (index_t h = 0; h < size.heads; ++h) {
    double trace = 0;
    double spectrum = 0;
    for (index_t r = 0; r < d; ++r) {
      trace += view.gram(h, r, r);
      spectrum += static_cast<double>(view.spectrum(h, r));
      CHECK(view.spectrum(h, r) >= 0);
      if (r > 0) CHECK(view.spectrum(h, r) <= view.spectrum(h, r - 1));
    }
    CHECK(spectrum == Approx(trace).epsilon(1e-5));  // the eigenvalues' sum
    const double largest = static_cast<double>(view.spectrum(h, 0));
    bool good = true;
    for (index_t r = 0; r < d; ++r) {
      for (index_t c = 0; c < d; ++c) {
        const gram_entry entry(w, d, h, r, c);
        good = good && std::fabs(view.gram(h, r, c) - entry.value) <= 1e-13 * entry.magnitude;
        good = good && (c <= r || view.factor(h, r, c) == 0);  // lower triangular
        double product = 0;
        for (index_t k = 0; k < d; ++k) {
          product += static_cast<double>(view.factor(h, r, k)) * static_cast<double>(view.factor(h, c, k));
        }
        good = good && std::fabs(product - entry.value) <= 1e-6 * static_cast<double>(d) * largest;
        good = good && std::fabs(entry.value) <= largest * (1 + 1e-5);  // no entry passes the largest eigenvalue
      }
    }
    CAPTURE(h, size.heads, d, size.hidden);
    CHECK(good);
  }
}

/// The failure of a build as a status.
restkv::status failure_of(const tensor_view<const float, 2>& w, index_t heads, index_t head_dim) {
  try {
    static_cast<void>(build_metric(w, heads, head_dim));
    return {};
  } catch (const restkv::error& e) {
    return restkv::status::error(e.code(), "%s", e.what());
  }
}

}  // namespace

TEST_CASE("the metric is the Gram matrix of each head's slice, its Cholesky factor and its eigenvalues") {
  random_engine random(1);
  for (int trial = 0; trial < 60; ++trial) {
    // Fewer rows than channels make the matrix singular; more than 256 rows are read in blocks.
    const sizes size{.heads = pick(random, 1, 4),
                     .head_dim = pick(random, 1, 24),
                     .hidden = chance(random, 10) ? pick(random, 250, 600) : pick(random, 1, 40)};
    const auto w = random_projection(random, size);
    CAPTURE(trial);
    check_metric(build_metric(w.read(), size.heads, size.head_dim), w.read(), size);
  }
}

TEST_CASE("dead channels and a W_O of zeros have a metric, too") {
  random_engine random(2);
  const sizes size{.heads = 2, .head_dim = 8, .hidden = 20};
  const auto w = random_projection(random, size);
  for (index_t i = 0; i < size.hidden; ++i) w.view()(i, 3) = w.view()(i, 12) = 0;
  check_metric(build_metric(w.read(), 2, 8), w.read(), size);
  for_each(w.view(), [](float& weight) { weight = 0; });
  check_metric(build_metric(w.read(), 2, 8), w.read(), size);
}

TEST_CASE("what makes no metric is named, with both numbers") {
  random_engine random(3);
  const auto w = random_projection(random, {.heads = 2, .head_dim = 8, .hidden = 20});
  CHECK(failure_of(w.read(), 2, 8).ok());
  CHECK(failure_of(w.read(), 4, 4).ok());
  check_error(failure_of({nullptr, {20, 16}}, 2, 8), errc::missing_input, {}, "projection");
  check_error(failure_of(w.read(), 2, 7), errc::shape_mismatch, {16, 2, 7, 14}, "columns");
  check_error(failure_of(w.read(), 3, 8), errc::shape_mismatch, {16, 3, 8, 24}, "columns");
  for (const auto& [heads, head_dim] : {std::pair<index_t, index_t>{0, 8}, {-2, -8}, {1, 100'000}, {100'000, 1}}) {
    check_error(failure_of(w.read(), heads, head_dim), errc::invalid_argument, {heads, head_dim, 65536, 4096}, "heads");
  }
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    w.view()(13, 9) = bad;
    check_error(failure_of(w.read(), 2, 8), errc::invalid_argument, {13, 9}, "W_O");
  }
}
