// SPDX-License-Identifier: Apache-2.0
// Score kernels of attention alone: odds, pooled attention, windows whose own tokens are scored.
#include "kernel/attention_support.hpp"
#include "support/feature_scores.hpp"

#include <restkv/score/defensive_kv.hpp>
#include <restkv/smoothing/mean_variance.hpp>

using namespace restkv_test;
using namespace restkv;

namespace {

/// One that is ready when the attention is.
struct odds_only {
  query_order order = query_order::before;
  static constexpr feature needs = feature::odds;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const token_features<Real>& token) const noexcept {
    return token.odds;
  }
};

}  // namespace

TEST_CASE("kernels: odds alone are the reference's") { check_scores<float>(odds_only{}, temporal_of, 300, 40); }

TEST_CASE("kernels: snap_kv is the reference's with a smoother that needs whole columns") {
  check_scores<float>(
      snap_kv{}, [](index_t) { return mean_variance{}; }, 500, 30);
}

TEST_CASE("kernels: scores of the tokens that a window sees are the reference's") {
  check_scores<float>(seen_tokens{{.temperature = 1.5f, .gumbel = true, .seed = 77}}, temporal_of, 700, 40);
}

TEST_CASE("kernels: attention pooled within each query is the reference's") {
  check_scores<float>(defensive_kv{.attention_pool = 5}, temporal_of, 800, 40);
  check_scores<float>(defensive_kv{.attention_pool = 129}, temporal_of, 900, 10);
}
