// SPDX-License-Identifier: Apache-2.0
// Rows of channels, small symmetric matrices and scratch memory.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/core/cholesky.hpp>
#include <restkv/core/scratch.hpp>
#include <restkv/core/vector_math.hpp>

#include <memory>
#include <vector>

using namespace restkv;
using restkv_test::normal;
using restkv_test::pick;
using restkv_test::random_engine;

TEST_CASE("widen_row gives the bits of widen, for every half and bfloat16") {
  std::vector<half> halves;
  std::vector<bfloat16> brains;
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    halves.push_back(half::from_bits(static_cast<std::uint16_t>(bits)));
    brains.push_back(bfloat16::from_bits(static_cast<std::uint16_t>(bits)));
  }
  const auto count = static_cast<index_t>(halves.size());
  const auto check = [&](const auto& rows) {
    std::vector<float> single(rows.size());
    std::vector<double> twice(rows.size());
    widen_row(rows.data(), single.data(), count);
    widen_row(rows.data(), twice.data(), count);
    index_t wrong = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto wanted = widen<float>(rows[i]);
      // A NaN is a NaN: some machines make it quiet.
      wrong += std::isnan(wanted) ? (std::isnan(single[i]) && std::isnan(twice[i]) ? 0 : 1)
               : std::bit_cast<std::uint32_t>(single[i]) == std::bit_cast<std::uint32_t>(wanted) &&
                       std::bit_cast<std::uint64_t>(twice[i]) == std::bit_cast<std::uint64_t>(widen<double>(rows[i]))
                   ? 0
                   : 1;
    }
    CHECK(wrong == 0);
  };
  check(halves);
  check(brains);
  const std::vector<double> numbers{1.0 / 3, -0.0, 1e300};
  std::vector<float> narrowed(3);
  widen_row(numbers.data(), narrowed.data(), 3);
  CHECK(narrowed[0] == 1.0f / 3);
}

TEST_CASE("Dot products and norms of every length") {
  random_engine random(1);
  for (index_t count = 0; count <= 70; ++count) {
    std::vector<float> x;
    std::vector<float> y;
    double product = 0;
    double squares = 0;
    double sizes = 0;
    for (index_t c = 0; c < count; ++c) {
      x.push_back(static_cast<float>(normal(random)));
      y.push_back(static_cast<float>(normal(random)));
      const auto a = static_cast<double>(x.back());
      product += a * static_cast<double>(y.back());
      squares += a * a;
      sizes += std::fabs(a);
    }
    const double bound = 1e-6 * (squares + 1);
    CHECK(std::fabs(static_cast<double>(dot(x.data(), y.data(), count)) - product) <= bound);
    CHECK(std::fabs(static_cast<double>(squared_norm(x.data(), count)) - squares) <= bound);
    CHECK(std::fabs(static_cast<double>(l1_norm(x.data(), count)) - sizes) <= bound);
    CHECK(std::fabs(norm(x.data(), count) - std::sqrt(squares)) <= bound);
    CHECK(all_finite(x.data(), count));
    for (const float bad : {HUGE_VALF, -HUGE_VALF, std::nanf("")}) {
      if (count == 0) continue;
      x[static_cast<std::size_t>(pick(random, 0, count - 1))] = bad;
      CHECK(!all_finite(x.data(), count));
      CHECK(!(norm(x.data(), count) < HUGE_VAL));
      CHECK(std::isnan(inverse_norm(x.data(), count)));
    }
  }
}

TEST_CASE("Norms where squares leave the range") {
  const auto check = [](auto real) {
    using Real = decltype(real);
    using limits = std::numeric_limits<Real>;
    const Real tenth = limits::max() / 10;
    for (const Real scale : {limits::denorm_min(), limits::min(), Real(1e-25), Real(1), Real(1e25), tenth}) {
      const Real row[] = {3 * scale, -4 * scale};
      CHECK(norm(row, 2) == Approx(5 * static_cast<double>(scale)).epsilon(1e-6).margin(0));
    }
    const Real zero[] = {0, -Real(0)};
    CHECK(norm(zero, 2) == 0);
    CHECK(inverse_norm(zero, 2) == 0);
    const Real tiny[] = {limits::denorm_min()};
    CHECK(inverse_norm(tiny, 1) == 0);
    const Real two[] = {2};
    CHECK(inverse_norm(two, 1) == 0.5);
    const Real endless[] = {1, limits::infinity()};
    CHECK(norm(endless, 2) == HUGE_VAL);
    const Real nothing[] = {limits::infinity(), limits::quiet_NaN()};
    CHECK(std::isnan(norm(nothing, 2)));
  };
  check(1.0f);
  check(1.0);
  const float largest[] = {std::numeric_limits<float>::max(), std::numeric_limits<float>::max()};
  CHECK(norm(largest, 2) == Approx(std::sqrt(2.0) * static_cast<double>(largest[0])));
}

TEST_CASE("Quadratic forms of the inverse of a sum of outer products") {
  random_engine random(2);
  for (const index_t size : {1, 2, 5, 15, 16, 17, 33, 48}) {
    for (const index_t rows : {0, 1, 3, 4, 50, 101}) {
      CAPTURE(size, rows);
      const auto n = static_cast<std::size_t>(size);
      std::vector<double> matrix(n * n);
      std::vector<double> plain(n * n);
      std::vector<double> gathered(static_cast<std::size_t>(outer_product_sum::row_elements(size)), NAN);
      for (std::size_t i = 0; i < n; ++i) plain[i * n + i] = matrix[i * n + i] = 0.25;
      outer_product_sum sum(matrix.data(), gathered.data(), size);
      for (index_t r = 0; r < rows; ++r) {
        double* const x = sum.next();
        for (std::size_t c = 0; c < n; ++c) x[c] = 2 + normal(random);
        for (std::size_t i = 0; i < n; ++i) {
          for (std::size_t j = 0; j < n; ++j) plain[i * n + j] += x[i] * x[j];
        }
        sum.add();
      }
      sum.finish();
      for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j <= i; ++j) CHECK(matrix[i * n + j] == Approx(plain[i * n + j]).epsilon(1e-12));
      }
      cholesky_factor(matrix.data(), size, 0.25);
      invert_lower(matrix.data(), size, gathered.data());
      // y solves plain y = x exactly when x = plain y: the form is then x y.
      std::vector<double> y;
      std::vector<double> x(n);
      for (std::size_t c = 0; c < n; ++c) y.push_back(normal(random));
      double wanted = 0;
      for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j < n; ++j) x[i] += plain[i * n + j] * y[j];
        wanted += x[i] * y[i];
      }
      CHECK(inverse_quadratic(matrix.data(), x.data(), size) == Approx(wanted).epsilon(1e-9));
    }
  }
}

TEST_CASE("A singular matrix has a factor of finite numbers") {
  const index_t size = 40;
  std::vector<double> matrix(static_cast<std::size_t>(size * size));
  std::vector<double> gathered(static_cast<std::size_t>(outer_product_sum::row_elements(size)));
  for (index_t i = 0; i < size; ++i) matrix[static_cast<std::size_t>(i * size + i)] = 1e-6;
  outer_product_sum sum(matrix.data(), gathered.data(), size);
  for (int r = 0; r < 3; ++r) {
    for (index_t c = 0; c < size; ++c) sum.next()[c] = 1e60 * std::sin(static_cast<double>(r * 40 + c));
    sum.add();
  }
  sum.finish();
  cholesky_factor(matrix.data(), size, 1e-6);
  invert_lower(matrix.data(), size, gathered.data());
  const std::vector<double> x(static_cast<std::size_t>(size), 1e60);
  const double form = inverse_quadratic(matrix.data(), x.data(), size);
  CHECK(std::isfinite(form));
  CHECK(form >= 0);
}

TEST_CASE("scratch_rows: pieces that do not overlap, doubles aligned wherever the memory begins") {
  const auto check = [](auto real) {
    using Real = decltype(real);
    for (const std::size_t begin : {0, 1}) {
      const auto size = static_cast<std::size_t>(3 + scratch_of_doubles(5) + 1 + scratch_of_doubles(0) +
                                                 scratch_of_doubles(7));
      const std::unique_ptr<Real[]> memory(new Real[begin + size]);
      scratch_rows<Real> rows(std::span<Real>(memory.get() + begin, size));
      Real* const first = rows.take(3);
      double* const second = rows.take_doubles(5);
      Real* const third = rows.take(1);
      CHECK(reinterpret_cast<std::uintptr_t>(rows.take_doubles(0)) % alignof(Real) == 0);
      double* const fourth = rows.take_doubles(7);
      CHECK(reinterpret_cast<std::uintptr_t>(second) % alignof(double) == 0);
      CHECK(reinterpret_cast<std::uintptr_t>(fourth) % alignof(double) == 0);
      std::fill(first, first + 3, Real(1));
      std::fill(second, second + 5, 2.0);
      std::fill(third, third + 1, Real(3));
      std::fill(fourth, fourth + 7, 4.0);
      CHECK(std::all_of(first, first + 3, [](Real x) { return x == 1; }));
      CHECK(std::all_of(second, second + 5, [](double x) { return x == 2; }));
      CHECK(*third == 3);
      CHECK(std::all_of(fourth, fourth + 7, [](double x) { return x == 4; }));
    }
  };
  check(1.0f);
  check(1.0);
}
