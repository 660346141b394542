// SPDX-License-Identifier: Apache-2.0
// Caches whose heads have different lengths: a head of one is what it would be alone.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"
#include "support/layer_metric.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/verify/output_error.hpp>

#include <numeric>

using namespace restkv_test;
using namespace restkv;

namespace {

constexpr index_t group = 2;

/// A layer whose heads have lengths of their own; what lies behind them is NaN.
struct ragged_layer {
  arranged_layer<float> whole;
  output_metric metric;
  std::vector<std::int32_t> lengths;

  ragged_layer(index_t turn, restkv::padding pad)
      : whole({.batch = 2,
               .query_heads = 3 * group,
               .kv_heads = 3,
               .head_dim = 8,
               .tokens = 120,
               .queries = 9,
               .hidden = 11},
              static_cast<unsigned>(turn + 1)),
        metric(attach_metric(whole)) {
    whole.pad = pad;
    random_engine random(static_cast<unsigned>(turn));
    for (index_t i = 0; i < 2 * 3; ++i) lengths.push_back(static_cast<std::int32_t>(pick(random, i == 0 ? 0 : 10, 120)));
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 3; ++h) {
        const sequence_span span = sequence(view(), b, h);
        for (index_t n = 0; n < 120; ++n) {
          if (n >= span.begin && n < span.begin + span.length) continue;
          for (index_t c = 0; c < 8; ++c) {
            whole.key(b, h, n, c) = whole.value(b, h, n, c) = std::numeric_limits<float>::quiet_NaN();
          }
        }
      }
    }
  }

  [[nodiscard]] layer_view<float> view() const {
    layer_view<float> layer = whole.view();
    layer.head_lengths = {lengths.data(), {2, 3}};
    return layer;
  }
  /// One KV head of one sequence as a layer of its own.
  [[nodiscard]] layer_view<float> alone(index_t b, index_t h) const {
    layer_view<float> layer = view();
    layer.query = layer.query.slice(0, b, 1).slice(1, h * group, group);
    layer.key = tensor_view<const float, 4>(whole.key).slice(0, b, 1).slice(1, h, 1);
    layer.value = tensor_view<const float, 4>(whole.value).slice(0, b, 1).slice(1, h, 1);
    layer.metric.gram = layer.metric.gram.slice(0, h * group, group);
    layer.metric.factor = layer.metric.factor.slice(0, h * group, group);
    layer.metric.spectrum = layer.metric.spectrum.slice(0, h * group, group);
    layer.projection = layer.projection.slice(1, h * group * 8, group * 8);
    layer.head_lengths = {};
    layer.lengths = {lengths.data() + b * 3 + h, {1}};
    return layer;
  }
};

template <class Backend>
void check_heads(Backend& backend) {
  index_t evicting = 0;
  for (index_t turn = 0; turn < 24; ++turn) {
    const ragged_layer layer(turn, turn % 2 == 0 ? padding::right : padding::left);
    eviction_policy<rest_kv, any_temporal, any_spatial, any_budget> policy{
        .score = {.order = turn % 3 == 0 ? query_order::after : query_order::before},
        .window = 9,
        .budget = {uniform{40}},
        .protect = {.sink = turn % 4, .recent = 0}};
    if (turn % 5 == 1) policy.spatial.choice = no_pool{};
    if (turn % 7 == 2) policy.group = group_reduce::none;
    const auto together = select_tokens(backend, policy, layer.view());
    REQUIRE(together.result.message() == std::string());
    // Without details: where a backend might prune.
    const auto again = select_tokens(backend, policy, layer.view(), false);
    REQUIRE(again.result.message() == std::string());
    CHECK(again.kept == together.kept);
    const index_t rows = together.heads / 3;
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 3; ++h) {
        const auto alone = select_tokens(backend, policy, layer.alone(b, h));
        REQUIRE(alone.result.message() == std::string());
        for (index_t r = 0; r < rows; ++r) {
          CAPTURE(turn, b, h, r, layer.lengths[static_cast<std::size_t>(b * 3 + h)]);
          CHECK(together.kept_of(b, h * rows + r) == alone.kept_of(0, r));
          evicting += static_cast<index_t>(alone.kept_of(0, r).size()) <
                      layer.lengths[static_cast<std::size_t>(b * 3 + h)];
        }
      }
    }
  }
  CHECK(evicting > 60);
}

}  // namespace

TEST_CASE("heads of different lengths keep what each would keep alone") {
  SECTION("reference") {
    reference_backend backend;
    check_heads(backend);
  }
  SECTION("Eigen") {
    eigen_backend backend(2);
    check_heads(backend);
  }
}

TEST_CASE("heads of different lengths compete for what the budget has") {
  reference_backend backend;
  index_t short_heads = 0;
  for (index_t turn = 0; turn < 20; ++turn) {
    const ragged_layer layer(turn, padding::right);
    const index_t budget = 30;
    eviction_policy<rest_kv, any_temporal, any_spatial, any_budget> policy{.window = 9,
                                                                           .budget = {ada_kv{.budget = budget}},
                                                                           .protect = {.sink = 0, .recent = 0}};
    const auto got = select_tokens(backend, policy, layer.view());
    REQUIRE(got.result.message() == std::string());
    for (index_t b = 0; b < 2; ++b) {
      index_t kept = 0, tokens = 0;
      for (index_t h = 0; h < 3; ++h) {
        const auto count = static_cast<index_t>(got.kept_of(b, h).size());
        const index_t length = layer.lengths[static_cast<std::size_t>(b * 3 + h)];
        CHECK(count <= length);
        kept += count;
        tokens += length;
        short_heads += length < budget ? 1 : 0;
      }
      CAPTURE(turn, b, kept, tokens);
      CHECK(kept <= 3 * budget);
      // Nothing is left over: either the budget is used, up to what heads shorter than the window protect less, or all fits.
      CHECK((kept == tokens || kept >= 3 * budget - 3 * 9));
    }
  }
  CHECK(short_heads > 10);
}

TEST_CASE("the error of a ragged cache is that of its heads") {
  reference_backend backend;
  for (index_t turn = 0; turn < 6; ++turn) {
    const ragged_layer layer(turn, padding::right);
    const auto chosen = select_tokens(backend, eviction_policy<rest_kv>{.window = 9, .budget = {.budget = 25}, .protect = {.recent = 0}},
                                      layer.view());
    REQUIRE(chosen.result.message() == std::string());
    const auto errors_of = [&](const layer_view<float>& view, const std::vector<std::vector<position_t>>& rows,
                               index_t batch, index_t heads) {
      std::vector<position_t> positions(static_cast<std::size_t>(batch * heads * 120)), lengths;
      for (std::size_t i = 0; i < rows.size(); ++i) {
        std::copy(rows[i].begin(), rows[i].end(), positions.begin() + static_cast<std::ptrdiff_t>(i * 120));
        lengths.push_back(static_cast<position_t>(rows[i].size()));
      }
      output_errors errors;
      const kept_tokens kept({positions.data(), {batch, heads, 120}}, {lengths.data(), {batch, heads}});
      const status outcome = output_error(backend, kept, view, errors);
      INFO(outcome.message());
      REQUIRE(outcome.ok());
      return errors;
    };
    layer_view<float> view = layer.view();
    const index_t queries = std::min<index_t>(9, shortest_head(view, 1));
    view.query = view.query.slice(2, 9 - queries, queries);
    const auto together = errors_of(view, chosen.kept, 2, 3);
    for (index_t h = 0; h < 3; ++h) {
      layer_view<float> alone = layer.alone(1, h);
      alone.query = alone.query.slice(2, 9 - queries, queries);
      const auto single = errors_of(alone, {chosen.kept_of(1, h)}, 1, 1);
      for (index_t i = 0; i < queries; ++i) {
        for (index_t j = 0; j < group; ++j) {
          CAPTURE(turn, h, i, j);
          const double want = single.head()(0, j, i);
          CHECK(std::fabs(together.head()(1, h * group + j, i) - want) <= 1e-12 * (1 + want));
        }
      }
    }
  }
}
