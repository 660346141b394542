// SPDX-License-Identifier: Apache-2.0
// output_error against the golden cases, and future_error against the figures of a real trace.
#include "support/test_data.hpp"

#include <restkv/reference/backend.hpp>
#include <restkv/verify/future_error.hpp>

using namespace restkv;
using namespace restkv_test;

TEST_CASE("the golden set errors: per head before and through W_O, and per layer") {
  const auto i = GENERATE(0, 1, 2);
  CAPTURE(i);
  const safetensors_file file = open_file(test_data("golden/set-error-" + std::to_string(i) + ".safetensors"));
  const file_tensor<float, 3> q(file, "q");
  const file_tensor<float, 3> k(file, "k");
  const file_tensor<float, 3> v(file, "v");
  const file_tensor<float, 2> wo(file, "wo");
  const file_tensor<std::int32_t, 2> keep(file, "expected.keep");
  const file_tensor<double, 2> value_error(file, "expected.value_error");
  const file_tensor<double, 2> head_error(file, "expected.output_error_per_head");
  const file_tensor<double, 1> layer_error(file, "expected.output_error_layer");
  const index_t heads = keep.view.extent(0);
  const index_t tokens = keep.view.extent(1);
  const index_t window = layer_error.view.extent(0);

  owned_kept_tokens kept(1, heads, tokens);
  for (index_t h = 0; h < heads; ++h) {
    position_t& length = kept.kept().lengths(0, h);
    for (index_t n = 0; n < tokens; ++n) {
      if (keep.view(h, n) != 0) kept.kept().positions(0, h, length++) = static_cast<position_t>(n);
    }
    REQUIRE(length > 0);
    REQUIRE(length < tokens);
  }
  layer_view<float> layer;
  layer.query = batched(q.view);
  layer.key = batched(k.view);
  layer.value = batched(v.view);
  layer.projection = wo.view;

  reference_backend backend;
  const output_errors errors = output_error(backend, kept, layer, window);
  REQUIRE(errors.queries() == window);
  REQUIRE(errors.projected());
  for (index_t row = 0; row < window; ++row) {
    CAPTURE(row);
    for (index_t h = 0; h < heads; ++h) {
      CAPTURE(h);
      CHECK(errors.head()(0, h, row) == Approx(value_error.view(h, row)).epsilon(1e-5));
      CHECK(errors.head_projected()(0, h, row) == Approx(head_error.view(h, row)).epsilon(1e-5));
    }
    CHECK(errors.layer()(0, row) == Approx(layer_error.view(row)).epsilon(1e-5));
  }
}

TEST_CASE("the errors of future queries that the kept sets of a real trace cause") {
  const safetensors_file trace = open_file(example_data("trace-2k.safetensors"));
  const safetensors_file expected = open_file(test_data("traces/trace-2k.expected.safetensors"));
  const std::string* const text = expected.find_metadata("figures");
  REQUIRE(text != nullptr);
  const auto figures = nlohmann::json::parse(*text);
  constexpr index_t window = 32;
  reference_backend backend;
  index_t compared = 0;
  for (const char* const index : {"1", "10", "19", "28"}) {
    const std::string name = std::string("layers.") + index + ".";
    const file_tensor<float, 3> q(trace, name + "q");
    const file_tensor<float, 3> k(trace, name + "k");
    const file_tensor<float, 3> v(trace, name + "v");
    const file_tensor<float, 2> wo(trace, name + "wo");
    const file_tensor<float, 3> future_q(trace, name + "q_future");
    const file_tensor<float, 3> future_k(trace, name + "k_future");
    const file_tensor<float, 3> future_v(trace, name + "v_future");
    layer_view<float> layer;
    layer.query = batched(q.view);
    layer.key = batched(k.view);
    layer.value = batched(v.view);
    layer.projection = wo.view;
    const future_view<float> future{batched(future_q.view), batched(future_k.view), batched(future_v.view)};
    const index_t tokens = k.view.extent(1);

    for (const std::string set : {"after.scale2000.budget128", "before.scale100.budget512"}) {
      CAPTURE(name, set);
      const file_tensor<std::int32_t, 2> indices(expected, name + set + ".indices");
      const index_t chosen = indices.view.extent(1);
      owned_kept_tokens kept(1, indices.view.extent(0), chosen + window);
      for (index_t h = 0; h < indices.view.extent(0); ++h) {
        for (index_t i = 0; i < chosen; ++i) kept.kept().positions(0, h, i) = indices.view(h, i);
        for (index_t i = 0; i < window; ++i) {
          kept.kept().positions(0, h, chosen + i) = static_cast<position_t>(tokens - window + i);
        }
        kept.kept().lengths(0, h) = static_cast<position_t>(chosen + window);
      }
      const output_errors errors = future_error(backend, kept, layer, future);
      REQUIRE(errors.queries() == 32);
      CHECK(errors.mean_relative() == Approx(figures.at(name + set + ".future_error").get<double>()).epsilon(1e-3));
      CHECK(errors.worst_relative() > errors.mean_relative());
      ++compared;
    }
  }
  CHECK(compared == 8);
}
