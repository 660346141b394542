// SPDX-License-Identifier: Apache-2.0
// The drift kernels on the host, items of every phase shuffled, against the reference.
#include "kernel/attention_support.hpp"

#include <restkv/score/observed_attention.hpp>

using namespace restkv_test;
using namespace restkv;

namespace {

template <element T>
score_request<snap_kv, mean> drift_request(const layer_view<T>& layer, index_t window) {
  return {snap_kv{}, mean{}, window, group_reduce::mean, shape_of(layer)};
}

/// Whole numbers, so few that logits are exact in any order and full of ties.
template <element T>
void make_exact(random_engine& random, random_layer<T>& layer) {
  const auto set = [&](T& element) { element = narrow<T>(static_cast<float>(pick(random, -2, 2))); };
  for_each(layer.query.view(), set);
  for_each(layer.key.view(), set);
}

std::vector<index_t> most_attended_of(random_engine& random, index_t batch, index_t tokens) {
  std::vector<index_t> counts;
  for (index_t b = 0; b < batch; ++b) counts.push_back(pick(random, 0, tokens + 3));
  return counts;
}

template <element T>
void check_exact(index_t first, index_t cases) {
  index_t moved = 0;
  for (index_t turn = first; turn < first + cases; ++turn) {
    random_engine random(static_cast<unsigned>(turn + 1));
    score_case shape(random, turn);
    shape.recipe.head_dim = turn % 3 == 0 ? 4 : 16;
    shape.recipe.hidden = 0;
    shape.recipe.padded = false;  // what lies in the padding would be made valid
    random_layer<T> layer(random, shape.recipe);
    make_exact(random, layer);
    const auto request = drift_request(layer.view(), shape.window);
    const auto counts = most_attended_of(random, shape.recipe.batch, shape.recipe.tokens);
    CAPTURE(turn, shape.window, shape.recipe.tokens, shape.recipe.batch, counts);
    const auto exact = reference_drift(request, layer.view(), counts);
    const auto got = kernel_drift(request, layer.view(), counts, {.split_tokens = 64 * (1 + turn % 2)});
    for (std::size_t i = 0; i < exact.size(); ++i) {
      CHECK(got[i] == Approx(exact[i]).epsilon(1e-12).margin(1e-9));
      moved += exact[i] != 0 ? 1 : 0;
    }
    CHECK(got == kernel_drift(request, layer.view(), counts, {.seed = 99, .split_tokens = 64}));
  }
  CHECK(moved > cases / 2);
}

}  // namespace

TEST_CASE("kernels: the drift is the reference's, ties included") {
  check_exact<float>(0, 40);
  check_exact<restkv::half>(100, 20);
  check_exact<bfloat16>(200, 20);
}

TEST_CASE("kernels: the drift of padded layers is the reference's but where logits are nearly equal") {
  index_t heads = 0;
  index_t same = 0;
  for (index_t turn = 0; turn < 40; ++turn) {
    random_engine random(static_cast<unsigned>(turn + 1));
    score_case shape(random, turn);
    shape.recipe.hidden = 0;
    shape.recipe.batch = 2;
    shape.recipe.padded = true;
    const random_layer<float> layer(random, shape.recipe);
    const auto request = drift_request(layer.view(), shape.window);
    const auto counts = most_attended_of(random, shape.recipe.batch, shape.recipe.tokens);
    const auto exact = reference_drift(request, layer.view(), counts);
    const auto got = kernel_drift(request, layer.view(), counts, {});
    for (std::size_t i = 0; i < exact.size(); ++i) {
      ++heads;
      same += std::fabs(got[i] - exact[i]) <= 1e-9 * (1 + std::fabs(exact[i])) ? 1 : 0;
    }
  }
  CAPTURE(heads, same);
  CHECK(same >= heads * 98 / 100);
}

TEST_CASE("kernels: a window of more queries than are observed together has the same drift") {
  for (const index_t window : {63, 64, 65, 129, 150, 151}) {
    random_engine random(static_cast<unsigned>(window));
    random_layer<float> layer(random, {.group = 2, .head_dim = 4, .tokens = 150, .query_rows = 151, .hidden = 0});
    make_exact(random, layer);
    const score_request<observed_attention, mean> request{{}, {}, window, group_reduce::mean, shape_of(layer.view())};
    const auto exact = reference_drift(request, layer.view(), {20});
    const auto got = kernel_drift(request, layer.view(), {20}, {});
    CAPTURE(window);
    for (std::size_t i = 0; i < exact.size(); ++i) CHECK(got[i] == Approx(exact[i]).epsilon(1e-12).margin(1e-9));
  }
}

TEST_CASE("kernels: the phases of the drift do not get in each other's way") {
  random_engine random(7);
  const random_layer<float> layer(
      random, {.batch = 2, .group = 2, .head_dim = 8, .tokens = 150, .query_rows = 6, .hidden = 0, .padded = true});
  kernel::conflict_recorder recorder;
  static_cast<void>(kernel_drift(drift_request(layer.view(), 6), layer.view(), {40, 50}, {.recorder = &recorder}));
  CHECK(recorder.conflicts().empty());
}
