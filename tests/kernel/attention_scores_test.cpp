// SPDX-License-Identifier: Apache-2.0
// The score kernels on the host, items of every phase shuffled, against the reference.
#include "kernel/attention_support.hpp"

using namespace restkv_test;
using namespace restkv;

namespace {

/// A score of a user's own that reads every feature.
struct all_features {
  query_order order = query_order::before;
  restkv::metric metric_of_distance = restkv::metric::identity;

  static constexpr feature needs = feature::attention | feature::odds | feature::distance | feature::output_norm |
                                   feature::value_norm | feature::key_norm | feature::alignment |
                                   feature::value_norm_l1 | feature::mean_distance;

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const token_features<Real>& token) const noexcept {
    return token.attention * (token.value_norm + token.value_norm_l1 + std::fabs(token.alignment)) +
           token.odds * (token.distance + token.mean_distance) / (Real(1) + token.output_norm) +
           Real(1e-3) * token.key_norm / (Real(1) + static_cast<Real>(token.length - token.position));
  }
};

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
