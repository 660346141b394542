// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/decoding.md, compiled and run.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/reference/backend.hpp>
#include <restkv/score/observed_attention.hpp>
#include <restkv/session/session_archive.hpp>

#include <cmath>
#include <vector>

using restkv::index_t;
using restkv::tensor_view;

//! [custom_score]
/// What a query pays to a token, more where its value is large; tokens of the window count by the queries behind them.
struct attention_times_norm {
  static constexpr restkv::feature needs = restkv::feature::attention | restkv::feature::value_norm;

  template <std::floating_point Real>
  Real operator()(const restkv::token_features<Real>& token) const noexcept {
    return token.attention * token.value_norm;
  }
};
//! [custom_score]

namespace {

constexpr index_t query_heads = 4, kv_heads = 2, head_dim = 8, layers = 2;
using vectors = tensor_view<const float, 3>;

/// What a model computes for one layer, [heads, tokens, head_dim] each.
struct projected {
  std::vector<float> memory;
  vectors query, key, value;

  projected(restkv_test::random_engine& random, index_t n)
      : memory(static_cast<std::size_t>((query_heads + 2 * kv_heads) * n * head_dim)) {
    for (float& x : memory) x = static_cast<float>(restkv_test::normal(random));
    const float* const begin = memory.data();
    query = {begin, {query_heads, n, head_dim}};
    key = {begin + query_heads * n * head_dim, {kv_heads, n, head_dim}};
    value = {begin + (query_heads + kv_heads) * n * head_dim, {kv_heads, n, head_dim}};
  }
};

/// An engine's attention kernel: the shares of the last of the queries, [query_heads][slots].
std::vector<std::vector<double>> attend(const restkv::layer_view<float>& cache, const vectors& query) {
  std::vector<std::vector<double>> shares(query_heads);
  for (index_t h = 0; h < query_heads; ++h) {
    double sum = 0;
    for (index_t n = 0; n < cache.head_lengths(0, h / 2); ++n) {
      double dot = 0;
      for (index_t c = 0; c < head_dim; ++c) {
        dot += double{query(h, query.extent(1) - 1, c)} * double{cache.key.chunk(0)(0, h / 2, n, c)};
      }
      shares[static_cast<std::size_t>(h)].push_back(std::exp(dot / std::sqrt(8.0)));
      sum += shares[static_cast<std::size_t>(h)].back();
    }
    for (double& share : shares[static_cast<std::size_t>(h)]) share /= sum;
  }
  return shares;
}

}  // namespace

TEST_CASE("a sequence that runs", "[docs]") {
  restkv_test::random_engine random(1);
  std::vector<projected> prompt;
  for (index_t l = 0; l < layers; ++l) prompt.emplace_back(random, 100);

  //! [policy]
  // H2O: the attention that all queries so far paid to a token.
  const auto policy = restkv::session_policy{
      .policy = restkv::eviction_policy{.score = restkv::observed_attention{},
                                        .spatial = restkv::no_pool{},
                                        .group = restkv::group_reduce::mean,
                                        .budget = restkv::ada_kv{.budget = 48},
                                        .protect = {.sink = 4, .recent = 16}},
      .running = restkv::running_sum{},
      .high_water = 64,     // tokens per KV head, the mean over the heads of a layer
      .speculation = 4};    // tokens that can be taken back
  //! [policy]

  //! [open]
  restkv::reference_backend backend;
  const restkv::problem_shape shape{.query_heads = query_heads, .kv_heads = kv_heads, .head_dim = head_dim,
                                    .layers = layers};
  const auto plan = restkv::make_session_plan<float>(backend, policy, shape);
  std::vector<std::byte> memory(plan.memory_bytes);  // all that the sequence ever takes
  auto session = restkv::open_session<float>(backend, plan, memory);
  //! [open]

  //! [prefill]
  // In pieces that fit, so that each piece attends to what is kept. A longer piece is taken too, and evicted within.
  for (index_t l = 0; l < layers; ++l) {
    const projected& tokens = prompt[static_cast<std::size_t>(l)];
    for (index_t begin = 0; begin < 100;) {
      restkv::throw_if_failed(session.evict_if_due(l));
      const index_t n = std::min<index_t>(session.room(l), 100 - begin);
      restkv::throw_if_failed(session.append(l, tokens.query.slice(1, begin, n), tokens.key.slice(1, begin, n),
                                             tokens.value.slice(1, begin, n)));
      attend(session.cache(l), tokens.query.slice(1, begin, n));
      begin += n;
    }
  }
  //! [prefill]
  CHECK(session.tokens_seen(0) == 100);
  CHECK(session.evictions(0) > 0);

  std::vector<double> paid;
  for (int step = 0; step < 40; ++step) {
    std::vector<projected> token;
    for (index_t l = 0; l < layers; ++l) token.emplace_back(random, 1);
    //! [decode]
    for (index_t l = 0; l < layers; ++l) {
      const auto& [memory_of_token, query, key, value] = token[static_cast<std::size_t>(l)];
      restkv::throw_if_failed(session.append(l, query, key, value));   // evicts first where that is due
      const restkv::layer_view<float> cache = session.cache(l);        // keys, values, head_lengths
      const auto shares = attend(cache, query);
      for (index_t h = 0; h < kv_heads; ++h) {
        const auto positions = session.positions(l, h);                // in the sequence, of each slot
        paid.push_back(shares[static_cast<std::size_t>(2 * h)].back());
        CHECK(positions.back() == session.tokens_seen(l) - 1);
      }
    }
    //! [decode]
    REQUIRE(session.length(0, 0) + session.length(0, 1) <= 2 * 64);
  }
  CHECK(paid.size() == 40 * 4);

  const auto before = session.tokens_seen(0);
  std::vector<projected> draft;
  for (index_t l = 0; l < layers; ++l) draft.emplace_back(random, 4);
  //! [speculation]
  restkv::throw_if_failed(session.begin_speculation());
  for (index_t l = 0; l < layers; ++l) {
    const projected& tokens = draft[static_cast<std::size_t>(l)];
    restkv::throw_if_failed(session.append(l, tokens.query, tokens.key, tokens.value));
  }
  // ... the model accepts 3 of the 4 drafted tokens
  restkv::throw_if_failed(session.commit(3));  // or session.rollback()
  //! [speculation]
  CHECK(session.tokens_seen(0) == before + 3);

  //! [fork]
  std::vector<std::byte> other_memory(plan.memory_bytes);
  auto other = restkv::open_session<float>(backend, plan, other_memory);
  restkv::throw_if_failed(session.fork_to(other));  // a branch of a beam
  //! [fork]
  CHECK(other.tokens_seen(1) == before + 3);

  //! [archive]
  std::vector<std::byte> bytes(restkv::serialised_bytes(session));
  std::size_t written = 0;
  restkv::throw_if_failed(restkv::serialise(session, bytes, written));
  restkv::throw_if_failed(restkv::restore(other, bytes));  // bit for bit
  //! [archive]
  CHECK(written == bytes.size());
}

TEST_CASE("attention rows of the engine", "[docs]") {
  restkv_test::random_engine random(2);
  const projected tokens(random, 30);
  restkv::reference_backend backend;
  const restkv::problem_shape shape{.query_heads = query_heads, .kv_heads = kv_heads, .head_dim = head_dim};
  //! [rows]
  // TOVA: what the last query paid, the mean of all heads, the same tokens for all.
  const auto policy = restkv::session_policy{
      .policy = restkv::eviction_policy{.score = restkv::observed_attention{},
                                        .spatial = restkv::no_pool{},
                                        .group = restkv::group_reduce::mean,
                                        .budget = restkv::uniform{16},
                                        .protect = {.sink = 0, .recent = 0},
                                        .granularity = {.shared = true}},
      .running = restkv::running_last{},
      .high_water = 17,
      .attention_rows = true};
  const auto plan = restkv::make_session_plan<float>(backend, policy, shape);
  std::vector<std::byte> memory(plan.memory_bytes);
  auto session = restkv::open_session<float>(backend, plan, memory);
  for (index_t t = 0; t < 30; ++t) {
    restkv::throw_if_failed(session.evict_if_due(0));
    const index_t slots = session.length(0, 0) + 1;  // and the token itself
    const std::vector<float> shares(static_cast<std::size_t>(query_heads * slots), 1.0f / static_cast<float>(slots));
    const tensor_view<const float, 3> attention(shares.data(), {query_heads, 1, slots});
    restkv::throw_if_failed(
        session.append_attention(0, attention, tokens.key.slice(1, t, 1), tokens.value.slice(1, t, 1)));
  }
  //! [rows]
  CHECK(session.length(0, 0) == 17);
  CHECK(session.positions(0, 0)[15] == 15);  // ties go to the smaller position; the newest may go
}

TEST_CASE("a score of the user's", "[docs]") {
  restkv_test::random_engine random(3);
  const projected tokens(random, 90);
  restkv::reference_backend backend;
  const restkv::problem_shape shape{.query_heads = query_heads, .kv_heads = kv_heads, .head_dim = head_dim};
  //! [custom]
  const auto policy = restkv::session_policy{
      .policy = restkv::eviction_policy{.score = attention_times_norm{}, .budget = restkv::ada_kv{.budget = 40}},
      .running = restkv::running_ema{.decay = 0.8f},
      .high_water = 60,
      .refresh = 4};  // asked every 4 tokens
  const auto plan = restkv::make_session_plan<float>(backend, policy, shape);
  std::vector<std::byte> memory(plan.memory_bytes);
  auto session = restkv::open_session<float>(backend, plan, memory);
  restkv::throw_if_failed(session.append(0, tokens.query, tokens.key, tokens.value));
  //! [custom]
  CHECK(session.evictions(0) == 2);
  CHECK(session.tokens_seen(0) == 90);
}
