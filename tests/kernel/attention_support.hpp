// SPDX-License-Identifier: Apache-2.0
// Runs the attention kernels on the host and compares their rows with the reference's.
#pragma once

#include "support/arranged_layer.hpp"
#include "support/catch.hpp"
#include "support/layer_metric.hpp"
#include "support/random_layer.hpp"

#include <restkv/kernel/attention_scores.hpp>
#include <restkv/kernel/drift_select.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>

#include <cstring>
#include <optional>
#include <vector>

namespace restkv_test {

using namespace restkv;

/// Rows of scores [batch, heads, tokens], NaN where there is none.
template <class Real>
struct score_table {
  std::vector<Real> memory;
  tensor_view<Real, 3> view;

  explicit score_table(const std::array<index_t, 3>& extents)
      : memory(static_cast<std::size_t>(extents[0] * extents[1] * extents[2]) + 1,
               std::numeric_limits<Real>::quiet_NaN()),
        view(memory.data(), extents) {}
};

/// What a launch is done with.
struct launch_setup {
  std::uint64_t seed = 1;
  index_t split_tokens = 64;
  kernel::conflict_recorder* recorder = nullptr;
};

/// Scratch over exactly the workspace that it asks for.
template <class Request>
class scratch_memory {
 public:
  scratch_memory(const Request& request, const launch_setup& setup) {
    const kernel::attention_tuning tuning{.split_tokens = setup.split_tokens, .most_splits = 1000};
    workspace counting;
    { const kernel::attention_scratch<Request> counted(request, tuning, counting); }
    memory_.assign(counting.required_bytes(), std::byte{0xcd});
    workspace space(memory_.data(), memory_.size());
    scratch_.emplace(request, tuning, space);
    REQUIRE(space.check().ok());
  }
  [[nodiscard]] kernel::attention_scratch<Request>& get() { return *scratch_; }

 private:
  std::vector<std::byte> memory_;
  std::optional<kernel::attention_scratch<Request>> scratch_;
};

/// token_scores of the kernels.
template <class Request, element T>
[[nodiscard]] score_table<float> kernel_scores(const Request& request, const layer_view<T>& layer,
                                               const launch_setup& setup) {
  scratch_memory<Request> scratch(request, setup);
  kernel::host_executor executor(setup.seed, setup.recorder);
  score_table<float> out({request.shape.batch, request.heads(), request.shape.tokens});
  const status done = kernel::token_scores(executor, request, layer, scratch.get(), out.view);
  INFO(done.message());
  REQUIRE(done.ok());
  return out;
}

/// window_drift of the kernels. [batch, query_heads]
template <class Request, element T>
[[nodiscard]] std::vector<double> kernel_drift(const Request& request, const layer_view<T>& layer,
                                               const std::vector<index_t>& most_attended, const launch_setup& setup) {
  scratch_memory<Request> scratch(request, setup);
  kernel::host_executor executor(setup.seed, setup.recorder);
  std::vector<double> drift(static_cast<std::size_t>(request.shape.batch * request.shape.query_heads), -1e30);
  const tensor_view<double, 2> out(drift.data(), {request.shape.batch, request.shape.query_heads});
  REQUIRE(kernel::window_drift(executor, request, layer, layer, most_attended, scratch.get(), out).ok());
  return drift;
}

/// The reference's.
template <class Request, element T>
[[nodiscard]] std::vector<double> reference_drift(const Request& request, const layer_view<T>& layer,
                                                  const std::vector<index_t>& most_attended) {
  std::vector<std::byte> memory(8 * static_cast<std::size_t>(request.shape.batch * request.shape.query_heads) + 256);
  workspace space(memory.data(), memory.size());
  const reference_backend reference;
  reference_backend::scratch<Request> scratch(reference, request, space);
  std::vector<double> drift(static_cast<std::size_t>(request.shape.batch * request.shape.query_heads));
  const tensor_view<double, 2> out(drift.data(), {request.shape.batch, request.shape.query_heads});
  REQUIRE(reference.window_drift(request, layer, most_attended, scratch, out).ok());
  return drift;
}

/// The reference's.
template <class Request, element T>
[[nodiscard]] score_table<double> reference_scores(const Request& request, const layer_view<T>& layer) {
  std::vector<std::byte> memory(4096);
  workspace space(memory.data(), memory.size());
  const reference_backend reference;
  reference_backend::scratch<Request> scratch(reference, request, space);
  score_table<double> out({request.shape.batch, request.heads(), request.shape.tokens});
  REQUIRE(reference.token_scores(request, layer, scratch, out.view).ok());
  return out;
}

/// Float's part of a row's largest score.
inline constexpr double resolution = 2e-5;

/// Every row within the resolution of the reference's, NaN where that has NaN; returns how many scores were compared.
template <class Request, element T>
index_t compare_rows(const Request& request, const layer_view<T>& layer, const score_table<float>& got,
                     const score_table<double>& exact) {
  index_t compared = 0;
  for (index_t b = 0; b < request.shape.batch; ++b) {
    for (index_t row = 0; row < request.heads(); ++row) {
      const index_t kv_head = row * request.shape.kv_heads / request.heads();
      const index_t past = request.past_of(sequence(layer, b, kv_head).length);
      double largest = 0;
      for (index_t n = 0; n < past; ++n) {
        const double score = exact.view(b, row, n);
        largest = std::max(largest, std::isnan(score) ? 0.0 : std::fabs(score));
      }
      double error = 0;
      for (index_t n = 0; n < request.shape.tokens; ++n) {
        const double score = n < past ? exact.view(b, row, n) : std::numeric_limits<double>::quiet_NaN();
        const auto mine = static_cast<double>(got.view(b, row, n));
        if (std::isnan(score) && std::isnan(mine)) continue;
        const double difference = std::fabs(score - mine);
        error = difference <= error ? error : difference;
        ++compared;
      }
      CAPTURE(b, row, past, largest, error);
      CHECK(error <= resolution * largest);
    }
  }
  return compared;
}

/// The same bits, NaN included.
[[nodiscard]] inline bool same_bits(const score_table<float>& a, const score_table<float>& b) {
  return std::memcmp(a.memory.data(), b.memory.data(), a.memory.size() * sizeof(float)) == 0;
}

/// A temporal smoother in turn.
[[nodiscard]] inline any_temporal temporal_of(index_t turn) {
  switch (turn % 6) {
    case 1:
      return {ema{0.3f}};
    case 2:
      return {last{}};
    case 3:
      return {sum{}};
    case 4:
      return {maximum{}};
    case 5:
      return {root_sum_square{}};
    default:
      return {mean{}};
  }
}

/// A layer's sizes and a window, all pairs in time.
struct score_case {
  layer_recipe recipe;
  index_t window = 0;

  score_case(random_engine& random, index_t turn) {
    constexpr index_t head_dims[] = {1, 8, 16, 24, 64, 33, 80, 96};
    constexpr index_t windows[] = {1, 2, 7, 16, 32, 33, 40};
    constexpr index_t lengths[] = {1, 63, 64, 65, 130, 300, 40, 128, 200};
    window = windows[turn % 7];
    recipe.head_dim = head_dims[turn % 8];
    recipe.tokens = lengths[turn % 9];
    recipe.group = turn % 3 == 0 ? 4 : turn % 3 == 1 ? 1 : 2;
    recipe.kv_heads = turn % 2 + 1;
    recipe.query_rows = std::max(window, std::min(window + turn % 3, recipe.tokens));
    recipe.batch = turn % 5 == 4 ? 3 : 1;
    recipe.hidden = turn % 4 == 3 ? 0 : recipe.head_dim + 5;
    recipe.sharpness = 0.5 + static_cast<double>(turn % 4);
    recipe.strided = turn % 3 == 1;
    recipe.chunks = 1 + turn % 4;
    recipe.padded = turn % 5 == 4;
    recipe.pad = turn % 2 == 0 ? padding::left : padding::right;
    // The reference takes its time in double.
    if (recipe.tokens * recipe.head_dim > 10000) recipe.kv_heads = recipe.batch = 1;
    static_cast<void>(random);
  }
};

inline constexpr group_reduce reductions[] = {group_reduce::none, group_reduce::mean, group_reduce::max,
                                              group_reduce::sum, group_reduce::l2};

/// Walks random layers with one score; `temporal_of_turn` gives the smoother.
template <element T, class Score, class TemporalOf>
void check_scores(const Score& score, const TemporalOf& temporal_of_turn, index_t first, index_t cases) {
  index_t compared = 0;
  for (index_t turn = first; turn < first + cases; ++turn) {
    random_engine random(static_cast<unsigned>(turn + 1));
    score_case shape(random, turn);
    if constexpr (has(features_of<Score>(), feature::projected_norm_l1)) {
      shape.recipe.hidden = std::max<index_t>(shape.recipe.hidden, 3);
    }
    const random_layer<T> layer(random, shape.recipe);
    using request_t = score_request<Score, decltype(temporal_of_turn(turn))>;
    request_t request{score, temporal_of_turn(turn), shape.window, reductions[turn % 5], shape_of(layer.view(), 1, 4)};
    if constexpr (!needs_window<Score>()) request.window = 0;
    if constexpr (scores_window<Score>()) request.window = std::min(request.window, layer.view().query.extent(2));
    if constexpr (requires { request.score.order; }) {
      request.score.order =
          turn / 2 % 2 == 1 && is_average(request.temporal) ? query_order::after : query_order::before;
    }
    if constexpr (requires { request.score.metric_of_distance; }) {
      request.score.metric_of_distance =
          shape.recipe.hidden > 0 ? restkv::metric::projection : restkv::metric::identity;
    }
    CAPTURE(turn, shape.window, shape.recipe.head_dim, shape.recipe.tokens, shape.recipe.group, shape.recipe.batch,
            shape.recipe.hidden, shape.recipe.strided, shape.recipe.chunks);
    const auto exact = reference_scores(request, layer.view());
    const auto got = kernel_scores(request, layer.view(), {.seed = 1, .split_tokens = 64 * (1 + turn % 2)});
    compared += compare_rows(request, layer.view(), got, exact);
    CHECK(same_bits(got, kernel_scores(request, layer.view(), {.seed = 77, .split_tokens = 64 * (1 + turn % 2)})));
  }
  CHECK(compared > 0);
}

/// One token that holds nearly all of the attention: its score, and those of others, to 1e-4 of themselves.
template <element T>
void check_sinks() {
  for (const double lead : {5.0, 20.0, 60.0, 100.0, 400.0}) {
    for (const auto order : {query_order::before, query_order::after}) {
      arranged_layer<T> layer(
          {.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 150, .queries = 6, .hidden = 24}, 6);
      const output_metric metric = attach_metric(layer);
      const index_t sink = 70;
      for (index_t h = 0; h < 4; ++h) {
        for (index_t i = 0; i < 6; ++i) layer.query(0, h, i, 0) = narrow<T>(3.0f);
      }
      for (index_t h = 0; h < 2; ++h) layer.key(0, h, sink, 0) = narrow<T>(lead * std::sqrt(8.0) / 3.0);
      const auto request = score_request<rest_kv, any_temporal>{
          {.order = order}, {mean{}}, 5, group_reduce::none, shape_of(layer.view())};
      const auto exact = reference_scores(request, layer.view());
      const auto got = kernel_scores(request, layer.view(), {});
      CAPTURE(lead, int(order));
      for (index_t h = 0; h < 4; ++h) {
        for (index_t n = 0; n < 145; n += n == sink - 1 || n == sink ? 1 : 23) {
          CAPTURE(h, n);
          CHECK(static_cast<double>(got.view(0, h, n)) == Approx(exact.view(0, h, n)).epsilon(1e-4).margin(1e-37));
        }
      }
    }
  }
}

}  // namespace restkv_test
