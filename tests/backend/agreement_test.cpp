// SPDX-License-Identifier: Apache-2.0
// The production backend against the reference: scores, and the same kept sets wherever the reference's own margins are
// wider than what float can resolve.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"
#include "support/feature_scores.hpp"
#include "support/layer_metric.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/score/defensive_kv.hpp>

#include <iterator>

using namespace restkv_test;
using namespace restkv;

namespace {

/// One that needs no queries.
struct norms_only {
  static constexpr feature needs = feature::value_norm | feature::key_norm;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const token_features<Real>& token) const noexcept {
    return token.value_norm / (Real(0.1) + token.key_norm);
  }
};

/// One that is ready when the attention is.
struct odds_only {
  query_order order = query_order::before;
  restkv::metric metric_of_distance = restkv::metric::identity;

  static constexpr feature needs = feature::odds;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const token_features<Real>& token) const noexcept {
    return token.odds;
  }
};

constexpr index_t head_dims[] = {1, 3, 16, 24, 64, 80, 128, 256};
constexpr index_t groups[] = {1, 3, 4, 8};
constexpr index_t windows[] = {1, 2, 7, 8, 32, 33};
// Around multiples of the tile, 96 tokens; and 0 .. 2 stand for a window less 1, a window, and one token more.
constexpr index_t lengths[] = {95, 96, 97, 191, 192, 193, 0, 1, 2, 40};
constexpr group_reduce reductions[] = {group_reduce::none, group_reduce::mean, group_reduce::max, group_reduce::sum,
                                       group_reduce::l2};

template <std::size_t N, class E>
constexpr E in_turn(const E (&list)[N], index_t turn) {
  return list[static_cast<std::size_t>(turn) % N];
}

struct shape_case {
  layer_sizes sizes;
  index_t window = 0;
  index_t turn = 0;
  index_t seen_by = 0;  ///< the window of scores that are defined for its tokens

  /// The lists have lengths without common factors, or are walked at different speeds: all pairs meet in time.
  explicit shape_case(index_t t) : turn(t) {
    window = in_turn(windows, t);
    sizes.head_dim = in_turn(head_dims, t + t / 6);
    const index_t group = in_turn(groups, t / 3);
    const index_t length = in_turn(lengths, t + t / 10);
    sizes.tokens = length < 3 ? std::max<index_t>(window - 1 + length, 1) : std::max(length, window + 2);
    sizes.kv_heads = sizes.head_dim * group > 300 ? 1 : 2;
    sizes.query_heads = sizes.kv_heads * group;
    sizes.queries = window + t % 3;
    seen_by = t % 4 == 0 ? every_query : in_turn(windows, t / 4);
    sizes.batch = t % 6 == 4 ? 3 : 1;
    sizes.sharpness = 0.5 + static_cast<double>(t % 5);
    // Where the product with W_O would take the reference seconds, the identity is measured instead.
    const index_t work = sizes.batch * sizes.query_heads * window * sizes.tokens * sizes.head_dim * sizes.head_dim;
    sizes.hidden = work > 20'000'000 || sizes.query_heads * sizes.head_dim > 800 ? 0 : sizes.head_dim + t % 4 * 5 - 3;
    sizes.hidden = std::max<index_t>(sizes.hidden, 0);
  }
};

any_temporal temporal_of(index_t turn) {
  switch (turn % 6) {
    case 1: return {ema{0.3f}};
    case 2: return {last{}};
    case 3: return {sum{}};
    case 4: return {maximum{}};
    case 5: return {root_sum_square{}};
    default: return {mean{}};
  }
}

any_spatial spatial_of(index_t turn) {
  switch (turn % 4) {
    case 1: return {average_pool{.width = 5}};
    case 2: return {max_pool{.width = 7}};
    case 3: return {adaptive_window{.min_width = 3, .scale = 7.0f}};
    default: return {no_pool{}};
  }
}

/// What the comparison saw, so that a test can tell that it was not about nothing.
struct tally {
  index_t heads = 0;
  index_t evicting = 0;
  index_t same_sets = 0;
  index_t other_windows = 0;  ///< drifts on the two sides of a step of the adaptive window
  index_t other_counts = 0;   ///< heads that got another budget
};

/// Float's part of a row's largest score: every difference above it must show in the kept set.
constexpr double resolution = 2e-5;

template <class Policy>
void check_head(const Policy& policy, const selection_outcome<double>& exact, const selection_outcome<float>& fast,
                index_t b, index_t h, const sequence_span& span, tally& count) {
  const auto row = static_cast<std::size_t>(b * exact.heads + h);
  const auto& wanted = exact.kept_of(b, h);
  const auto& got = fast.kept_of(b, h);
  ++count.heads;
  count.evicting += static_cast<index_t>(wanted.size()) < span.length ? 1 : 0;
  count.same_sets += got == wanted ? 1 : 0;
  double largest = 0;
  double largest_smoothed = 0;
  double error = 0;
  for (std::size_t n = 0; n < static_cast<std::size_t>(span.length); ++n) {
    const double score = exact.scores_of(b, h)[n];
    if (std::isnan(score) && std::isnan(fast.scores_of(b, h)[n])) continue;  // a window token
    largest = std::max(largest, score);
    largest_smoothed = std::max(largest_smoothed, exact.smoothed_of(b, h)[n]);
    const double difference = std::fabs(score - double{fast.scores_of(b, h)[n]});
    error = difference <= error ? error : difference;
  }
  CHECK(error <= resolution * largest);
  if (const auto* adaptive = std::get_if<adaptive_window>(&policy.spatial.choice)) {
    const double a = exact.drift[row];
    const double other = fast.drift[row];
    if (adaptive->width(a) != adaptive->width(other) || adaptive->shift(a) != adaptive->shift(other)) {
      ++count.other_windows;
      return;
    }
  }
  if (got.size() != wanted.size()) {
    ++count.other_counts;
    return;
  }
  // The lowest score that only the reference keeps, the highest that only the other keeps.
  const auto smoothed_at = [&](position_t n) {
    return exact.smoothed_of(b, h)[static_cast<std::size_t>(n - span.begin)];
  };
  double lost = 0;
  double won = std::numeric_limits<double>::infinity();
  std::vector<position_t> differing;
  std::set_difference(wanted.begin(), wanted.end(), got.begin(), got.end(), std::back_inserter(differing));
  for (const position_t n : differing) lost = std::max(lost, smoothed_at(n));
  differing.clear();
  std::set_difference(got.begin(), got.end(), wanted.begin(), wanted.end(), std::back_inserter(differing));
  for (const position_t n : differing) won = std::min(won, smoothed_at(n));
  CHECK((got == wanted || lost - won <= 2 * resolution * largest_smoothed));
}

template <class Policy, class T>
void check_agreement(const Policy& policy, const layer_view<T>& layer, tally& count) {
  reference_backend reference;
  eigen_backend eigen;
  const auto exact = select_tokens(reference, policy, layer);
  const auto fast = select_tokens(eigen, policy, layer);
  const auto pruned = select_tokens(eigen, policy, layer, false);
  INFO(exact.result.message() << fast.result.message() << pruned.result.message());
  REQUIRE(exact.result.ok());
  REQUIRE(fast.result.ok());
  REQUIRE(pruned.result.ok());
  CHECK(pruned.kept == fast.kept);  // pruning is not allowed to be seen
  for (index_t b = 0; b < exact.batch; ++b) {
    const sequence_span span = sequence(layer, b, 0);
    for (index_t h = 0; h < exact.heads; ++h) {
      CAPTURE(b, h);
      check_head(policy, exact, fast, b, h, span, count);
    }
  }
}

/// Walks the shapes with one kind of score and temporal smoother.
template <class Score, class TemporalOf>
tally walk(index_t first, index_t cases, const Score& score, const TemporalOf& temporal) {
  tally count;
  for (index_t turn = first; turn < first + cases; ++turn) {
    shape_case shape(turn);
    if constexpr (scores_window<Score>()) {
      shape.sizes.queries = std::max(shape.sizes.queries, shape.sizes.tokens);
      shape.window = shape.seen_by;
    }
    arranged_layer<float> layer(shape.sizes, static_cast<unsigned>(turn + 100));
    output_metric metric;
    if (shape.sizes.hidden > 0) metric = attach_metric(layer);
    if (turn % 5 == 2) {  // values that have much in common
      for (index_t i = 0; i < layer.value.size(); ++i) layer.value.data[i] += 5.0f;
    }
    if (turn % 6 == 4) {
      layer.pad_to({static_cast<std::int32_t>(shape.sizes.tokens / 2), static_cast<std::int32_t>(shape.sizes.tokens),
                    static_cast<std::int32_t>(std::min(shape.window, shape.sizes.tokens - 1) + 1)},
                   turn % 4 == 0 ? padding::left : padding::right);
    }
    const index_t fixed = scores_window<Score>() ? 3 : shape.window;
    const index_t budget = fixed + 3 + (shape.sizes.tokens - fixed) * (turn % 7) / 8;
    using policy_t = eviction_policy<Score, decltype(temporal(turn)), any_spatial, any_budget>;
    policy_t policy{.score = score,
                    .window = shape.window,
                    .temporal = temporal(turn),
                    .spatial = spatial_of(turn / 2),
                    .group = in_turn(reductions, turn + turn / 5),
                    .budget = {uniform{budget}},
                    .protect = {.sink = turn % 3, .recent = scores_window<Score>() ? turn % 4 : 0}};
    if (scores_window<Score>() && uses_drift(policy.spatial)) policy.spatial.choice = average_pool{.width = 3};
    if (turn % 3 == 1) policy.budget.choice = ada_kv{.budget = budget, .normalise = turn % 2 == 0};
    if constexpr (requires { policy.score.noise; }) {
      if (turn % 5 == 1) policy.score.noise = {.temperature = 1.5f, .gumbel = true, .seed = 77};
    }
    if constexpr (requires { policy.score.attention_pool; }) {
      policy.score.attention_pool = 1 + static_cast<int>(turn % 4) * 2;
    }
    if constexpr (requires { policy.score.order; }) {
      const bool after = turn % 4 < 2 && is_average(policy.temporal);
      policy.score.order = after ? query_order::after : query_order::before;
      policy.score.metric_of_distance = shape.sizes.hidden > 0 ? restkv::metric::projection : restkv::metric::identity;
    }
    CAPTURE(turn, shape.window, shape.sizes.head_dim, shape.sizes.query_heads, shape.sizes.kv_heads, shape.sizes.tokens,
            shape.sizes.hidden, int(policy.group), policy.spatial.choice.index());
    check_agreement(policy, layer.view(), count);
  }
  return count;
}

void check_tally(const tally& count) {
  CAPTURE(count.heads, count.evicting, count.same_sets, count.other_windows, count.other_counts);
  CHECK(count.evicting > count.heads / 3);
  CHECK(count.same_sets > count.heads * 9 / 10);
  CHECK(count.other_windows + count.other_counts <= count.heads / 50);
}

const auto largest_of_window = [](index_t) { return maximum{}; };

}  // namespace

TEST_CASE("rest_kv keeps the same tokens on both backends") { check_tally(walk(0, 160, rest_kv{}, temporal_of)); }

TEST_CASE("snap_kv keeps the same tokens on both backends") { check_tally(walk(2000, 60, snap_kv{}, temporal_of)); }

TEST_CASE("a user's score that reads every feature keeps the same tokens on both backends") {
  check_tally(walk(3000, 60, all_features{}, temporal_of));
}

TEST_CASE("a user's score of odds alone keeps the same tokens on both backends") {
  check_tally(walk(5000, 40, odds_only{}, temporal_of));
  check_tally(walk(6000, 40, odds_only{}, largest_of_window));
}

TEST_CASE("a score of all tokens that a window sees keeps the same tokens on both backends") {
  check_tally(walk(7000, 60, seen_tokens{}, temporal_of));
}

TEST_CASE("a score of attention pooled within each query keeps the same tokens on both backends") {
  check_tally(walk(8000, 60, defensive_kv{}, temporal_of));
}

TEST_CASE("a user's score that needs no queries keeps the same tokens on both backends") {
  check_tally(walk(4000, 40, norms_only{}, [](index_t) { return any_temporal{}; }));
}
