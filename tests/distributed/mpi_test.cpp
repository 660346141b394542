// SPDX-License-Identifier: Apache-2.0
// Selections over the processes of MPI, started by mpirun with 1 to 4 of them: each process checks its own part against
// one process. `mpi_test dies` lets a rank leave without a word: the others must say so within the stated time, and
// exit with 0.
#include "distributed/rank_support.hpp"

#include <restkv/distributed/heads.hpp>
#include <restkv/distributed/mpi.hpp>
#include <restkv/distributed/tokens.hpp>

#include <cstdio>
#include <cstring>

using namespace restkv_test;

namespace {

using ranks_t = failing_communicator<distributed::mpi_communicator>;

int failures = 0;

void check(bool holds, const char* what, const char* message = "") {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s %s\n", what, message);
}

using policy_t = restkv::eviction_policy<restkv::rest_kv, restkv::mean, restkv::adaptive_window>;

void check_heads(const policy_t& policy, const layer_view<float>& layer, ranks_t& ranks) {
  const restkv::problem_shape shape = restkv::shape_of(layer);
  const rank_outcome alone = select_alone<restkv::reference_backend>(policy, layer, shape);
  check(alone.result.ok(), "one process", alone.result.message());
  index_t count = 0;
  const auto heads = distributed::even_part(shape.kv_heads, ranks.rank(), ranks.size(), count);
  const part_of_heads<float> part(layer, heads.first, count);
  restkv::problem_shape local = shape;
  local.kv_heads = count;
  local.query_heads = count * shape.group();
  restkv::reference_backend backend;
  distributed::heads_plan<policy_t> plan;
  check(make_heads_plan(backend, policy, local, heads, ranks.size(), plan).ok(), "the plan");
  std::vector<std::byte> memory(plan.workspace_bytes);
  kept_tokens kept;
  const restkv::status outcome =
      select_heads(backend, plan, part.view, ranks, restkv::workspace(memory.data(), memory.size()), kept);
  check(outcome.ok(), "select_heads", outcome.message());
  rank_outcome mine;
  if (outcome.ok()) mine.take(kept);
  for (index_t b = 0; outcome.ok() && b < shape.batch; ++b) {
    for (index_t h = 0; h < count; ++h) {
      check(mine.kept[static_cast<std::size_t>(b * count + h)] ==
                alone.kept[static_cast<std::size_t>(b * shape.kv_heads + heads.first + h)],
            "heads: the kept set of one process");
    }
  }
}

void check_tokens(const policy_t& policy, const layer_view<float>& layer, ranks_t& ranks) {
  const restkv::problem_shape shape = restkv::shape_of(layer);
  const rank_outcome alone = select_alone<restkv::reference_backend>(policy, layer, shape);
  check(alone.result.ok(), "one process", alone.result.message());
  index_t count = 0;
  const auto tokens = distributed::even_part(shape.tokens, ranks.rank(), ranks.size(), count, 8);
  layer_view<float> part = layer;
  part.key = layer.key.chunk(0).slice(2, tokens.first, count);
  part.value = layer.value.chunk(0).slice(2, tokens.first, count);
  distributed::token_selection chosen;
  const restkv::status outcome = chosen.run(policy, part, tokens, ranks);
  check(outcome.ok(), "tokens", outcome.message());
  rank_outcome mine;
  if (outcome.ok()) mine.take(chosen.kept());
  for (std::size_t row = 0; row < mine.kept.size(); ++row) {
    std::vector<position_t> expected;
    for (const position_t n : alone.kept[row]) {
      if (n >= tokens.first && n < tokens.first + count) expected.push_back(static_cast<position_t>(n - tokens.first));
    }
    check(mine.kept[row] == expected, "tokens: the kept set of one process");
  }
}

/// What the ranks that live see of one that dies in the middle of a selection.
void check_death(const policy_t& policy, const layer_view<float>& layer, ranks_t& ranks) {
  const auto begin = std::chrono::steady_clock::now();
  index_t count = 0;
  const auto tokens = distributed::even_part(layer.key.extent(2), ranks.rank(), ranks.size(), count);
  layer_view<float> part = layer;
  part.key = layer.key.chunk(0).slice(2, tokens.first, count);
  part.value = layer.value.chunk(0).slice(2, tokens.first, count);
  distributed::token_selection chosen;
  const restkv::status outcome = chosen.run(policy, part, tokens, ranks);
  if (ranks.failed()) std::_Exit(0);
  check(outcome.code() == restkv::errc::communication_failure, "a dead rank is an error", outcome.message());
  check(std::chrono::steady_clock::now() - begin < std::chrono::seconds(10), "within the stated time");
  check(!ranks.broadcast({}, 0).ok(), "and so is every later call");
  std::printf("rank %d: %s\n", static_cast<int>(ranks.rank()), outcome.message());
  std::fflush(stdout);
  std::_Exit(failures == 0 ? 0 : 1);  // MPI_Finalize would wait for the dead
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  const bool dies = argc > 1 && std::strcmp(argv[1], "dies") == 0;
  {
    distributed::mpi_communicator processes;
    check(processes.open(MPI_COMM_WORLD, std::chrono::milliseconds(dies ? 500 : 20000)).ok(), "open");
    ranks_t ranks(processes, dies && processes.rank() == 1 ? 5 : 1000000);
    random_engine random(1);
    const random_layer<float> layer(random, {.batch = 2, .kv_heads = 4, .group = 2, .tokens = 90, .query_rows = 16});
    policy_t policy{.window = 16};
    policy.spatial.scale = 5;
    policy.budget.budget = 40;
    policy.protect.recent = 16;
    if (dies) check_death(policy, layer.view(), ranks);
    check_heads(policy, layer.view(), ranks);
    check_tokens(policy, layer.view(), ranks);
    policy.granularity.shared = true;
    check_heads(policy, layer.view(), ranks);
    check_tokens(policy, layer.view(), ranks);
  }
  MPI_Finalize();
  return failures == 0 ? 0 : 1;
}
