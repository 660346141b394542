// SPDX-License-Identifier: Apache-2.0
// Token scores of a Thrust backend, and of the reference, on random layers of every shape.
#pragma once

#include "support/catch.hpp"
#include "support/feature_scores.hpp"
#include "support/random_layer.hpp"

#include <restkv/backend/bulk.hpp>
#include <restkv/backend/thrust/backend.cuh>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace restkv_test {

/// A score of a user's own that reads every feature of one query's attention and output.
struct every_feature {
  restkv::query_order order = restkv::query_order::before;
  restkv::metric metric_of_distance = restkv::metric::identity;

  static constexpr restkv::feature needs =
      restkv::feature::attention | restkv::feature::odds | restkv::feature::distance | restkv::feature::output_norm |
      restkv::feature::value_norm | restkv::feature::key_norm | restkv::feature::alignment |
      restkv::feature::value_norm_l1 | restkv::feature::mean_distance | restkv::feature::projected_norm_l1;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const restkv::token_features<Real>& token) const noexcept {
    const Real place = static_cast<Real>(token.position + token.head + 2 * token.batch) / Real(100);
    return token.attention *
               (token.value_norm + token.value_norm_l1 + std::fabs(token.alignment) + token.projected_norm_l1) +
           token.odds * (token.distance + token.mean_distance) / (Real(1) + token.output_norm) +
           Real(1e-3) * token.key_norm / (Real(1) + static_cast<Real>(token.length) + place);
  }
};

/// Needs no queries.
struct norms_only {
  restkv::metric metric_of_distance = restkv::metric::identity;

  static constexpr restkv::feature needs =
      restkv::feature::value_norm | restkv::feature::key_norm | restkv::feature::mean_distance;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const restkv::token_features<Real>& token) const noexcept {
    return (token.value_norm + token.mean_distance) / (Real(0.1) + token.key_norm);
  }
};

/// Ready when the attention is, in both orders.
struct odds_only {
  restkv::query_order order = restkv::query_order::before;

  static constexpr restkv::feature needs = restkv::feature::odds;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const restkv::token_features<Real>& token) const noexcept {
    return token.odds;
  }
};

inline restkv::any_temporal random_temporal(random_engine& random) {
  switch (pick(random, 0, 5)) {
    case 1:
      return {restkv::ema{0.3f}};
    case 2:
      return {restkv::last{}};
    case 3:
      return {restkv::sum{}};
    case 4:
      return {restkv::maximum{}};
    case 5:
      return {restkv::root_sum_square{}};
    default:
      return {restkv::mean{}};
  }
}

/// A layer of any shape, and a window that its queries fill.
struct random_shape {
  layer_recipe recipe;
  index_t window = 1;

  explicit random_shape(random_engine& random, bool whole_prompt = false) {
    constexpr index_t head_dims[] = {1, 3, 7, 8, 16, 33, 64, 96};
    constexpr index_t lengths[] = {0, 1, 2, 5, 31, 32, 33, 100, 200};
    recipe.head_dim = head_dims[pick(random, 0, 7)];
    recipe.tokens = lengths[pick(random, 0, 8)];
    recipe.group = chance(random, 50) ? 1 : 4;
    recipe.kv_heads = pick(random, 1, 2);
    recipe.batch = pick(random, 1, 3);
    // The sharp ones have queries that leave next to nothing to all tokens but one.
    recipe.sharpness = chance(random, 30) ? 25 : uniform_real(random, 0.2, 5);
    recipe.strided = chance(random, 50);
    recipe.chunks = chance(random, 40) ? pick(random, 2, 4) : 1;
    recipe.padded = chance(random, 50);
    recipe.pad = chance(random, 50) ? restkv::padding::left : restkv::padding::right;
    window = chance(random, 20) ? 40 : pick(random, 1, 9);
    recipe.query_rows = whole_prompt ? recipe.tokens : std::min(window, recipe.tokens) + pick(random, 0, 3);
    if (whole_prompt && chance(random, 60)) window = restkv::every_query;
    recipe.hidden = pick(random, 1, 2 * recipe.head_dim);
  }
};

/// The scores of a backend, and the drift of its windows, in memory that was used before.
template <class Real>
struct scored_rows {
  restkv::status result;
  std::vector<Real> scores;   ///< [batch, heads, tokens]; NaN where there is none
  std::vector<double> drift;  ///< [batch, query_heads]
};

template <class Backend, class Request, restkv::element T>
[[nodiscard]] scored_rows<typename Backend::score_type> score_rows(const Backend& backend, const Request& request,
                                                                   const restkv::layer_view<T>& layer,
                                                                   index_t most_attended = 7) {
  using real = typename Backend::score_type;
  using scratch_t = typename Backend::template scratch<Request>;
  restkv::workspace counting;
  scratch_t(backend, request, counting);
  std::vector<std::byte> memory(counting.required_bytes() + 64, std::byte{0xff});
  restkv::workspace space(memory.data(), counting.required_bytes());
  scratch_t scratch(backend, request, space);
  scored_rows<real> rows;
  const auto& shape = request.shape;
  rows.scores.assign(static_cast<std::size_t>(shape.batch * request.heads() * shape.tokens),
                     std::numeric_limits<real>::quiet_NaN());
  rows.drift.assign(static_cast<std::size_t>(shape.batch * shape.query_heads), -1e300);
  rows.result = space.check();
  if (!rows.result.ok()) return rows;
  const std::vector<index_t> most(static_cast<std::size_t>(shape.batch), most_attended);
  rows.result = backend.window_drift(request, layer, most, scratch,
                                     tensor_view<double, 2>(rows.drift.data(), {shape.batch, shape.query_heads}));
  if (!rows.result.ok()) return rows;
  rows.result = backend.token_scores(
      request, layer, scratch, tensor_view<real, 3>(rows.scores.data(), {shape.batch, request.heads(), shape.tokens}));
  for (std::size_t i = counting.required_bytes(); i < memory.size(); ++i) REQUIRE(memory[i] == std::byte{0xff});
  return rows;
}

/// Float's part of a row's largest score: features are rounded to float once, from sums in double, and a score is a few
/// operations on them.
inline constexpr double resolution = 2e-5;

/// What the rounding of logits adds to that: a share is off by the part |z| eps / 2 for its own logit and for that
/// which it is compared with; |z| <= ||q|| ||k|| / sqrt(d).
template <class Request, restkv::element T>
[[nodiscard]] double rounding_of_logits(const Request& request, const restkv::layer_view<T>& layer, index_t b,
                                        index_t kv_head) {
  const auto squared = [](const std::vector<double>& row) {
    double sum = 0;
    for (const double x : row) sum += x * x;
    return sum;
  };
  const restkv::sequence_span span = restkv::sequence(layer, b, kv_head);
  const index_t window = request.window_of(span.length);
  const index_t head_dim = request.shape.head_dim;
  double key = 0;
  for (index_t n = 0; n < span.length && window > 0; ++n) {
    key = std::max(key, squared(restkv::reference::token_row(layer.key, b, kv_head, span.begin + n)));
  }
  double query = 0;
  for (index_t h = kv_head * request.shape.group(); h < (kv_head + 1) * request.shape.group() && window > 0; ++h) {
    const auto rows = restkv::window_queries(layer, b, h, window);
    for (index_t i = 0; i < window; ++i) {
      std::vector<double> row;
      for (index_t c = 0; c < head_dim; ++c) row.push_back(restkv::widen<double>(rows(i, c)));
      query = std::max(query, squared(row));
    }
  }
  return std::sqrt(key * query / static_cast<double>(head_dim)) *
         static_cast<double>(std::numeric_limits<float>::epsilon());
}

/// Compares row by row; returns how many scores were compared.
template <class Request, restkv::element T, class Real>
index_t compare_rows(const Request& request, const restkv::layer_view<T>& layer, const scored_rows<double>& exact,
                     const scored_rows<Real>& got) {
  INFO(exact.result.message() << got.result.message());
  REQUIRE(exact.result.ok());
  REQUIRE(got.result.ok());
  index_t compared = 0;
  const auto& shape = request.shape;
  for (index_t b = 0; b < shape.batch; ++b) {
    for (index_t row = 0; row < request.heads(); ++row) {
      const index_t kv_head = row * shape.kv_heads / request.heads();
      const index_t past = request.past_of(restkv::sequence(layer, b, kv_head).length);
      double largest = 0;
      double error = 0;
      index_t different = 0;  // NaN on one side alone
      for (index_t n = 0; n < shape.tokens; ++n) {
        const auto at = static_cast<std::size_t>((b * request.heads() + row) * shape.tokens + n);
        const double wanted = exact.scores[at];
        const auto score = static_cast<double>(got.scores[at]);
        if (n >= past) {
          different += std::isnan(score) ? 0 : 1;  // nobody wrote there
          continue;
        }
        ++compared;
        if (std::isnan(wanted) || std::isnan(score)) {
          different += std::isnan(wanted) && std::isnan(score) ? 0 : 1;
          continue;
        }
        largest = std::max(largest, std::fabs(wanted));
        error = std::max(error, std::fabs(score - wanted));
      }
      CAPTURE(b, row, past, largest);
      CHECK(different == 0);
      CHECK(error <= (resolution + rounding_of_logits(request, layer, b, kv_head)) * largest);
    }
    for (index_t h = 0; h < shape.query_heads; ++h) {
      const auto at = static_cast<std::size_t>(b * shape.query_heads + h);
      if (std::isnan(exact.drift[at])) continue;
      CAPTURE(b, h);
      CHECK(std::fabs(exact.drift[at] - got.drift[at]) <= 1e-9);
    }
  }
  return compared;
}

using cpp_backend = restkv::thrust_backend<restkv::thrust_cpp>;

inline constexpr restkv::group_reduce reductions[] = {restkv::group_reduce::none, restkv::group_reduce::mean,
                                                      restkv::group_reduce::max, restkv::group_reduce::sum,
                                                      restkv::group_reduce::l2};

/// `cases` random layers of elements T; `arrange` sets what a score can be told.
template <restkv::element T, class Score, class Arrange>
index_t walk(unsigned seed, int cases, Score score, const Arrange& arrange, bool drifts = true) {
  random_engine random(seed);
  index_t compared = 0;
  for (int i = 0; i < cases; ++i) {
    const random_shape shape(random, restkv::scores_window<Score>());
    const random_layer<T> layer(random, shape.recipe);
    using request_t = restkv::score_request<Score, restkv::any_temporal>;
    request_t request{.score = score,
                      .temporal = random_temporal(random),
                      .window = restkv::needs_window<Score>() ? shape.window : 0,
                      .group = reductions[pick(random, 0, 4)],
                      .shape = restkv::shape_of(layer.view(), pick(random, 0, 3), 4)};
    request.shape.tokens = std::max<index_t>(request.shape.tokens + pick(random, 0, 5), 1);  // a plan for more
    arrange(request, random);
    // From one row at a time to everything at once.
    const cpp_backend backend(restkv::thrust_tuning{.slab_floats = index_t(1) << pick(random, 0, 20)});
    CAPTURE(seed, i, shape.window, shape.recipe.head_dim, shape.recipe.tokens, shape.recipe.group, shape.recipe.batch,
            int(request.group), request.temporal.choice.index());
    auto exact = score_rows(restkv::reference_backend{}, request, layer.view());
    if (!drifts) exact.drift.assign(exact.drift.size(), std::numeric_limits<double>::quiet_NaN());
    compared += compare_rows(request, layer.view(), exact, score_rows(backend, request, layer.view()));
  }
  return compared;
}

/// The order, the metric and the rest of what a score of outputs can be told.
inline constexpr auto arrange_order_and_metric = [](auto& request, random_engine& random) {
  const bool after = chance(random, 50) && restkv::is_average(request.temporal);
  request.score.order = after ? restkv::query_order::after : restkv::query_order::before;
  if constexpr (requires { request.score.metric_of_distance; }) {
    request.score.metric_of_distance = chance(random, 50) ? restkv::metric::projection : restkv::metric::identity;
  }
  if constexpr (requires { request.score.normalised; }) {
    request.score.normalised = chance(random, 30);
    request.score.tau = chance(random, 30) ? 1.7f : 1.0f;
  }
};

}  // namespace restkv_test
