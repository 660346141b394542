// SPDX-License-Identifier: Apache-2.0
// The score kernels on the host, items of every phase shuffled, against the reference.
#include "kernel/attention_support.hpp"
#include "support/feature_scores.hpp"

using namespace restkv_test;
using namespace restkv;

namespace {

/// One that needs no queries.
struct norms_only {
  restkv::metric metric_of_distance = restkv::metric::identity;
  static constexpr feature needs = feature::value_norm | feature::key_norm | feature::projected_norm_l1;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const token_features<Real>& token) const noexcept {
    return token.value_norm / (Real(0.1) + token.key_norm) + token.projected_norm_l1;
  }
};

}  // namespace

TEST_CASE("kernels: rest_kv is the reference's in both orders and metrics") {
  check_scores<float>(rest_kv{}, temporal_of, 0, 84);
}

TEST_CASE("kernels: a user's score that reads every feature is the reference's") {
  check_scores<float>(all_features{}, temporal_of, 200, 60);
}

TEST_CASE("kernels: a score that needs no queries is the reference's") {
  check_scores<float>(
      norms_only{}, [](index_t) { return mean{}; }, 600, 40);
}
