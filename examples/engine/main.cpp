// SPDX-License-Identifier: Apache-2.0
// A small engine: requests arrive at random, share a system prompt, are answered in one batch from a paged cache, and
// some are cancelled. The cache is evicted after a prompt and while it grows, by several policies in turn.
//
//   engine examples/data/trace-2k.safetensors [--requests N] [--arrivals PER_STEP] [--tokens-per-head B]
//          [--megabytes POOL] [--page-size P] [--seed S]
//
// What an engine's author may want to read: scheduler.hpp (the loop), paged_cache.hpp (the cache), selector.hpp (a
// policy, planned once). Keys, values and queries come from a recording, so the answers are fixed and only their
// attention changes.
#include "error_meter.hpp"
#include "recorded_model.hpp"
#include "scheduler.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/presets.hpp>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <numeric>
#include <string>
#include <vector>

namespace {

using engine::index_t;

/// Numbers that a user may set.
struct options {
  index_t requests = 60;
  double arrivals = 1;
  index_t tokens_per_head = 320;
  double megabytes = 24;
  index_t page_size = 16;
  unsigned seed = 1;
};

class demonstration {
 public:
  demonstration(const engine::recorded_model& recorded, const options& chosen)
      : model_(recorded.view()), options_(chosen) {
    stream_.requests = chosen.requests;
    stream_.arrivals_per_step = chosen.arrivals;
    stream_.prompt_tokens = recorded.prompt_tokens();
    stream_.seed = chosen.seed;
    longest_ = stream_.system_tokens + stream_.context_most + stream_.question_most + stream_.answer_most;
    std::printf(
        "%lld requests, %.2f a step; %lld layers; a pool of %.0f MB, %lld tokens a page; budgets of %lld tokens\n",
        static_cast<long long>(chosen.requests), chosen.arrivals, static_cast<long long>(model_.layers.size()),
        chosen.megabytes, static_cast<long long>(chosen.page_size), static_cast<long long>(chosen.tokens_per_head));
    std::printf("%-28s %8s %9s %7s %8s %8s %9s %8s %8s %8s\n", "", "finished", "cancelled", "again", "steps",
                "requests", "sequences", "pages saved by:", "", "error");
    std::printf("%-28s %8s %9s %7s %8s %8s %9s %8s %8s %8s\n", "policy", "", "", "", "", "a second", "at a time",
                "sharing", "eviction", "");
  }

  /// Everything is kept.
  void run(const char* name) { report(name, nullptr, model_.kv_heads()); }

  /// heads_per_page: the KV heads that share a table; 1 where they keep different numbers of tokens.
  template <class Policy>
  void run(const char* name, const Policy& policy, index_t heads_per_page) {
    engine::policy_selector<restkv::eigen_backend, Policy> selector(
        backend_, policy,
        {.query_heads = model_.query_heads(),
         .kv_heads = model_.kv_heads(),
         .head_dim = model_.head_dim(),
         .tokens = longest_,
         .layers = static_cast<index_t>(model_.layers.size())});
    report(name, &selector, heads_per_page);
  }

  [[nodiscard]] index_t system_tokens() const noexcept { return stream_.system_tokens; }
  [[nodiscard]] index_t kv_heads() const noexcept { return model_.kv_heads(); }

 private:
  void report(const char* name, engine::selector* selector, index_t heads_per_page) {
    const index_t page_floats = 2 * heads_per_page * options_.page_size * model_.head_dim();
    engine::paged_cache cache({.sequences = 33,
                               .layers = static_cast<index_t>(model_.layers.size()),
                               .kv_heads = model_.kv_heads(),
                               .head_dim = model_.head_dim(),
                               .heads_per_page = heads_per_page,
                               .page_size = options_.page_size,
                               .pages = static_cast<index_t>(options_.megabytes * 1e6 / 4) / page_floats,
                               .most_tokens = longest_});
    std::vector<engine::token> system(static_cast<std::size_t>(stream_.system_tokens));
    std::iota(system.begin(), system.end(), 0);
    engine::error_meter meter(backend_, model_, 8);
    const auto begin = std::chrono::steady_clock::now();
    engine::scheduler loop(cache, model_, {.policy = selector, .tokens_per_head = options_.tokens_per_head}, system,
                           engine::make_requests(stream_, model_), meter);
    while (loop.step()) {
    }
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin - meter.time();
    const engine::counters& count = loop.count();
    std::printf("%-28s %8lld %9lld %7lld %8lld %8.1f %9lld %7.1f%% %7.1f%% %8.4f\n", name,
                static_cast<long long>(count.finished), static_cast<long long>(count.cancelled),
                static_cast<long long>(count.preempted), static_cast<long long>(count.steps),
                static_cast<double>(count.finished) / time.count(), static_cast<long long>(count.most_batch),
                100 * count.shared_steps / count.full_steps, 100 * count.evicted_steps / count.full_steps,
                meter.mean());
  }

  const engine::model& model_;
  const options& options_;
  engine::request_stream stream_;
  index_t longest_ = 0;
  restkv::eigen_backend backend_{1};
};

void run(const std::string& trace, const options& chosen) {
  const engine::recorded_model recorded(trace);
  demonstration show(recorded, chosen);
  const index_t heads = show.kv_heads();
  const index_t budget = chosen.tokens_per_head;
  // A policy that keeps the system prompt keeps its pages shared.
  const auto with_prompt = [&](auto policy) {
    policy.protect.sink = show.system_tokens();
    return policy;
  };
  show.run("everything");
  show.run("StreamingLLM", restkv::presets::streaming_llm(budget), heads);
  show.run("StreamingLLM, system prompt", with_prompt(restkv::presets::streaming_llm(budget)), heads);
  auto snap = with_prompt(restkv::presets::snap_kv(budget));
  snap.granularity = {.tokens = chosen.page_size, .shared = true};
  show.run("SnapKV, whole pages", snap, heads);
  // Heads that share a table keep as many tokens as each other: all of one row of scores, or as many of each head's
  // own.
  auto pages = with_prompt(restkv::presets::lowest_error(budget));
  pages.granularity = {.tokens = chosen.page_size, .shared = true};
  show.run("restkv, whole pages", pages, heads);
  auto tokens = with_prompt(restkv::presets::lowest_error(budget));
  tokens.budget.floor = 1;
  show.run("restkv, tokens", tokens, heads);
  // Heads that have tables of their own compete for the layer's budget.
  show.run("restkv, a table per head", with_prompt(restkv::presets::lowest_error(budget)), 1);
}

bool parse(int count, char** arguments, options& out) {
  if (count < 2 || count % 2 != 0) return false;
  const std::map<std::string, index_t*> integers{
      {"--requests", &out.requests}, {"--tokens-per-head", &out.tokens_per_head}, {"--page-size", &out.page_size}};
  for (int i = 2; i < count; i += 2) {
    const std::string name = arguments[i];
    const char* const text = arguments[i + 1];
    const auto read = [&](auto& number) {
      const char* const end = text + std::strlen(text);
      const auto [stop, failed] = std::from_chars(text, end, number);
      return failed == std::errc() && stop == end && number > 0 && number < 1'000'000;
    };
    const auto integer = integers.find(name);
    const bool good = integer != integers.end() ? read(*integer->second)
                      : name == "--arrivals"    ? read(out.arrivals)
                      : name == "--megabytes"   ? read(out.megabytes)
                      : name == "--seed"        ? read(out.seed)
                                                : false;
    if (!good) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  options chosen;
  if (!parse(count, arguments, chosen)) {
    std::fprintf(stderr,
                 "usage: engine TRACE [--requests N] [--arrivals PER_STEP] [--tokens-per-head B] [--megabytes POOL] "
                 "[--page-size P] [--seed S]\n");
    return 2;
  }
  try {
    run(arguments[1], chosen);
    return 0;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "engine: %s\n", problem.what());
    return 1;
  }
}
