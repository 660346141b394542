// SPDX-License-Identifier: Apache-2.0
// Random caches in any arrangement, and head scores against functions of plain matrices in double.
#pragma once

#include "support/catch.hpp"
#include "support/guarded_tensor.hpp"

#include <restkv/core/vector_math.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace restkv_test {

using restkv::head_view;
using restkv::half;
using restkv::problem_shape;

using row = std::vector<double>;
using matrix = std::vector<row>;

struct cache_recipe {
  index_t batch = 1;
  index_t kv_heads = 2;
  index_t group = 2;
  index_t head_dim = 8;
  index_t tokens = 60;
  bool strided = false;           ///< random order of axes, gaps and negative strides
  index_t chunks = 1;             ///< pieces of the token axis, values cut elsewhere
  std::vector<std::int32_t> lengths{};  ///< real tokens of each sequence; none: all
  restkv::padding pad = restkv::padding::left;
  int broken_percent = 0;         ///< rows of keys and of values that hold a NaN or an infinity
  double spread = 1;              ///< of the channels' means, in standard deviations: keys of a model are not centred
};

/// A cache with its memory. Padding holds huge numbers.
template <class T>
struct random_cache {
  random_cache(random_engine& random, const cache_recipe& recipe)
      : key(random, extents(recipe), how(recipe)), value(random, extents(recipe), how(recipe)),
        lengths(recipe.lengths), shape{.batch = recipe.batch,
                                       .query_heads = recipe.kv_heads * recipe.group,
                                       .kv_heads = recipe.kv_heads,
                                       .head_dim = recipe.head_dim,
                                       .tokens = recipe.tokens} {
    for (auto* cache : {&key, &value}) {
      std::vector<double> means;
      for (index_t c = 0; c < recipe.kv_heads * recipe.head_dim; ++c) means.push_back(recipe.spread * normal(random));
      for (index_t b = 0; b < recipe.batch; ++b) {
        for (index_t h = 0; h < recipe.kv_heads; ++h) {
          for (index_t n = 0; n < recipe.tokens; ++n) {
            for (index_t c = 0; c < recipe.head_dim; ++c) {
              const double mean = means[static_cast<std::size_t>(h * recipe.head_dim + c)];
              cache->view()(b, h, n, c) = restkv::narrow<T>(mean + normal(random));
            }
            if (recipe.head_dim > 0 && chance(random, recipe.broken_percent)) {
              const double worst[] = {std::nan(""), HUGE_VAL, -HUGE_VAL};
              cache->view()(b, h, n, pick(random, 0, recipe.head_dim - 1)) =
                  restkv::narrow<T>(worst[pick(random, 0, 2)]);
            }
          }
        }
      }
    }
    cut(random, recipe, key.read(), key_parts, layer.key);
    cut(random, recipe, value.read(), value_parts, layer.value);
    if (!lengths.empty()) layer.lengths = {lengths.data(), {recipe.batch}};
    layer.pad = recipe.pad;
  }
  random_cache(const random_cache&) = delete;
  random_cache& operator=(const random_cache&) = delete;

  /// The first token of a sequence on the token axis.
  [[nodiscard]] index_t begin_of(index_t b) const {
    if (lengths.empty() || layer.pad == restkv::padding::right) return 0;
    return key.view().extent(2) - lengths[static_cast<std::size_t>(b)];
  }
  /// A head's rows, by a way of its own.
  [[nodiscard]] matrix rows(const guarded_tensor<T, 4>& cache, index_t b, index_t h) const {
    const index_t tokens = cache.view().extent(2);
    const index_t length = lengths.empty() ? tokens : lengths[static_cast<std::size_t>(b)];
    const index_t begin = begin_of(b);
    matrix out;
    for (index_t n = begin; n < begin + length; ++n) {
      out.emplace_back();
      for (index_t c = 0; c < cache.view().extent(3); ++c) {
        out.back().push_back(restkv::widen<double>(cache.view()(b, h, n, c)));
      }
    }
    return out;
  }

  guarded_tensor<T, 4> key, value;
  std::vector<tensor_view<const T, 4>> key_parts, value_parts;
  std::vector<std::int32_t> lengths;
  problem_shape shape;
  restkv::layer_view<T> layer;

 private:
  static std::array<index_t, 4> extents(const cache_recipe& recipe) {
    return {recipe.batch, recipe.kv_heads, recipe.tokens, recipe.head_dim};
  }
  static typename guarded_tensor<T, 4>::options how(const cache_recipe& recipe) {
    return {.row_major = !recipe.strided, .reversed_axes = recipe.strided, .gaps = recipe.strided};
  }
  static void cut(random_engine& random, const cache_recipe& recipe, const tensor_view<const T, 4>& whole,
                  std::vector<tensor_view<const T, 4>>& parts, restkv::chunked_tensor_view<const T>& out) {
    if (recipe.chunks == 1) {
      out = whole;
      return;
    }
    std::vector<index_t> edges{0, recipe.tokens};
    for (index_t i = 1; i < recipe.chunks; ++i) edges.push_back(pick(random, 0, recipe.tokens));
    std::sort(edges.begin(), edges.end());
    for (std::size_t i = 0; i + 1 < edges.size(); ++i) {
      parts.push_back(whole.slice(2, edges[i], edges[i + 1] - edges[i]));
    }
    out = {parts.data(), static_cast<index_t>(parts.size())};
  }
};

/// One head's scores. The scratch has exactly the size that was asked for, begins at an odd element, and holds NaN.
template <class Real, class Score, class T>
std::vector<Real> scores_of(const Score& score, const restkv::layer_view<T>& layer, const problem_shape& shape,
                            index_t batch, index_t query_head) {
  constexpr Real unset = std::numeric_limits<Real>::quiet_NaN();
  const auto size = static_cast<std::size_t>(restkv::scratch_size_of(score, shape));
  const std::unique_ptr<Real[]> scratch(new Real[size + 1]);
  std::fill_n(scratch.get(), size + 1, unset);
  const head_view<T> head(layer, shape, batch, query_head);
  std::vector<Real> out(static_cast<std::size_t>(head.length()), unset);
  score.score_head(head, std::span<Real>(out), std::span<Real>(scratch.get() + 1, size));
  return out;
}

inline bool finite(const row& x) {
  return std::all_of(x.begin(), x.end(), [](double e) { return std::isfinite(e); });
}
inline double length_of(const row& x) {
  double sum = 0;
  for (const double e : x) sum += e * e;
  return std::sqrt(sum);
}
inline double product(const row& x, const row& y) {
  double sum = 0;
  for (std::size_t c = 0; c < x.size(); ++c) sum += x[c] * y[c];
  return sum;
}
inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// Checks one row within `tolerance` of its largest entry; NaN and infinities must be where they should.
template <class Real>
void check_row(const std::vector<Real>& got, const row& wanted, double tolerance) {
  REQUIRE(got.size() == wanted.size());
  double largest = 0;
  for (const double x : wanted) {
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  }
  double error = 0;
  std::size_t worst = 0;
  std::size_t misplaced = 0;
  for (std::size_t n = 0; n < wanted.size(); ++n) {
    const auto mine = static_cast<double>(got[n]);
    if (std::isfinite(wanted[n]) != std::isfinite(mine) || std::isnan(wanted[n]) != std::isnan(mine)) {
      ++misplaced;
      worst = n;
    } else if (std::isfinite(mine) && std::fabs(mine - wanted[n]) > error) {
      error = std::fabs(mine - wanted[n]);
      worst = n;
    }
  }
  if (got.empty()) return;
  CAPTURE(worst, got.size(), largest, got[worst], wanted[worst]);
  CHECK(misplaced == 0);
  CHECK(error <= tolerance * largest);
}

/// Runs a score in float and double on every head of a cache. oracle(keys, values, batch, query head),
/// or with the sequence's first token on the token axis behind them, gives the row.
template <class T, class Score, class Oracle>
void check_cache(const Score& score, const random_cache<T>& cache, const Oracle& oracle, double float_tolerance) {
  static_assert(restkv::head_score<Score> && std::is_trivially_copyable_v<Score>);
  const index_t step = restkv::scores_query_heads<Score>() ? 1 : cache.shape.group();
  for (index_t b = 0; b < cache.shape.batch; ++b) {
    for (index_t h = 0; h < cache.shape.query_heads; h += step) {
      CAPTURE(b, h);
      const index_t kv = h / cache.shape.group();
      const auto ask = [&](const auto&... more) {
        return oracle(cache.rows(cache.key, b, kv), cache.rows(cache.value, b, kv), b, h, more...);
      };
      row wanted;
      if constexpr (std::is_invocable_v<Oracle, matrix, matrix, index_t, index_t, index_t>) {
        wanted = ask(cache.begin_of(b));
      } else {
        wanted = ask();
      }
      check_row(scores_of<double>(score, cache.layer, cache.shape, b, h), wanted, 1e-9);
      check_row(scores_of<float>(score, cache.layer, cache.shape, b, h), wanted, float_tolerance);
    }
  }
}

/// The same over sizes, arrangements, paddings, element types and rows that are not finite.
template <class MakeScore, class MakeOracle>
void check_score(const MakeScore& make_score, const MakeOracle& make_oracle, double float_tolerance = 2e-5,
                 cache_recipe base = {}) {
  random_engine random(7);
  const auto check = [&]<class T>(const cache_recipe& recipe) {
    const random_cache<T> cache(random, recipe);
    INFO("tokens " << recipe.tokens << ", head_dim " << recipe.head_dim << ", strided " << recipe.strided << ", chunks "
                   << recipe.chunks << ", broken " << recipe.broken_percent << ", padded " << recipe.lengths.size());
    const auto score = make_score(cache.shape);  // before the oracle, which may refer to it
    check_cache(score, cache, make_oracle(cache.shape), float_tolerance);
  };
  check.template operator()<half>(base);
  check.template operator()<float>(base);
  cache_recipe strided = base;
  strided.strided = true;
  strided.chunks = 4;
  check.template operator()<half>(strided);
  check.template operator()<float>(strided);
  cache_recipe broken = strided;
  broken.broken_percent = 15;
  check.template operator()<float>(broken);
  broken.broken_percent = 100;
  check.template operator()<half>(broken);
  cache_recipe padded = base;
  padded.batch = 5;
  padded.lengths = {0, 1, static_cast<std::int32_t>(base.tokens), 7, static_cast<std::int32_t>(base.tokens / 2)};
  check.template operator()<half>(padded);
  padded.pad = restkv::padding::right;
  padded.chunks = 3;
  check.template operator()<float>(padded);
  for (const index_t tokens : {index_t{0}, index_t{1}, index_t{2}, index_t{5}, index_t{17}}) {
    cache_recipe small = base;
    small.tokens = tokens;
    small.head_dim = tokens == 5 ? 1 : base.head_dim;
    check.template operator()<half>(small);
  }
  cache_recipe wide = base;
  wide.head_dim = 37;
  wide.kv_heads = 1;
  check.template operator()<float>(wide);
}

/// An oracle that does not depend on the shape.
template <class Oracle>
auto always(Oracle oracle) {
  return [oracle](const auto&...) { return oracle; };
}

}  // namespace restkv_test
