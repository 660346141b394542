// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/verification.md, compiled and run.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"
#include "support/layer_metric.hpp"

#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/select.hpp>
#include <restkv/verify/future_error.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

using restkv::index_t;
using restkv::position_t;

namespace {

//! [reference]
/// Scores, smoothed scores and kept set of a policy, in double, by loops that read like the method's description.
struct reference_answer {
  restkv::plan<restkv::eviction_policy<>> plan;
  std::vector<std::byte> memory;
  std::vector<double> score, smoothed, drift;
  restkv::kept_tokens kept;

  template <class T>
  reference_answer(const restkv::eviction_policy<>& policy, const restkv::layer_view<T>& layer) {
    restkv::reference_backend backend;
    plan = restkv::make_plan(backend, policy, restkv::shape_of(layer));
    memory.resize(plan.workspace_bytes);
    const auto [batch, heads, tokens] = std::array{plan.shape.batch, plan.heads, plan.shape.tokens};
    score.resize(static_cast<std::size_t>(batch * heads * tokens));
    smoothed.resize(score.size());
    drift.resize(static_cast<std::size_t>(batch * heads));
    const restkv::selection_details<double> details{{score.data(), {batch, heads, tokens}},
                                                    {smoothed.data(), {batch, heads, tokens}},
                                                    {drift.data(), {batch, heads}}};
    restkv::throw_if_failed(restkv::select(backend, plan, layer, restkv::workspace(memory), kept, &details));
  }
};
//! [reference]

//! [ties]
/// How far a kept set is from the best one by the reference's scores: the largest amount, relative to the smallest kept
/// score, by which a token that was left out beats a token that was kept. 0 where the set is the reference's own; tiny
/// where two nearly equal tokens changed places, as rounding may do; large where the kernel is wrong.
double disorder(std::span<const double> smoothed, std::span<const position_t> kept, index_t past) {
  double worst_kept = std::numeric_limits<double>::infinity();
  double best_left = -std::numeric_limits<double>::infinity();
  for (index_t n = 0; n < past; ++n) {
    const bool is_kept = std::binary_search(kept.begin(), kept.end(), static_cast<position_t>(n));
    double& bound = is_kept ? worst_kept : best_left;
    const double score = smoothed[static_cast<std::size_t>(n)];
    bound = is_kept ? std::min(bound, score) : std::max(bound, score);
  }
  return std::max(0.0, (best_left - worst_kept) / std::max(std::abs(worst_kept), 1e-300));
}
//! [ties]

/// A kept set in memory of its own, as a kernel may hand it over.
struct kernel_answer {
  std::vector<position_t> positions, lengths;

  explicit kernel_answer(const restkv::kept_tokens& kept)
      : positions(kept.positions.data, kept.positions.data + kept.positions.size()),
        lengths(kept.lengths.data, kept.lengths.data + kept.lengths.size()) {}
};

}  // namespace

TEST_CASE("a kernel's answer against the reference", "[docs]") {
  restkv_test::arranged_layer<float> made(
      {.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 150, .hidden = 32});
  const auto metric = restkv_test::attach_metric(made);
  const restkv::layer_view<float> layer = made.view();
  restkv::eviction_policy policy = restkv::presets::standard(60);
  policy.budget.floor = 1.0f;  // every head keeps the same number

  const reference_answer expected(policy, layer);
  const kernel_answer kernel(expected.kept);
  const index_t batch = 1, kv_heads = 2, capacity = expected.kept.capacity(), past = 150 - 32;
  for (index_t h = 0; h < kv_heads; ++h) {
    const auto row = std::span(expected.smoothed).subspan(static_cast<std::size_t>(h * 150), 150);
    std::vector<position_t> kept(kernel.positions.begin() + h * capacity,
                                 kernel.positions.begin() + h * capacity + kernel.lengths[static_cast<std::size_t>(h)]);
    CHECK(disorder(row, kept, past) == 0.0);
    // The worst token of all instead of the best: far from a tie.
    const auto worst = std::min_element(row.begin(), row.begin() + past) - row.begin();
    REQUIRE(!std::binary_search(kept.begin(), kept.end(), static_cast<position_t>(worst)));
    kept.erase(kept.begin());
    kept.insert(std::upper_bound(kept.begin(), kept.end(), static_cast<position_t>(worst)),
                static_cast<position_t>(worst));
    CHECK(disorder(row, kept, past) > 0.1);
  }

  //! [output_error]
  // What a kernel kept: positions [batch, heads, capacity] and lengths [batch, heads], wherever they come from.
  const restkv::const_kept_tokens kept{{kernel.positions.data(), {batch, kv_heads, capacity}},
                                       {kernel.lengths.data(), {batch, kv_heads}}};
  restkv::throw_if_failed(restkv::check_kept(kept, batch, kv_heads, layer.key.extent(2)));

  restkv::reference_backend backend;  // or eigen_backend: the same numbers on its threads
  const restkv::output_errors errors = restkv::output_error(backend, kept, layer);
  const double relative = errors.mean_relative();        // of the layer's output, over all queries
  const double of_worst_query = errors.worst_relative();
  const double of_one_head = errors.head()(0, 3, 31);    // ||o' - o||: sequence 0, query head 3, newest query
  const double predicted = errors.layer_predicted()(0, 31);  // by single deletions
  //! [output_error]
  CHECK(relative > 0);
  CHECK(of_worst_query >= relative);
  CHECK(of_one_head > 0);
  CHECK(predicted > 0);
  CHECK(errors.projected());

  // Nothing evicted, nothing lost.
  const auto everything = restkv::select(backend, restkv::presets::snap_kv(150), layer);
  CHECK(restkv::output_error(backend, everything, layer).mean_relative() == 0.0);

  const restkv_test::arranged_layer<float> later(
      {.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 20, .queries = 20}, 5);
  const restkv::tensor_view<const float, 4> query_of_answer = later.query, key_of_answer = later.key;
  const restkv::tensor_view<const float, 4> value_of_answer = later.value;
  //! [future_error]
  // Queries, keys and values of the tokens that the model wrote after the prompt, with its full cache.
  const restkv::future_view<float> future{query_of_answer, key_of_answer, value_of_answer};
  const double of_answer = restkv::future_error(backend, kept, layer, future).mean_relative();
  //! [future_error]
  CHECK(of_answer > 0);
  CHECK(of_answer < 1);
}
