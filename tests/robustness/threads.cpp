// SPDX-License-Identifier: Apache-2.0
// What threads may do at the same time, under the thread sanitizer: the loops of a backend's own threads, and several
// threads that share a plan, a layer and a kept set, each with a backend and a workspace of its own. A program without
// a test library, which would have to be built for the sanitizer, too. Results must not depend on any of it.
#include "support/random_layer.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/compact.hpp>
#include <restkv/select.hpp>
#include <restkv/verify/output_error.hpp>

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

using namespace restkv;
using restkv_test::random_engine;
using restkv_test::random_layer;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}
void require(const status& outcome) { require(outcome.ok(), outcome.message()); }

const auto policy = eviction_policy{.score = rest_kv{.metric_of_distance = metric::identity},
                                    .window = 8,
                                    .budget = ada_kv{.budget = 60},
                                    .protect = {.sink = 2, .recent = 8}};
using plan_type = plan<std::remove_cv_t<decltype(policy)>>;

/// A selection, what is gathered by it and what it costs, by a backend with `threads` threads.
struct result {
  std::vector<std::byte> memory;
  kept_tokens kept;
  std::vector<float> key;
  double error = 0;

  result(const plan_type& made, const layer_view<float>& layer, int threads) : memory(made.workspace_bytes) {
    eigen_backend backend(threads);
    require(select(backend, made, layer, workspace(memory.data(), memory.size()), kept));
    const index_t dim = layer.key.extent(3);
    key.resize(static_cast<std::size_t>(kept.batch() * kept.heads() * kept.capacity() * dim));
    const tensor_view<float, 4> out(key.data(), {kept.batch(), kept.heads(), kept.capacity(), dim});
    require(gather_tokens(kept, layer.key, dense_layout{out}, backend_loop{backend}));
    output_errors errors;
    require(output_error(backend, kept, layer, errors));
    error = errors.head()(0, 0, 0);
  }

  [[nodiscard]] bool equals(const result& other) const { return key == other.key && error == other.error; }
};

}  // namespace

int main() {
  random_engine random(1);
  restkv_test::layer_recipe recipe;
  recipe.batch = 2;
  recipe.tokens = 300;
  recipe.hidden = 0;
  const random_layer<float> layer(random, recipe);
  const eigen_backend planning(4);  // the most threads of any that run the plan
  plan_type made;
  require(make_plan(planning, policy, shape_of(layer.view()), made));
  const result alone(made, layer.view(), 1);
  for (int trial = 0; trial < 3; ++trial) {
    require(alone.equals(result(made, layer.view(), 4)), "four threads of one backend");
    std::vector<std::thread> workers;
    std::vector<int> equal(3, 0);
    for (std::size_t i = 0; i < equal.size(); ++i) {
      workers.emplace_back([&, i] { equal[i] = alone.equals(result(made, layer.view(), 2)) ? 1 : 0; });
    }
    for (std::thread& worker : workers) worker.join();
    for (const int one : equal) require(one == 1, "three backends at a time");
  }
  std::puts("ok");
  return 0;
}
