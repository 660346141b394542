// SPDX-License-Identifier: Apache-2.0
// What merging does on recorded layers: the window's error with and without a guard, and that of the queries to come.
#include "merge/merge_support.hpp"
#include "support/test_data.hpp"

#include <restkv/merge/add_summary.hpp>
#include <restkv/merge/fit_values.hpp>
#include <restkv/merge/look_m.hpp>
#include <restkv/merge/merge.hpp>
#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/select.hpp>
#include <restkv/verify/merged_output_error.hpp>

using namespace restkv_test;
using restkv::half;

namespace {

/// The first heads of [heads, tokens, channels] as a batch of one.
tensor_view<const half, 4> first_heads(const tensor_view<half, 3>& tensor, index_t heads) {
  return {tensor.data, {1, heads, tensor.extent(1), tensor.extent(2)}};
}

/// One KV head of a layer, with its three query heads and their part of W_O.
struct trace_layer {
  trace_layer(const restkv::safetensors_file& file, const std::string& name)
      : query(file, name + "q"),
        key(file, name + "k"),
        value(file, name + "v"),
        future_query(file, name + "q_future"),
        future_key(file, name + "k_future"),
        future_value(file, name + "v_future"),
        projection(file, name + "wo") {
    layer.query = first_heads(query.view, 3).slice(2, query.view.extent(1) - 32, 32);
    layer.key = first_heads(key.view, 1);
    layer.value = first_heads(value.view, 1);
    layer.projection = projection.view.slice(1, 0, 3 * key.view.extent(2));
    future = {first_heads(future_query.view, 3), first_heads(future_key.view, 1), first_heads(future_value.view, 1)};
  }

  file_tensor<half, 3> query, key, value, future_query, future_key, future_value;
  file_tensor<half, 2> projection;
  restkv::layer_view<half> layer;
  restkv::future_view<half> future;
};

}  // namespace

TEST_CASE("a summary and fitted values lower what SnapKV costs the queries to come", "[merge][trace]") {
  const auto file = open_file(example_data("trace-2k.safetensors"));
  restkv::reference_backend backend;
  for (const std::string name : {"layers.10.", "layers.19."}) {
    CAPTURE(name);
    const trace_layer trace(file, name);
    const auto& layer = trace.layer;
    const auto plan = restkv::make_plan(backend, restkv::presets::snap_kv(128), restkv::shape_of(layer));
    std::vector<std::byte> memory(plan.workspace_bytes);
    const auto kept = restkv::select(backend, plan, layer, restkv::workspace(memory));

    const index_t heads = 1, entries = 129, channels = 64;
    std::vector<half> keys(static_cast<std::size_t>(heads * entries * channels)), values(keys.size());
    std::vector<position_t> lengths{128};
    const restkv::dense_layout key{tensor_view<half, 4>(keys.data(), {1, heads, entries, channels})};
    const restkv::dense_layout value{tensor_view<half, 4>(values.data(), {1, heads, entries, channels})};
    const restkv::merged_cache cache{restkv::const_kept_tokens(kept), key, value,
                                     tensor_view<position_t, 2>(lengths.data(), {1, heads})};
    std::vector<std::byte> room;
    const auto window_error = [&] {
      restkv::merged_output_errors errors;
      REQUIRE(restkv::merged_output_error(backend, cache, layer, errors).ok());
      return errors.mean_relative();
    };
    const auto future_error = [&] {
      restkv::merged_output_errors errors;
      REQUIRE(restkv::merged_future_error(backend, cache, layer, trace.future, errors).ok());
      return errors.mean_relative();
    };
    const auto compact = [&] { REQUIRE(restkv::compact(kept, layer.key, layer.value, key, value).ok()); };
    compact();
    const double dropped = window_error();
    const double future_dropped = future_error();

    std::vector<double> frequencies;  // of the recorded model
    for (index_t i = 0; i < 32; ++i) frequencies.push_back(std::pow(100000.0, -static_cast<double>(i) / 32));
    restkv::merge_options options{.guard = restkv::merge_guard::none};
    options.rope.frequencies = frequencies;
    room.resize(restkv::merge_workspace_bytes(cache, layer, restkv::pivot_merge{}, options));
    REQUIRE(restkv::merge(cache, layer, restkv::pivot_merge{}, options, restkv::workspace(room)).ok());
    const double merged = window_error();
    CHECK(merged > 1.2 * dropped);
    compact();
    options.guard = restkv::merge_guard::token;
    room.resize(restkv::merge_workspace_bytes(cache, layer, restkv::pivot_merge{}, options));
    REQUIRE(restkv::merge(cache, layer, restkv::pivot_merge{}, options, restkv::workspace(room)).ok());
    CHECK(window_error() < dropped);

    compact();
    room.resize(restkv::summary_workspace_bytes(cache, layer));
    REQUIRE(restkv::add_summary(cache, layer, {}, restkv::workspace(room)).ok());
    const double summarised = window_error();
    CHECK(summarised < dropped);
    room.resize(restkv::fit_workspace_bytes(cache, layer));
    REQUIRE(restkv::fit_values(cache, layer, {}, restkv::workspace(room)).ok());
    CHECK(window_error() < 0.6 * dropped);
    CHECK(future_error() < 0.9 * future_dropped);
  }
}
