// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/distributed.md, compiled and run with threads as ranks.
#include "distributed/rank_support.hpp"

#include <restkv/distributed/heads.hpp>
#include <restkv/distributed/tokens.hpp>
#include <restkv/reference/backend.hpp>

using namespace restkv_test;

namespace {

using policy_t = restkv::eviction_policy<restkv::snap_kv>;  // AdaKV: the heads of a layer compete

constexpr restkv::problem_shape shape{.query_heads = 8, .kv_heads = 4, .head_dim = 8, .tokens = 60};

/// What an engine's rank does with its part of a layer's heads.
template <restkv::distributed::communicator Ranks>
status evict_heads(Ranks& ranks, const policy_t& policy, const layer_view<float>& whole, rank_outcome& outcome) {
  restkv::reference_backend backend;
  const index_t own = shape.kv_heads / ranks.size();
  const part_of_heads<float> part(whole, ranks.rank() * own, own);
  const layer_view<float>& layer = part.view;
  std::vector<std::byte> memory;
  kept_tokens kept;
  //! [heads]
  // When the model is loaded: this rank has `own` of the layer's KV heads, and the query heads that go with them.
  restkv::problem_shape local = shape;
  local.kv_heads = own;
  local.query_heads = own * shape.group();
  restkv::distributed::heads_plan<policy_t> plan;
  RESTKV_RETURN_IF_FAILED(restkv::distributed::make_heads_plan(
      backend, policy, local, {.first = ranks.rank() * own, .whole = shape.kv_heads}, ranks.size(), plan));
  memory.resize(plan.workspace_bytes);

  // After the prefill of a layer, on every rank:
  RESTKV_RETURN_IF_FAILED(restkv::distributed::select_heads(backend, plan, layer, ranks,
                                                            restkv::workspace(memory.data(), memory.size()), kept));
  //! [heads]
  outcome.take(kept);
  return {};
}

/// What it does with its part of the prompt.
template <restkv::distributed::communicator Ranks>
status evict_tokens(Ranks& ranks, const policy_t& policy, const layer_view<float>& whole, rank_outcome& outcome) {
  layer_view<float> layer = whole;
  //! [tokens]
  // This rank has the tokens [tokens.first, tokens.first + count) of the prompt: whole blocks of 16, as evenly as they
  // go.
  index_t count = 0;
  const auto tokens = restkv::distributed::even_part(shape.tokens, ranks.rank(), ranks.size(), count, 16);
  layer.key = whole.key.chunk(0).slice(2, tokens.first, count);
  layer.value = whole.value.chunk(0).slice(2, tokens.first, count);  // layer.query: the prompt's last queries

  restkv::distributed::token_selection chosen;
  RESTKV_RETURN_IF_FAILED(chosen.run(policy, layer, tokens, ranks));
  // chosen.kept() has positions of this rank's own keys and values: compact(chosen.kept(), ...)
  //! [tokens]
  outcome.take(chosen.kept());
  for (auto& row : outcome.kept) {
    for (position_t& n : row) n += static_cast<position_t>(tokens.first);
  }
  return {};
}

//! [communicator]
/// A transport of your own: here one that only passes on to another.
template <class Transport>
struct my_communicator {
  Transport& transport;

  restkv::index_t rank() const { return transport.rank(); }
  restkv::index_t size() const { return transport.size(); }
  template <restkv::distributed::reducible T>
  restkv::status all_reduce(std::span<T> data, restkv::distributed::reduction how) {
    return transport.all_reduce(data, how);
  }
  restkv::status all_gather(std::span<const std::byte> own, std::span<std::byte> all) {
    return transport.all_gather(own, all);
  }
  restkv::status broadcast(std::span<std::byte> data, restkv::index_t root) { return transport.broadcast(data, root); }
};
//! [communicator]

}  // namespace

TEST_CASE("docs/distributed.md") {
  random_engine random(1);
  const random_layer<float> layer(random, {.kv_heads = 4, .group = 2, .tokens = shape.tokens, .query_rows = 32});
  policy_t policy;
  policy.budget.budget = 40;
  const rank_outcome alone = select_alone<restkv::reference_backend>(policy, layer.view(), shape);
  REQUIRE(alone.result.ok());
  std::vector<rank_outcome> heads(2);
  std::vector<rank_outcome> tokens(2);
  on_ranks(2, [&](auto& thread) {
    my_communicator<distributed::thread_communicator> ranks{thread};
    const auto r = static_cast<std::size_t>(ranks.rank());
    heads[r].result = evict_heads(ranks, policy, layer.view(), heads[r]);
    tokens[r].result = evict_tokens(ranks, policy, layer.view(), tokens[r]);
  });
  for (std::size_t h = 0; h < 4; ++h) {
    CHECK(heads[h / 2].kept.at(h % 2) == alone.kept[h]);
    std::vector<position_t> together = tokens[0].kept.at(h);
    together.insert(together.end(), tokens[1].kept.at(h).begin(), tokens[1].kept.at(h).end());
    CHECK(together == alone.kept[h]);
  }
}
