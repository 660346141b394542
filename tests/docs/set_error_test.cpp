// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/set-error.md, compiled and run.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"

#include <restkv/merge/fit_values.hpp>
#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/select.hpp>
#include <restkv/selection/set_error.hpp>
#include <restkv/selection/set_error/anticipation.hpp>
#include <restkv/verify/merged_output_error.hpp>

#include <vector>

using restkv::index_t;

TEST_CASE("a set for the queries to come", "[docs]") {
  restkv_test::arranged_layer<float> made({.head_dim = 8, .tokens = 260, .queries = 64, .hidden = 20});
  const restkv::layer_view<float> layer = made.view();
  const index_t query_heads = 4, kv_heads = 2, head_dim = 8, tokens = 260, budget = 48;
  restkv::reference_backend backend;

  //! [prepare]
  // Once, when the model is loaded.
  std::vector<double> frequencies(static_cast<std::size_t>(head_dim / 2));
  restkv::throw_if_failed(restkv::rope_frequencies(restkv::rope_parameters<>{head_dim, 100000.0}, frequencies));
  restkv::group_metric joint;
  restkv::throw_if_failed(joint.build(layer.projection, query_heads, head_dim, kv_heads));
  //! [prepare]

  //! [anticipate]
  // The layer as the next 32 queries may see it: an ordinary layer_view, so any policy can look at it.
  const restkv::anticipation guess{.horizon = 32, .frequencies = frequencies};
  std::vector<std::byte> guess_memory(restkv::anticipation_workspace_bytes(guess, layer));
  restkv::anticipated_layer<float> coming;
  restkv::throw_if_failed(restkv::anticipate(guess, layer, restkv::workspace(guess_memory), coming));

  auto policy = restkv::presets::lowest_error(budget + 32);
  policy.score.metric_of_distance = restkv::metric::identity;  // or the projection, with layer.metric
  policy.protect.recent = 32 + 8;                              // the copies of the last tokens, and the newest 8
  restkv::owned_selection start;
  restkv::throw_if_failed(start.run(backend, policy, coming.layer));
  //! [anticipate]

  //! [refine]
  auto wider = policy;  // the tokens that may come in
  wider.budget.budget = 3 * budget + 32;
  restkv::owned_selection candidates;
  restkv::throw_if_failed(candidates.run(backend, wider, coming.layer));

  restkv::kept_tokens kept = start.kept();
  const restkv::set_error options{.horizon = 32,
                                  .weights = coming.weights,
                                  .noise_weights = coming.noise_weights,
                                  .protect = {.sink = 0, .recent = 32 + 8}};
  std::vector<std::byte> memory(restkv::set_error_workspace_bytes(options, coming.layer, candidates.kept(), kept));
  restkv::set_error_report report;
  restkv::throw_if_failed(restkv::refine_set_error(backend, options, coming.layer, joint.view(), candidates.kept(), kept,
                                                   restkv::workspace(memory), &report));
  //! [refine]
  CHECK(report.after <= report.before);
  CHECK(kept.total() == kv_heads * (budget + 32));

  const auto size = static_cast<std::size_t>(kv_heads * kept.capacity() * head_dim);
  std::vector<float> new_keys(size), new_values(size);
  const restkv::dense_layout<float> key{{new_keys.data(), {1, kv_heads, kept.capacity(), head_dim}}};
  const restkv::dense_layout<float> value{{new_values.data(), {1, kv_heads, kept.capacity(), head_dim}}};
  //! [fit]
  // The copies come along: they stand behind the kept tokens, and go again at the end.
  restkv::throw_if_failed(restkv::compact(kept, coming.layer.key, coming.layer.value, key, value));
  using layout = restkv::dense_layout<float>;
  const restkv::merged_cache<layout, layout> cache{kept, key, value, {}};
  std::vector<std::byte> fit_memory(restkv::fit_workspace_bytes(cache, coming.layer));
  restkv::throw_if_failed(restkv::fit_values(cache, coming.layer, {}, restkv::workspace(fit_memory)));
  restkv::drop_anticipated(kept, tokens);
  //! [fit]

  CHECK(kept.total() == kv_heads * budget);
  REQUIRE(restkv::check_kept(kept, 1, kv_heads, tokens).ok());
  restkv::merged_output_errors after;
  REQUIRE(restkv::merged_output_error(backend, restkv::merged_cache<layout, layout>{kept, key, value, {}}, layer, after)
              .ok());
  CHECK(after.mean_relative() > 0);
}
