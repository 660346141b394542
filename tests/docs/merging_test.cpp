// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/merging.md, compiled and run.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"

#include <restkv/cache/channel_pruning.hpp>
#include <restkv/merge/add_summary.hpp>
#include <restkv/merge/fit_values.hpp>
#include <restkv/merge/merge.hpp>
#include <restkv/merge/value_merge.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/verify/merged_output_error.hpp>

#include <vector>

using restkv::index_t;
using restkv::position_t;

namespace {

using layout = restkv::dense_layout<float>;

/// A layer of 90 tokens, of which every third and the last 30 are kept, and the future that follows.
struct compacted {
  restkv_test::arranged_layer<float> whole{{.head_dim = 8, .tokens = 98, .queries = 40}};
  restkv::layer_view<float> layer = whole.view();
  restkv::future_view<float> future;
  std::vector<position_t> positions, lengths{50, 50};
  restkv::const_kept_tokens kept;
  std::vector<float> keys, values;

  compacted() : keys(2 * 51 * 8), values(keys.size()) {
    layer.query = whole.query.slice(2, 0, 32);
    layer.key = whole.key.slice(2, 0, 90);
    layer.value = whole.value.slice(2, 0, 90);
    future = {whole.query.slice(2, 32, 8), whole.key.slice(2, 90, 8), whole.value.slice(2, 90, 8)};
    for (int h = 0; h < 2; ++h) {
      for (position_t n = 0; n < 90; ++n) {
        if (n % 3 == 0 || n >= 60) positions.push_back(n);
      }
    }
    lengths = {50, 50};
    kept = {restkv::tensor_view<const position_t, 3>(positions.data(), {1, 2, 50}),
            restkv::tensor_view<const position_t, 2>(lengths.data(), {1, 2})};
  }
};

}  // namespace

TEST_CASE("steps on a compacted cache", "[docs]") {
  compacted made;
  const auto& kept = made.kept;
  const auto& layer = made.layer;
  const restkv::tensor_view<float, 4> new_keys(made.keys.data(), {1, 2, 51, 8});
  const restkv::tensor_view<float, 4> new_values(made.values.data(), {1, 2, 51, 8});
  std::vector<std::byte> memory;

  //! [steps]
  // Compact first, with room for one more entry a head.
  const restkv::dense_layout<float> key{new_keys}, value{new_values};
  restkv::throw_if_failed(restkv::compact(kept, layer.key, layer.value, key, value));

  // lengths: the entries of each head from now on; new tokens are appended behind them.
  std::vector<position_t> entries(static_cast<std::size_t>(kept.batch() * kept.heads()));
  const restkv::merged_cache<layout, layout> cache{kept, key, value, {entries.data(), {kept.batch(), kept.heads()}}};

  memory.resize(restkv::summary_workspace_bytes(cache, layer));
  restkv::throw_if_failed(restkv::add_summary(cache, layer, {}, restkv::workspace(memory)));
  memory.resize(restkv::fit_workspace_bytes(cache, layer));
  restkv::throw_if_failed(restkv::fit_values(cache, layer, {}, restkv::workspace(memory)));
  //! [steps]

  CHECK((entries[0] == 50 || entries[0] == 51));

  restkv::reference_backend backend;
  const auto& future = made.future;
  //! [verify]
  restkv::merged_output_errors window, later;
  restkv::throw_if_failed(restkv::merged_output_error(backend, cache, layer, window));
  restkv::throw_if_failed(restkv::merged_future_error(backend, cache, layer, future, later));
  const double seen = window.mean_relative();  // 0.01 is one per cent
  const double to_come = later.mean_relative();
  //! [verify]
  restkv::output_errors dropped;
  REQUIRE(restkv::output_error(backend, kept, layer, dropped).ok());
  CHECK(seen < dropped.mean_relative());
  CHECK(to_come > 0);
}

TEST_CASE("an operator and its guard", "[docs]") {
  compacted made;
  const auto& layer = made.layer;
  const layout key{restkv::tensor_view<float, 4>(made.keys.data(), {1, 2, 51, 8})};
  const layout value{restkv::tensor_view<float, 4>(made.values.data(), {1, 2, 51, 8})};
  REQUIRE(restkv::compact(made.kept, layer.key, layer.value, key, value).ok());
  const auto before = made.values;
  const restkv::merged_cache<layout, layout> cache{made.kept, key, value, {}};
  std::vector<double> frequencies(4);
  REQUIRE(restkv::rope_frequencies(restkv::rope_parameters<restkv::unscaled_rope>{.rotary_dim = 8}, frequencies).ok());
  std::vector<std::byte> memory;

  //! [merge]
  restkv::merge_options options{.guard = restkv::merge_guard::token, .protect = {.sink = 4, .recent = 32}};
  options.rope.frequencies = frequencies;  // of `rope_frequencies`
  memory.resize(restkv::merge_workspace_bytes(cache, layer, restkv::value_merge{}, options));
  restkv::throw_if_failed(restkv::merge(cache, layer, restkv::value_merge{}, options, restkv::workspace(memory)));
  //! [merge]

  CHECK(made.values != before);
}

TEST_CASE("keys with fewer channels", "[docs]") {
  compacted made;
  const auto& layer = made.layer;
  const restkv::tensor_view<const float, 4> all_keys = made.whole.key.slice(2, 0, 90);
  const restkv::tensor_view<const float, 4> query = made.whole.query.slice(2, 39, 1);
  const index_t batch = 1, query_heads = 4, kv_heads = 2, head_dim = 8, tokens = 90, recent = 32;

  //! [channels]
  const index_t left = restkv::kept_channels(head_dim, 0.4);
  std::vector<double> scores(static_cast<std::size_t>(batch * kv_heads * head_dim));
  const restkv::tensor_view<double, 3> score_view(scores.data(), {batch, kv_heads, head_dim});
  restkv::throw_if_failed(restkv::score_channels(layer, 32, score_view));
  std::vector<position_t> chosen(static_cast<std::size_t>(batch * kv_heads * left));
  const restkv::tensor_view<position_t, 3> channels(chosen.data(), {batch, kv_heads, left});
  restkv::throw_if_failed(restkv::select_channels(score_view, channels));

  // All but the last keys are stored with fewer channels; each new query is cut down alike.
  std::vector<float> thin(static_cast<std::size_t>(batch * kv_heads * (tokens - recent) * left));
  const restkv::tensor_view<float, 4> thin_keys(thin.data(), {batch, kv_heads, tokens - recent, left});
  const restkv::tensor_view<const position_t, 3> read = channels;
  restkv::throw_if_failed(restkv::gather_channels(read, all_keys.slice(2, 0, tokens - recent), thin_keys));
  std::vector<float> thin_query(static_cast<std::size_t>(batch * query_heads * left));
  restkv::throw_if_failed(restkv::gather_channels(
      read, query, restkv::tensor_view<float, 4>(thin_query.data(), {batch, query_heads, 1, left})));
  //! [channels]

  CHECK(left == 5);
  CHECK(thin_keys(0, 1, 7, 0) == made.whole.key(0, 1, 7, channels(0, 1, 0)));
}
