// SPDX-License-Identifier: Apache-2.0
// Hard cases of the score kernels: attention of one token alone, damaged inputs, heads of different length, phases that
// get in each other's way.
#include "kernel/attention_support.hpp"
#include "support/arranged_layer.hpp"
#include "support/damaged_places.hpp"

using namespace restkv_test;
using namespace restkv;

namespace {

constexpr index_t window = damaged_window;
constexpr index_t past = damaged_past;
const layer_sizes& sizes = damaged_sizes;

template <class Score, class Temporal, element T>
auto make_request(const Score& score, const Temporal& temporal, const layer_view<T>& layer, index_t queries = window,
                  group_reduce group = group_reduce::l2) {
  return score_request<Score, Temporal>{score, temporal, queries, group, shape_of(layer)};
}

/// The same tokens without a score that is a number, and the scores of the others: the same up to what float resolves,
/// or both beyond what a float distance can be.
template <class Request>
void check_damage(const Request& request, const layer_view<float>& layer) {
  constexpr double immense = 1e9;
  const auto exact = reference_scores(request, layer);
  const auto got = kernel_scores(request, layer, {});
  for (index_t row = 0; row < request.heads(); ++row) {
    double largest = 0;
    double error = 0;
    index_t differing = 0;
    for (index_t n = 0; n < past; ++n) {
      const double score = exact.view(0, row, n);
      const auto mine = static_cast<double>(got.view(0, row, n));
      if (std::isnan(score) || std::isnan(mine) || score > immense || mine > immense) {
        differing += std::isnan(score) == std::isnan(mine) && (score > immense) == (mine > immense) ? 0 : 1;
        continue;
      }
      largest = std::max(largest, score);
      error = std::max(error, std::fabs(score - mine));
    }
    CAPTURE(row, largest, error);
    CHECK(differing == 0);
    CHECK(error <= resolution * largest);
  }
}

}  // namespace

TEST_CASE("kernels: damaged inputs damage the same scores as in the reference") {
  for (const place& where : places) {
    for (const float bad : {not_a_number, infinity, -infinity}) {
      arranged_layer<float> layer(sizes, 5);
      const output_metric metric = attach_metric(layer);
      where.damage(layer, bad);
      for (const auto order : {query_order::before, query_order::after}) {
        for (const auto how : {restkv::metric::identity, restkv::metric::projection}) {
          CAPTURE(where.name, bad, int(order), int(how));
          const rest_kv score{.order = order, .metric_of_distance = how};
          check_damage(make_request(score, any_temporal{mean{}}, layer.view()), layer.view());
          check_damage(make_request(score, any_temporal{last{}}, layer.view()), layer.view());
          check_damage(make_request(score, maximum{}, layer.view()), layer.view());
        }
      }
      check_damage(make_request(snap_kv{}, any_temporal{}, layer.view()), layer.view());
    }
  }
}

TEST_CASE("kernels: a token that holds all but 1e-9 of the attention, or all but 1e-40, keeps its exact score") {
  check_sinks<float>();
}

TEST_CASE("kernels: heads of different length, shorter than the window among them") {
  random_engine random(11);
  random_layer<float> layer(random, {.batch = 2, .kv_heads = 3, .group = 2, .head_dim = 8, .tokens = 150});
  const std::vector<std::int32_t> lengths{150, 16, 20, 5, 0, 129};
  layer.view().head_lengths = {lengths.data(), {2, 3}};
  for (const auto side : {padding::left, padding::right}) {
    layer.view().pad = side;
    for (const auto order : {query_order::before, query_order::after}) {
      const auto request = make_request(rest_kv{.order = order}, ema{}, layer.view(), 16);
      CHECK(compare_rows(request, layer.view(), kernel_scores(request, layer.view(), {}),
                         reference_scores(request, layer.view())) > 0);
      const auto per_head = make_request(rest_kv{.order = order}, ema{}, layer.view(), 16, group_reduce::none);
      compare_rows(per_head, layer.view(), kernel_scores(per_head, layer.view(), {}),
                   reference_scores(per_head, layer.view()));
    }
  }
}

TEST_CASE("kernels: long windows") {
  for (const index_t queries : {100, 300}) {
    random_engine random(static_cast<unsigned>(queries));
    const random_layer<float> layer(
        random, {.kv_heads = 1, .group = 2, .head_dim = 8, .tokens = 350, .query_rows = queries, .hidden = 0});
    const auto check = [&](const auto& request) {
      CHECK(compare_rows(request, layer.view(), kernel_scores(request, layer.view(), {}),
                         reference_scores(request, layer.view())) > 0);
    };
    check(make_request(rest_kv{.metric_of_distance = restkv::metric::identity}, root_sum_square{}, layer.view(),
                       queries));
    check(make_request(rest_kv{.metric_of_distance = restkv::metric::identity}, mean{}, layer.view(), queries));
    check(make_request(rest_kv{.order = query_order::after, .metric_of_distance = restkv::metric::identity}, maximum{},
                       layer.view(), queries));
  }
}

TEST_CASE("kernels: the phases of the scores do not get in each other's way") {
  random_engine random(13);
  for (const index_t queries : {4, 40}) {
    const random_layer<float> layer(
        random, {.kv_heads = 1, .group = 2, .head_dim = 33, .tokens = 140, .query_rows = queries, .hidden = 40});
    const auto check = [&](const auto& request) {
      kernel::conflict_recorder recorder;
      static_cast<void>(kernel_scores(request, layer.view(), {.recorder = &recorder}));
      CHECK(recorder.conflicts().empty());
    };
    check(make_request(rest_kv{}, mean{}, layer.view(), queries));
    check(make_request(rest_kv{}, maximum{}, layer.view(), queries));
    check(make_request(rest_kv{.order = query_order::after}, mean{}, layer.view(), queries));
    check(make_request(rest_kv{.order = query_order::after}, maximum{}, layer.view(), queries));
  }
}

TEST_CASE("kernels: a cache in too many chunks is refused, and nothing is written") {
  random_engine random(17);
  random_layer<float> layer(random, {.tokens = 60});
  std::vector<tensor_view<const float, 4>> chunks;
  const tensor_view<const float, 4> whole = layer.key.read();
  for (index_t n = 0; n < 60; n += 5) chunks.push_back(whole.slice(2, n, 5));
  layer.view().key = {chunks.data(), static_cast<index_t>(chunks.size())};
  const auto request = make_request(rest_kv{}, mean{}, layer.view());
  scratch_memory<std::remove_const_t<decltype(request)>> scratch(request, {});
  kernel::host_executor executor;
  score_table<float> out({1, request.heads(), 60});
  const status done = kernel::token_scores(executor, request, layer.view(), scratch.get(), out.view);
  CHECK(done.code() == errc::unsupported);
  CHECK_THAT(done.message(), Catch::Contains("12 chunks"));
  for (const float score : out.memory) CHECK(std::isnan(score));
}
