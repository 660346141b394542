// SPDX-License-Identifier: Apache-2.0
// Both backends' scores against the definition: delete the token, recompute the softmax, measure the change.
#include "oracle/aimed_attention.hpp"
#include "support/catch.hpp"
#include "support/layer_metric.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>

using namespace restkv_test;
using namespace restkv;
using oracle::real;

namespace {

constexpr index_t window = 4;

template <class Temporal>
using policy_of = eviction_policy<rest_kv, Temporal, no_pool, uniform>;

template <class Temporal>
policy_of<Temporal> make_policy(const rest_kv& score, const Temporal& temporal) {
  return {.score = score,
          .window = window,
          .temporal = temporal,
          .spatial = {},
          .group = group_reduce::none,
          .budget = {10},
          .protect = {.sink = 0, .recent = 0}};
}

/// Scores compared so far, and how many of them to the full precision asked for.
struct tally {
  index_t tokens = 0;
  index_t reference_to_1e_10 = 0;  ///< the other ones: where o - v cancels, or the oracle itself has no more digits
  index_t eigen_to_1e_4 = 0;       ///< of each score; all of them: of the row's largest
};

/// Checks one layer under one policy, head by head.
template <class T, class Temporal>
void check_scores(const arranged_layer<T>& layer, const policy_of<Temporal>& policy, const oracle::settings& how,
                  tally& count) {
  reference_backend reference;
  eigen_backend eigen;
  const auto exact = select_tokens(reference, policy, layer.view());
  const auto fast = select_tokens(eigen, policy, layer.view());
  INFO(exact.result.message() << fast.result.message());
  REQUIRE(exact.result.ok());
  REQUIRE(fast.result.ok());
  const bool projected = policy.score.metric_of_distance == metric::projection;
  const oracle::problem p = oracle::problem_of(layer, 0, window, projected);
  for (index_t h = 0; h < layer.sizes.query_heads; ++h) {
    const oracle::scores truth = policy.score.order == query_order::before ? oracle::deletion_scores(p, h, how)
                                                                           : oracle::smoothed_scores(p, h, how);
    const real largest = *std::max_element(truth.score.begin(), truth.score.end());
    REQUIRE(largest > 0);
    real reference_error = 0;  // in units of what is allowed
    real eigen_row_error = 0;
    real eigen_score_error = 0;
    for (std::size_t n = 0; n < truth.score.size(); ++n) {
      const real score = truth.score[n];
      const real exact_error = std::fabs(static_cast<real>(exact.scores_of(0, h)[n]) - score);
      const real fast_error = std::fabs(static_cast<real>(fast.scores_of(0, h)[n]) - score);
      const real rounding = truth.own_error[n] + 64 * std::numeric_limits<double>::epsilon() * truth.sensitivity[n];
      const auto keep_worst = [](real& worst, real error) { worst = error <= worst ? worst : error; };  // NaN stays
      keep_worst(reference_error, exact_error / (1e-10L * score + rounding));
      keep_worst(eigen_row_error, fast_error / (1e-4L * largest));
      const bool conditioned = truth.sensitivity[n] < 50 * score;
      if (conditioned) keep_worst(eigen_score_error, fast_error / (1e-4L * score));
      ++count.tokens;
      count.reference_to_1e_10 += rounding < 1e-10L * score ? 1 : 0;
      count.eigen_to_1e_4 += conditioned ? 1 : 0;
    }
    CAPTURE(h, truth.largest_share, truth.smallest_rest, largest);
    CHECK(reference_error <= 1);
    CHECK(eigen_row_error <= 1);
    CHECK(eigen_score_error <= 1);
  }
}

/// The parts of the score that do not depend on the attention's shape, taken in turn.
struct variants {
  rest_kv score{};
  oracle::settings how{};

  void next() {
    const int turn = turn_++;
    score.metric_of_distance = turn % 2 == 0 ? metric::projection : metric::identity;
    score.tau = turn % 3 == 1 ? 0.5f : turn % 3 == 2 ? 2.0f : 1.0f;
    score.normalised = turn / 2 % 2 == 1;
    how.tau = score.tau;
    how.normalised = score.normalised;
  }

 private:
  int turn_ = 0;
};

/// All the queries of all heads at one token, or each query at another where `target` is negative.
template <class T>
void aim_all(arranged_layer<T>& layer, index_t target, double rest) {
  const index_t kinds = target < 0 ? window : 1;
  for (index_t h = 0; h < layer.sizes.query_heads; ++h) {
    for (index_t i = 0; i < kinds; ++i) oracle::mark_token(layer, h, target < 0 ? 3 + 8 * i : target, i);
  }
  for (index_t h = 0; h < layer.sizes.query_heads; ++h) {
    for (index_t i = 0; i < window; ++i) {
      oracle::aim(layer, window, h, i, target < 0 ? 3 + 8 * i : target, rest, target < 0 ? i : 0);
    }
  }
}

const layer_sizes sizes{.batch = 1,
                        .query_heads = 4,
                        .kv_heads = 2,
                        .head_dim = 8,
                        .tokens = 40,
                        .queries = 6,
                        .hidden = 12,
                        .sharpness = 2.0};
const index_t past = sizes.tokens - window;

}  // namespace

TEMPLATE_TEST_CASE("a score is what deleting the token does, whatever the attention", "", float, half, bfloat16,
                   double) {
  tally count;
  variants variant;
  for (const double rest : {0.5, 1e-2, 1e-4, 1e-6, 1e-9, 1e-12}) {
    // The first token, one of the past, the last of the past, two of the window, and another for every query.
    for (const index_t target : {index_t{0}, index_t{17}, past - 1, past, past + 2, index_t{-1}}) {
      arranged_layer<TestType> layer(sizes, 7);
      aim_all(layer, target, rest);
      const output_metric metric = attach_metric(layer);
      // The newest query sees every target.
      const index_t seen = target < 0 ? 3 + 8 * (window - 1) : target;
      const auto share = oracle::softmax(oracle::logits_of(oracle::problem_of(layer, 0, window, false), 0, window - 1));
      REQUIRE(share[static_cast<std::size_t>(seen)] > 1 - 2 * static_cast<real>(rest));
      for (const auto order : {query_order::before, query_order::after}) {
        variant.next();
        variant.score.order = order;
        CAPTURE(rest, target, int(order), variant.score.tau, variant.score.normalised,
                int(variant.score.metric_of_distance));
        variant.how.temporal = oracle::reduction::mean;
        check_scores(layer, make_policy(variant.score, any_temporal{mean{}}), variant.how, count);
        variant.how.temporal = oracle::reduction::ema;
        check_scores(layer, make_policy(variant.score, any_temporal{ema{0.3f}}), variant.how, count);
        variant.how.temporal = oracle::reduction::last;
        check_scores(layer, make_policy(variant.score, any_temporal{last{}}), variant.how, count);
      }
    }
  }
  CAPTURE(count.tokens, count.reference_to_1e_10, count.eigen_to_1e_4);
  CHECK(count.reference_to_1e_10 > count.tokens * 7 / 10);
  CHECK(count.eigen_to_1e_4 > count.tokens * 7 / 10);
}

TEST_CASE("a score is what deleting the token does under the window's largest, which is not linear") {
  tally count;
  variants variant;
  for (const double rest : {0.5, 1e-2, 1e-4, 1e-6, 1e-9}) {
    for (const index_t target : {index_t{0}, past - 1, past + 1, index_t{-1}}) {
      arranged_layer<float> layer(sizes, 7);
      aim_all(layer, target, rest);
      const output_metric metric = attach_metric(layer);
      for (const auto order : {query_order::before, query_order::after}) {
        variant.next();
        variant.score.order = order;
        variant.how.temporal = oracle::reduction::maximum;
        CAPTURE(rest, target, int(order), variant.score.tau, variant.score.normalised,
                int(variant.score.metric_of_distance));
        check_scores(layer, make_policy(variant.score, maximum{}), variant.how, count);
      }
    }
  }
  CHECK(count.reference_to_1e_10 > count.tokens * 7 / 10);
  CHECK(count.eigen_to_1e_4 > count.tokens * 7 / 10);
}

TEST_CASE("a score is what deleting the token does where all values share a large part, which cancels") {
  tally count;
  variants variant;
  arranged_layer<float> layer(sizes, 8);
  const output_metric metric = attach_metric(layer);
  for (index_t i = 0; i < layer.value.size(); ++i) layer.value.data[i] += 100.0f;
  for (int turn = 0; turn < 12; ++turn) {
    variant.next();
    CAPTURE(turn, variant.score.tau, variant.score.normalised, int(variant.score.metric_of_distance));
    check_scores(layer, make_policy(variant.score, any_temporal{mean{}}), variant.how, count);
  }
  CHECK(count.eigen_to_1e_4 < count.tokens / 2);  // all of them to 1e-4 of the row's largest
}

TEST_CASE("the scores of a group's heads become one by the reduction's definition") {
  reference_backend reference;
  eigen_backend eigen;
  layer_sizes wide = sizes;
  wide.query_heads = 6;
  arranged_layer<float> layer(wide, 9);
  const output_metric metric = attach_metric(layer);
  for (const auto order : {query_order::before, query_order::after}) {
    auto policy = make_policy(rest_kv{.order = order}, any_temporal{});
    const auto heads = select_tokens(reference, policy, layer.view());  // one row per query head
    for (const auto how : {group_reduce::mean, group_reduce::max, group_reduce::sum, group_reduce::l2}) {
      policy.group = how;
      const auto exact = select_tokens(reference, policy, layer.view());
      const auto fast = select_tokens(eigen, policy, layer.view());
      REQUIRE(exact.heads == 2);
      double exact_error = 0;
      double fast_error = 0;
      for (index_t h = 0; h < 2; ++h) {
        for (std::size_t n = 0; n < static_cast<std::size_t>(past); ++n) {
          const double a = heads.scores_of(0, 3 * h)[n];
          const double b = heads.scores_of(0, 3 * h + 1)[n];
          const double c = heads.scores_of(0, 3 * h + 2)[n];
          const double wanted = how == group_reduce::mean  ? (a + b + c) / 3
                                : how == group_reduce::max ? std::max({a, b, c})
                                : how == group_reduce::sum ? a + b + c
                                                           : std::sqrt(a * a + b * b + c * c);
          exact_error = std::max(exact_error, std::fabs(exact.scores_of(0, h)[n] - wanted) / wanted);
          fast_error = std::max(fast_error, std::fabs(double{fast.scores_of(0, h)[n]} - wanted) / wanted);
        }
      }
      CAPTURE(int(order), int(how));
      CHECK(exact_error < 1e-13);
      CHECK(fast_error < 1e-4);
    }
  }
}
