// SPDX-License-Identifier: Apache-2.0
// The verifier's kernels on the host group against the verifier of the CPU: layers of every shape and kept sets of
// several kinds, within a bound of double's rounding; the order of work items, conflicts, memory and what is refused.
#include "kernel/verified_error_support.hpp"
#include "support/catch.hpp"
#include "support/check_error.hpp"
#include "support/layer_metric.hpp"
#include "support/random_layer.hpp"
#include "verify/verify_support.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/backend/kernel_output_error.hpp>
#include <restkv/reference/backend.hpp>

#include <cstring>

using namespace restkv_test;
using namespace restkv;

namespace {

/// Tables between guards, and a workspace that is exactly as large as planned.
struct verified {
  status outcome;
  output_error_plan plan;
  std::vector<double> tables;
  output_errors errors;

  template <element T>
  verified(const layer_view<T>& layer, const const_kept_tokens& kept, index_t queries, std::uint64_t seed = 1,
           kernel::conflict_recorder* recorder = nullptr) {
    host_kernel_backend backend(seed, recorder);
    outcome = plan_output_error(shape_of(layer),
                                {.queries = queries,
                                 .kept_heads = kept.heads(),
                                 .hidden = layer.projection.data == nullptr ? 0 : layer.projection.extent(0),
                                 .metric = !layer.metric.missing()},
                                plan);
    REQUIRE(outcome.ok());
    constexpr double guard = -123.0;
    std::vector<std::byte> memory(plan.workspace_bytes, std::byte{0xff});
    tables.assign(static_cast<std::size_t>(plan.table_elements() + 2), guard);
    outcome = output_error(backend, plan, kept, layer, {tables.data() + 1, {plan.table_elements()}},
                           workspace(memory.data(), memory.size()));
    REQUIRE(tables.front() == guard);
    REQUIRE(tables.back() == guard);
    tables.erase(tables.begin());
    tables.pop_back();
    if (outcome.ok()) outcome = read_output_errors(plan, layer, tables, errors);
  }
};

/// A kept set of one kind in turn.
template <element T>
owned_kept_tokens kept_in_turn(random_engine& random, const layer_view<T>& layer, index_t heads, index_t turn) {
  const index_t batch = layer.key.extent(0);
  const index_t tokens = layer.key.extent(2);
  const auto inside = [&](index_t b, index_t h, index_t n) {
    const auto span = sequence(layer, b, h * layer.key.extent(1) / heads);
    return n >= span.begin && n < span.begin + span.length;
  };
  const index_t one = pick(random, 0, std::max<index_t>(tokens - 1, 0));
  switch (turn % 6) {
    case 0:
      return keep_where(batch, heads, tokens, inside);
    case 1:
      return keep_where(batch, heads, tokens, [&](auto b, auto h, auto n) { return n == one && inside(b, h, n); });
    case 2:  // sinks and recent tokens
      return keep_where(batch, heads, tokens, [&](auto b, auto h, auto n) {
        const auto span = sequence(layer, b, h * layer.key.extent(1) / heads);
        return inside(b, h, n) && (n - span.begin < 4 || span.begin + span.length - n <= 9);
      });
    case 3:
      return keep_where(batch, heads, tokens, [](auto, auto, auto) { return false; });
    default:
      return keep_where(batch, heads, tokens, [&](auto b, auto h, auto n) {
        return chance(random, turn % 6 == 4 ? 20 : 90) && inside(b, h, n);
      });
  }
}

}  // namespace

TEST_CASE("kernels verify as the CPU does") {
  constexpr index_t head_dims[] = {1, 8, 16, 24, 64, 33, 80, 130};
  constexpr index_t windows[] = {1, 2, 7, 16, 33, 64};
  constexpr index_t lengths[] = {1, 63, 64, 65, 130, 300, 40};
  reference_backend reference;
  double largest = 0;
  for (index_t turn = 0; turn < 30; ++turn) {
    random_engine random(static_cast<unsigned>(turn + 1));
    layer_recipe recipe;
    recipe.head_dim = head_dims[turn % 8];
    recipe.tokens = lengths[turn % 7];
    recipe.group = turn % 3 == 0 ? 4 : turn % 3 == 1 ? 1 : 2;
    recipe.kv_heads = recipe.head_dim > 64 ? 1 : turn % 2 + 1;
    const index_t queries = std::min<index_t>(windows[turn % 6], recipe.head_dim > 64 ? 7 : 64);
    recipe.query_rows = std::max(queries, recipe.tokens < 64 ? recipe.tokens : queries + turn % 3);
    recipe.batch = turn % 5 == 4 ? 3 : 1;
    recipe.hidden = turn % 4 == 3 ? 0 : recipe.head_dim > 64 ? 70 : recipe.head_dim + 5;
    recipe.sharpness = 0.5 + static_cast<double>(turn % 4) * 2;
    recipe.strided = turn % 3 == 1;
    recipe.chunks = 1 + turn % 4;
    recipe.padded = turn % 5 == 4;
    recipe.pad = turn % 2 == 0 ? padding::left : padding::right;
    random_layer layer(random, recipe);
    if (turn % 4 == 2) layer.view().projection = {};  // the metric alone
    const index_t heads = turn % 2 == 0 ? recipe.kv_heads : recipe.kv_heads * recipe.group;
    const owned_kept_tokens kept = kept_in_turn(random, layer.view(), heads, turn / 2);
    CAPTURE(turn, queries, recipe.head_dim, recipe.tokens, recipe.group, recipe.batch, recipe.hidden, heads);

    const output_errors expected = output_error(reference, kept.kept(), layer.view(), queries);
    const verified found(layer.view(), kept.kept(), queries);
    INFO(found.outcome.message());
    REQUIRE(found.outcome.ok());
    largest = std::max(largest, compare_errors(expected, found.errors, layer.view()));
  }
  CAPTURE(largest);
  CHECK(largest > 0);
  CHECK(largest < 1);
}

TEMPLATE_TEST_CASE("kernels verify elements of 16 bits as the same numbers in float, bit by bit", "", half) {
  for (const index_t head_dim : {24, 80}) {
    const layer_sizes sizes{.head_dim = head_dim, .tokens = 150, .queries = 9, .hidden = 70};
    arranged_layer<TestType> layer(sizes, 4);
    arranged_layer<float> widened(sizes, 4);
    const auto copy = [](const auto& from, const auto& to) {
      for (index_t i = 0; i < from.size(); ++i) to.data[i] = widen<float>(from.data[i]);  // both are dense
    };
    copy(layer.query, widened.query);
    copy(layer.key, widened.key);
    copy(layer.value, widened.value);
    std::transform(layer.projection.begin(), layer.projection.end(), widened.projection.begin(),
                   widen<float, TestType>);
    const output_metric metric = attach_metric(widened);
    layer.metric = widened.metric;
    const owned_kept_tokens kept = keep_where(1, 2, 150, [](auto, auto h, auto n) { return n % 3 == h; });
    const verified expected(widened.view(), kept.kept(), 9);
    const verified found(layer.view(), kept.kept(), 9, 77);  // and in another order
    REQUIRE(expected.outcome.ok());
    REQUIRE(found.outcome.ok());
    CHECK(std::memcmp(found.tables.data(), expected.tables.data(), found.tables.size() * sizeof(double)) == 0);
  }
}

TEST_CASE("kernels verify one token that has nearly all of the attention, kept or evicted") {
  reference_backend reference;
  for (const double lead : {20.0, 60.0, 400.0}) {
    for (const bool keeps_it : {true, false}) {
      arranged_layer<float> layer({.tokens = 150, .queries = 6, .hidden = 24}, 6);
      const output_metric metric = attach_metric(layer);
      for (index_t h = 0; h < 4; ++h) {
        for (index_t i = 0; i < 6; ++i) layer.query(0, h, i, 0) = 3.0f;
      }
      for (index_t h = 0; h < 2; ++h) layer.key(0, h, 70, 0) = static_cast<float>(lead * 4.0 / 3.0);
      const owned_kept_tokens kept =
          keep_where(1, 2, 150, [&](auto, auto, auto n) { return n == 70 ? keeps_it : n % 3 == 0; });
      CAPTURE(lead, keeps_it);
      const verified found(layer.view(), kept.kept(), 6);
      REQUIRE(found.outcome.ok());
      CHECK(compare_errors(output_error(reference, kept.kept(), layer.view(), 6), found.errors, layer.view()) < 1);
      CHECK((keeps_it ? found.errors.evicted_mass()(0, 0, 0) < 0.5 : found.errors.evicted_mass()(0, 0, 0) > 0.5));
    }
  }
}

TEST_CASE("a layer shorter than the plan, with heads of different lengths, and no conflict of work items") {
  arranged_layer<float> layer({.batch = 2, .tokens = 90, .queries = 40, .hidden = 70}, 3);
  const output_metric metric = attach_metric(layer);
  layer_view<float> view = layer.view();
  const std::vector<std::int32_t> lengths{90, 35, 0, 7};
  view.head_lengths = {lengths.data(), {2, 2}};
  const owned_kept_tokens kept = keep_where(2, 2, 90, [&](auto b, auto h, auto n) {
    const auto span = sequence(view, b, h);
    return n >= span.begin && n % 4 != 1;
  });
  output_error_plan plan;
  problem_shape shape = shape_of(view);
  shape.tokens = 3000;
  REQUIRE(plan_output_error(shape, {.queries = 38, .hidden = 70, .metric = true}, plan).ok());
  CHECK(plan.splits > 1);
  std::vector<std::byte> memory(plan.workspace_bytes, std::byte{0xff});
  std::vector<double> tables(static_cast<std::size_t>(plan.table_elements()), -1.0);
  kernel::conflict_recorder recorder;
  host_kernel_backend backend(std::uint64_t{5}, &recorder);
  REQUIRE(output_error(backend, plan, kept.kept(), view, {tables.data(), {plan.table_elements()}},
                       workspace(memory.data(), memory.size()))
              .ok());
  CHECK(recorder.conflicts().empty());
  output_errors found;
  REQUIRE(read_output_errors(plan, view, tables, found).ok());
  reference_backend reference;
  CHECK(compare_errors(output_error(reference, kept.kept(), view, 38), found, view) < 1);
}

TEST_CASE("without tokens, or without sequences, nothing costs anything") {
  for (const index_t batch : {0, 2}) {
    const arranged_layer<float> layer({.batch = batch, .tokens = 0, .queries = 3});
    const owned_kept_tokens kept(batch, 2, 0);
    const verified found(layer.view(), kept.kept(), 3);
    INFO(found.outcome.message());
    REQUIRE(found.outcome.ok());
    CHECK(found.tables == std::vector<double>(found.tables.size(), 0.0));
    CHECK(found.errors.mean_relative() == 0);
  }
}

TEST_CASE("what the verifier's kernels refuse") {
  arranged_layer<float> layer({.tokens = 20, .queries = 5, .hidden = 12}, 2);
  const output_metric metric = attach_metric(layer);
  const layer_view<float> view = layer.view();
  const problem_shape shape = shape_of(view);
  const output_error_options all{.queries = 5, .hidden = 12, .metric = true};
  const owned_kept_tokens kept = keep_where(1, 2, 20, [](auto, auto, auto n) { return n % 2 == 0; });
  output_error_plan plan;
  const auto refused_plan = [&](const problem_shape& of, const output_error_options& how) {
    return plan_output_error(of, how, plan);
  };
  check_error(refused_plan({.query_heads = 3, .kv_heads = 2, .head_dim = 16}, all), errc::shape_mismatch, {3, 2});
  check_error(refused_plan(shape, {.queries = 0}), errc::invalid_argument, {0});
  check_error(refused_plan(shape, {.queries = 5, .hidden = 12}), errc::missing_input, {12}, "metric");
  check_error(refused_plan(shape, {.queries = 5, .kept_heads = 3}), errc::shape_mismatch, {3, 2, 4});
  REQUIRE(plan_output_error(shape, all, plan).ok());

  std::vector<std::byte> memory(plan.workspace_bytes);
  std::vector<double> tables(static_cast<std::size_t>(plan.table_elements()), -1.0);
  host_kernel_backend backend;
  const auto run = [&](const layer_view<float>& of, const const_kept_tokens& set, index_t elements, std::size_t bytes) {
    return output_error(backend, plan, set, of, {tables.data(), {elements}}, workspace(memory.data(), bytes));
  };
  layer_view<float> other = view;
  other.projection = {};
  check_error(run(other, kept.kept(), plan.table_elements(), memory.size()), errc::missing_input, {}, "projection");
  other = view;
  other.metric = {};
  check_error(run(other, kept.kept(), plan.table_elements(), memory.size()), errc::missing_input, {}, "metric");
  other = view;
  other.query = view.query.slice(2, 0, 4);
  check_error(run(other, kept.kept(), plan.table_elements(), memory.size()), errc::shape_mismatch, {4, 5});
  const owned_kept_tokens for_query_heads(1, 4, 20);
  check_error(run(view, for_query_heads.kept(), plan.table_elements(), memory.size()), errc::shape_mismatch, {4, 2});
  check_error(run(view, kept.kept(), plan.table_elements() - 1, memory.size()), errc::shape_mismatch, {}, "elements");
  check_error(run(view, kept.kept(), plan.table_elements(), memory.size() / 2), errc::workspace_too_small, {},
              "workspace");
  CHECK(tables == std::vector<double>(tables.size(), -1.0));

  layer.value(0, 0, 3, 0) = std::numeric_limits<float>::infinity();
  REQUIRE(run(view, kept.kept(), plan.table_elements(), memory.size()).ok());
  output_errors errors;
  check_error(read_output_errors(plan, view, tables, errors), errc::invalid_argument, {}, "not finite");
  CHECK(errors.batch() == 0);
  tables.pop_back();
  check_error(read_output_errors(plan, view, tables, errors), errc::shape_mismatch, {}, "elements");
}
