// SPDX-License-Identifier: Apache-2.0
// Scores and selections on Thrust's OpenMP system have the same bits as on its sequential system, for any number of
// threads.
#include "thrust/score_support.hpp"

#include <restkv/backend/bulk.hpp>
#include <restkv/score/defensive_kv.hpp>

#include <cstring>

#include <omp.h>

using namespace restkv;
using namespace restkv_test;

namespace {

using omp_backend = thrust_backend<thrust_omp>;
static_assert(bulk_backend<omp_backend>);

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class Score, class Arrange>
void walk(unsigned seed, Score score, const Arrange& arrange) {
  random_engine random(seed);
  for (int i = 0; i < 25; ++i) {
    const random_shape shape(random, scores_window<Score>());
    const random_layer<bfloat16> layer(random, shape.recipe);
    using request_t = score_request<Score, any_temporal>;
    request_t request{.score = score,
                      .temporal = random_temporal(random),
                      .window = needs_window<Score>() ? shape.window : 0,
                      .group = chance(random, 50) ? group_reduce::l2 : group_reduce::none,
                      .shape = shape_of(layer.view())};
    arrange(request, random);
    CAPTURE(seed, i, shape.window, shape.recipe.tokens);
    const auto sequential = score_rows(thrust_backend<thrust_cpp>{}, request, layer.view());
    REQUIRE(sequential.result.ok());
    for (const int threads : {1, 2, 5}) {
      omp_set_num_threads(threads);
      // A slab of another size changes no bit either.
      const omp_backend backend(thrust_tuning{.slab_floats = threads == 2 ? index_t(1) << 12 : index_t(1) << 22});
      const auto parallel = score_rows(backend, request, layer.view());
      REQUIRE(parallel.result.ok());
      CHECK(same_bits(parallel.scores, sequential.scores));
      CHECK(same_bits(parallel.drift, sequential.drift));
    }
  }
}

}  // namespace

TEST_CASE("scores on OpenMP have the same bits for every number of threads") {
  walk(21, rest_kv{}, [](auto& request, random_engine& random) {
    request.score.order = chance(random, 50) && is_average(request.temporal) ? query_order::after : query_order::before;
    request.score.metric_of_distance = chance(random, 50) ? metric::projection : metric::identity;
  });
  walk(22, seen_tokens{}, [](auto&, auto&) {});
  walk(23, defensive_kv{}, [](auto&, auto&) {});
}

TEST_CASE("OpenMP runs every index once") {
  omp_set_num_threads(4);
  const omp_backend backend;
  std::vector<int> calls(1000);
  backend.parallel_for(1000, [&](index_t i) { ++calls[static_cast<std::size_t>(i)]; });
  CHECK(calls == std::vector<int>(1000, 1));
}
