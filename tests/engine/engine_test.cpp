// SPDX-License-Identifier: Apache-2.0
// The loop of examples/engine under random arrivals, cancellations and too small a pool, against a ledger of its own.
#include "engine/ledger.hpp"
#include "support/random.hpp"

#include <engine/request.hpp>

#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>

#include <memory>

using namespace restkv_test;
using engine::index_t;

namespace {

constexpr index_t layers = 2, kv_heads = 2, group = 2, head_dim = 8, tokens = 90, answer_tokens = 24;

/// Two layers of random numbers, with a query for every token.
struct random_model {
  engine::model view;
  std::vector<std::vector<float>> memory;

  explicit random_model(unsigned seed) {
    random_engine random(seed);
    const auto tensor = [&](index_t heads, double scale) {
      std::vector<float>& numbers = memory.emplace_back();
      for (index_t i = 0; i < heads * tokens * head_dim; ++i) {
        numbers.push_back(static_cast<float>(scale * normal(random)));
      }
      return engine::tensor_view<const float, 3>(numbers.data(), {heads, tokens, head_dim});
    };
    for (index_t l = 0; l < layers; ++l) {
      engine::model_layer layer;
      layer.query = tensor(kv_heads * group, 2.0);
      layer.key = tensor(kv_heads, 1.0);
      layer.value = tensor(kv_heads, 1.0);
      view.layers.push_back(layer);
    }
  }
};

struct setting {
  const char* name;
  bool table_per_head;
  index_t page_size;
  index_t pages;  ///< of all heads; a table for each takes kv_heads times as many
  index_t system_tokens;
  index_t tokens_per_head;  ///< 0: no eviction
};

constexpr index_t window = 4;

/// A policy of the presets, fitted to the small sequences here.
template <class Policy>
std::unique_ptr<engine::selector> fit(restkv::reference_backend& backend, Policy policy, index_t sink) {
  policy.window = window;
  policy.protect = {.sink = sink, .recent = window};
  return std::make_unique<engine::policy_selector<restkv::reference_backend, Policy>>(
      backend, policy,
      restkv::problem_shape{.query_heads = kv_heads * group,
                            .kv_heads = kv_heads,
                            .head_dim = head_dim,
                            .tokens = tokens,
                            .layers = layers});
}

/// Runs a stream through the engine; what it met is added to `seen`.
void run(const setting& how, engine::selector* policy, index_t requests, unsigned seed,
         std::map<std::string, long>& seen) {
  const random_model recorded(seed);
  const engine::request_stream stream{.requests = requests,
                                      .system_tokens = how.system_tokens,
                                      .context_least = 0,
                                      .context_most = 40,
                                      .question_least = 1,
                                      .question_most = 6,
                                      .answer_least = 1,
                                      .answer_most = answer_tokens,
                                      .prompt_tokens = tokens - answer_tokens,
                                      .arrivals_per_step = 0.5,
                                      .cancelled = 0.4,
                                      .seed = seed};
  engine::paged_cache cache({.sequences = 7,
                             .layers = layers,
                             .kv_heads = kv_heads,
                             .head_dim = head_dim,
                             .heads_per_page = how.table_per_head ? 1 : kv_heads,
                             .page_size = how.page_size,
                             .pages = how.pages * (how.table_per_head ? kv_heads : 1),
                             .most_tokens = tokens});
  std::vector<engine::token> system(static_cast<std::size_t>(how.system_tokens));
  std::iota(system.begin(), system.end(), 0);
  ledger account(cache, recorded.view, system);
  engine::scheduler loop(cache, recorded.view, {.policy = policy, .tokens_per_head = how.tokens_per_head, .slack = 5},
                         system, engine::make_requests(stream, recorded.view), account);
  INFO(how.name << ", seed " << seed);
  while (loop.step()) {
  }
  account.check_end();
  const engine::counters& count = loop.count();
  CHECK(static_cast<index_t>(account.done.size()) == requests);
  CHECK(count.finished + count.cancelled + count.refused == requests);
  for (const auto& [what, times] : account.seen) seen[what] += times;
  seen["finished"] += count.finished;
  seen["refused"] += count.refused;
  seen["postponed"] += count.postponed;
}

void run_all(index_t requests_of_each) {
  restkv::reference_backend backend;
  std::map<std::string, long> seen;
  // Whole pages, the same of all heads, the system prompt's among them: its pages stay shared.
  auto pages = restkv::presets::snap_kv(24);
  pages.granularity = {.tokens = 4, .shared = true};
  const auto by_page = fit(backend, pages, 12);
  run({"whole pages", false, 4, 60, 12, 24}, by_page.get(), requests_of_each, 1, seen);
  // Any tokens: pages of the system prompt are left, and what is kept of them is copied.
  const auto by_token = fit(backend, restkv::presets::random(20, 3), 0);
  run({"tokens", false, 3, 80, 10, 20}, by_token.get(), requests_of_each, 2, seen);
  // Heads compete for tokens, and have tables of their own; the system prompt ends within a page.
  const auto by_head = fit(backend, restkv::presets::ada_kv(22), 9);
  run({"a table for each head", true, 5, 45, 9, 22}, by_head.get(), requests_of_each, 3, seen);
  // No eviction, and too small a pool.
  run({"everything", false, 4, 34, 7, 0}, nullptr, requests_of_each, 4, seen);
  for (const char* what : {"finished", "cancelled while waiting", "cancelled in the batch", "preempted", "refused",
                           "postponed", "evicted", "evicted behind a prefix", "attended", "shared"}) {
    INFO(what << ": " << seen[what]);
    CHECK(seen[what] > 0);
  }
}

}  // namespace

TEST_CASE("requests come and go without a page lost, and attend to what was kept") { run_all(75); }

// Takes minutes with a sanitizer; `engine_test "[long]"` runs it.
TEST_CASE("ten thousand requests come and go", "[.][long]") { run_all(2500); }
