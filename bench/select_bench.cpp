// SPDX-License-Identifier: Apache-2.0
// The cost of choosing: score, smoothing, budget and selection of one layer, beside a floor that no exact method can
// pass: the window's Q K^T as a plain Eigen product of the same shape, and one read of K and V.
//
//   bench/select_bench --benchmark_filter='concentrated/.*/tokens:16384' --benchmark_repetitions=5
//
// Rows of one run compare; absolute times depend on the machine. "workspace" is all the memory that a selection uses
// besides its input, in bytes.
#include "attention_problem.hpp"

#include <restkv/presets.hpp>
#include <restkv/backend/eigen/backend.hpp>
#include <restkv/select.hpp>

#include <Eigen/Core>
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>

namespace {

using restkv::index_t;
using restkv_bench::attention_problem;
using restkv_bench::spread;

constexpr index_t budget = 1024;

/// The problem of the row before is kept: rows of one length follow each other.
const attention_problem& problem_of(index_t tokens, spread how) {
  static std::unique_ptr<attention_problem> made;
  static std::pair<index_t, spread> made_for{-1, spread::gaussian};
  if (made_for != std::pair{tokens, how}) {
    made.reset();
    made = std::make_unique<attention_problem>(tokens, how);
    made_for = {tokens, how};
  }
  return *made;
}

/// Sums a part of a tensor, at the speed of memory.
float read_all(const float* data, index_t count) {
  return Eigen::Map<const Eigen::ArrayXf>(data, count).sum();
}

void floor_row(benchmark::State& state, spread how) {
  const index_t tokens = state.range(0);
  const auto threads = static_cast<int>(state.range(1));
  const auto& layer = problem_of(tokens, how).view;
  restkv::eigen_backend backend(threads);
  constexpr index_t group = attention_problem::query_heads / attention_problem::kv_heads;
  constexpr index_t lanes = group * attention_problem::window;
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  std::vector<matrix> logits(attention_problem::kv_heads);
  for (matrix& m : logits) m.resize(tokens, lanes);
  std::vector<float> sums(attention_problem::kv_heads);
  const auto pass = [&] {
    backend.parallel_for(attention_problem::kv_heads, [&](index_t h) {
      const auto at = static_cast<std::size_t>(h);
      const float* const key = layer.key.chunk(0)[0][h].data;
      const float* const value = layer.value.chunk(0)[0][h].data;
      const Eigen::Map<const matrix> keys(key, tokens, attention_problem::head_dim);
      const Eigen::Map<const matrix> queries(layer.query[0][h * group].data, lanes, attention_problem::head_dim);
      logits[at].noalias() = keys * queries.transpose();
      sums[at] = read_all(key, tokens * attention_problem::head_dim) +
                 read_all(value, tokens * attention_problem::head_dim);
    });
  };
  pass();  // touches the pages of the result
  for (auto _ : state) {
    pass();
    benchmark::DoNotOptimize(logits.data());
    benchmark::DoNotOptimize(sums.data());
  }
}

template <class Policy>
void select_row(benchmark::State& state, spread how, const Policy& policy, restkv::eigen_tuning tuning) {
  const auto threads = static_cast<int>(state.range(1));
  const auto& layer = problem_of(state.range(0), how).view;
  restkv::eigen_backend backend(threads, tuning);
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer));
  std::vector<std::byte> memory(plan.workspace_bytes);
  const auto pass = [&] {
    return restkv::select(backend, plan, layer, restkv::workspace(memory.data(), memory.size()));
  };
  benchmark::DoNotOptimize(pass());
  for (auto _ : state) {
    const auto kept = pass();
    benchmark::DoNotOptimize(kept.positions.data);
  }
  state.counters["workspace"] = static_cast<double>(plan.workspace_bytes);
}

void arguments(benchmark::internal::Benchmark* row, index_t tokens) {
  row->ArgNames({"tokens", "threads"})->Unit(benchmark::kMillisecond)->UseRealTime();
  for (const index_t threads : {1, 2}) row->Args({tokens, threads});
}

void register_rows(const std::string& name, spread how, index_t tokens) {
  auto after = restkv::presets::standard(budget);
  after.score.order = restkv::query_order::after;
  const auto before = restkv::presets::standard(budget);
  const auto released = restkv::presets::rest_kv_released(budget);
  const auto snap_kv = restkv::presets::snap_kv(budget);
  const auto add = [&](const std::string& row, auto body) {
    arguments(benchmark::RegisterBenchmark((name + "/" + row).c_str(), body), tokens);
  };
  add("floor", [=](benchmark::State& s) { floor_row(s, how); });
  add("snap_kv", [=](benchmark::State& s) { select_row(s, how, snap_kv, {}); });
  add("rest_kv_after", [=](benchmark::State& s) { select_row(s, how, after, {}); });
  add("rest_kv_after_unpruned", [=](benchmark::State& s) { select_row(s, how, after, {.pruning = false}); });
  add("rest_kv_before", [=](benchmark::State& s) { select_row(s, how, before, {}); });
  add("rest_kv_before_unpruned", [=](benchmark::State& s) { select_row(s, how, before, {.pruning = false}); });
  add("rest_kv_released", [=](benchmark::State& s) { select_row(s, how, released, {}); });
}

}  // namespace

int main(int argc, char** argv) {
  for (const auto& [name, how] : {std::pair{"concentrated", spread::concentrated}, std::pair{"gaussian", spread::gaussian}}) {
    for (index_t tokens = 1024; tokens <= 131072; tokens *= 2) register_rows(name, how, tokens);
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
