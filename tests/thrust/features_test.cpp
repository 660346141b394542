// SPDX-License-Identifier: Apache-2.0
// Scores of every kind on Thrust's sequential system against the reference: features, windows, noise, pools, whole
// heads.
#include "thrust/score_support.hpp"

#include <restkv/score/defensive_kv.hpp>
#include <restkv/score/value_range.hpp>

using namespace restkv;
using namespace restkv_test;

TEST_CASE("a score of every feature on Thrust is the reference's") {
  CHECK(walk<float>(4, 120, every_feature{}, arrange_order_and_metric) > 10000);
}

TEST_CASE("scores of attention alone on Thrust are the reference's") {
  CHECK(walk<bfloat16>(5, 60, snap_kv{}, [](auto&, auto&) {}) > 3000);
  CHECK(walk<float>(6, 60, odds_only{}, arrange_order_and_metric) > 3000);
}

TEST_CASE("a score of every token that a window sees, on Thrust, with noise and without") {
  const auto arrange = [](auto& request, random_engine& random) {
    if (chance(random, 30)) request.score.noise = {.temperature = 1.5f, .gumbel = chance(random, 70), .seed = 77};
  };
  CHECK(walk<float>(7, 80, seen_tokens{}, arrange, false) > 5000);
}

TEST_CASE("attention pooled within each query, on Thrust") {
  const auto arrange = [](auto& request, random_engine& random) {
    request.score.attention_pool = static_cast<int>(2 * pick(random, 0, 6) + 1);
  };
  CHECK(walk<float>(8, 60, defensive_kv{}, arrange) > 2000);
}

TEST_CASE("scores without queries on Thrust are the reference's") {
  const auto arrange = [](auto& request, random_engine& random) {
    request.score.metric_of_distance = chance(random, 50) ? metric::projection : metric::identity;
  };
  CHECK(walk<restkv::half>(9, 60, norms_only{}, arrange, false) > 2000);
}

namespace {

/// A score of whole heads that differs between the query heads of a KV head, and uses scratch memory.
struct scaled_range {
  static constexpr cache_part reads = cache_part::values;
  static constexpr bool per_query_head = true;

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape& shape) const noexcept { return shape.head_dim; }
  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    value_range{}.score_head(head, scores, scratch);
    for (Real& score : scores) score *= static_cast<Real>(1 + head.query_head());
  }
};

}  // namespace

TEST_CASE("scores of whole heads on Thrust are the reference's") {
  const auto nothing = [](auto&, auto&) {};
  CHECK(walk<float>(10, 40, value_range{}, nothing, false) > 2000);
  CHECK(walk<bfloat16>(11, 40, scaled_range{}, nothing, false) > 2000);
}
