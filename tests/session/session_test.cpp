// SPDX-License-Identifier: Apache-2.0
// What a session keeps, against rules written apart from it.
#include "session/session_support.hpp"

#include <restkv/select.hpp>

#include <numeric>

using namespace restkv_test;

namespace {

constexpr restkv::problem_shape shape{.query_heads = 4, .kv_heads = 2, .head_dim = channels, .layers = 1};

template <class Session>
void append(Session& session, const token_stream& tokens, index_t begin, index_t count) {
  const auto part = [&](const tensor_view<const float, 3>& tensor) { return tensor.slice(1, begin, count); };
  restkv::throw_if_failed(session.append(0, part(tokens.queries()), part(tokens.keys()), part(tokens.values())));
}

template <class Session>
std::vector<std::vector<index_t>> kept_of(const Session& session) {
  std::vector<std::vector<index_t>> kept;
  for (index_t h = 0; h < shape.kv_heads; ++h) {
    const auto positions = session.positions(0, h);
    kept.emplace_back(positions.begin(), positions.end());
  }
  return kept;
}

/// The same tokens in one piece, token by token, and in random chunks: the same bits.
template <class Policy>
void check_pieces(random_engine& random, const Policy& policy, index_t count) {
  reference_backend backend;
  const auto plan = plan_for(policy, shape);
  const token_stream tokens(random, shape.query_heads, shape.kv_heads, count);
  owned_session<Policy> whole(backend, plan);
  append(whole.session, tokens, 0, count);
  CHECK(whole.session.evictions(0) > 1);
  for (const index_t longest_piece : {1, 3, 17}) {
    owned_session<Policy> pieces(backend, plan);
    for (index_t t = 0; t < count;) {
      const index_t n = std::min(count - t, pick(random, 0, longest_piece));
      append(pieces.session, tokens, t, n);
      t += n;
      if (chance(random, 20)) REQUIRE(pieces.session.evict_if_due(0).ok());
    }
    REQUIRE(whole.session.evict_if_due(0).ok());
    REQUIRE(pieces.session.evict_if_due(0).ok());
    CHECK(pieces.bytes() == whole.bytes());
  }
}

}  // namespace

TEST_CASE("StreamingLLM's rule for making space") {
  constexpr index_t start = 4;
  constexpr index_t recent = 12;
  random_engine random(1);
  reference_backend backend;
  auto policy = make_policy<static_policy>(start + recent - 1, 1.0f, {.sink = start, .recent = 0}, start + recent);
  policy.policy.score.what = static_score::kind::newest;
  const auto plan = plan_for(policy, shape);
  owned_session<static_policy> owner(backend, plan);
  const token_stream tokens(random, shape.query_heads, shape.kv_heads, 300);
  std::vector<index_t> cache;
  for (index_t t = 0; t < tokens.tokens;) {
    const index_t n = std::min(tokens.tokens - t, pick(random, 1, recent));
    append(owner.session, tokens, t, n);
    // evict_for_space(n): [0, start) and [L - recent + n, L) stay.
    const auto length = static_cast<index_t>(cache.size());
    if (length + n > start + recent) {
      std::vector<index_t> kept(cache.begin(), cache.begin() + std::min(start, length));
      kept.insert(kept.end(), cache.begin() + std::max(start, length - recent + n), cache.end());
      cache = kept;
    }
    for (index_t i = 0; i < n; ++i) cache.push_back(t + i);
    t += n;
    if (static_cast<index_t>(cache.size()) == start + recent) CHECK(kept_of(owner.session)[1] == cache);
  }
  CHECK(owner.session.length(0, 0) == start + recent);
}

TEST_CASE("running scores of queries, against sums in double") {
  struct kind {
    decltype(restkv::any_running::choice) running;
    std::function<double(double, double, index_t)> fold;
    std::function<double(double, index_t)> score;
  };
  const auto as_it_is = [](double running, index_t) { return running; };
  const std::vector<kind> kinds{
      {restkv::running_sum{}, [](double m, double a, index_t) { return m + a; }, as_it_is},
      {restkv::running_mean{}, [](double m, double a, index_t) { return m + a; },
       [](double m, index_t n) { return m / static_cast<double>(n); }},
      {restkv::running_ema{.decay = 0.8f},
       [](double m, double a, index_t n) {
         const double decay = 0.8f;
         return n == 0 ? a : decay * m + (1 - decay) * a;
       },
       as_it_is},
      {restkv::running_maximum{}, [](double m, double a, index_t n) { return n == 0 ? a : std::max(m, a); }, as_it_is},
      {restkv::running_last{}, [](double, double a, index_t) { return a; }, as_it_is}};
  random_engine random(2);
  reference_backend backend;
  for (std::size_t k = 0; k < kinds.size(); ++k) {
    for (const bool shared : {false, true}) {
      for (const index_t refresh : {1, 4}) {
        for (const bool compete : {false, true}) {
          if (shared && compete) continue;
          CAPTURE(k, shared, refresh, compete);
          auto policy = make_policy<running_policy>(9, compete ? 0.0f : 1.0f, {.sink = 1, .recent = refresh - 1}, 12);
          policy.policy.granularity.shared = shared;
          policy.running.choice = kinds[k].running;
          policy.refresh = refresh;
          const auto plan = plan_for(policy, shape);
          naive_rule rule = rule_of(plan);
          rule.fold = kinds[k].fold;
          rule.score = [&](double m, index_t n) { return n == 0 ? 0.0 : kinds[k].score(m, n); };
          naive_session naive(rule);
          owned_session<running_policy> owner(backend, plan);
          const token_stream tokens(random, shape.query_heads, shape.kv_heads, 60);
          for (index_t t = 0; t < tokens.tokens; ++t) {
            append(owner.session, tokens, t, 1);
            naive.append(naive.layers[0], tokens.at(t));
            const std::string found = difference(owner.session, 0, naive.layers[0]);
            INFO("token " << t << ": " << found);
            REQUIRE(found.empty());
          }
          CHECK(owner.session.evictions(0) > 10);
        }
      }
    }
  }
}

TEST_CASE("TOVA, step by step: the last query's attention, the mean of all heads, one set, nothing protected") {
  constexpr index_t cache_size = 8;
  random_engine random(3);
  reference_backend backend;
  auto policy = make_policy<running_policy>(cache_size, 1.0f, {.sink = 0, .recent = 0}, cache_size + 1);
  policy.policy.granularity.shared = true;
  policy.running.choice = restkv::running_last{};
  owned_session<running_policy> owner(backend, plan_for(policy, shape));
  const token_stream tokens(random, shape.query_heads, shape.kv_heads, 80, 4.0);
  std::vector<index_t> cache;
  index_t newest_dropped = 0;
  for (index_t t = 0; t < tokens.tokens; ++t) {
    cache.push_back(t);
    std::vector<double> mean(cache.size(), 0.0);
    for (index_t q = 0; q < shape.query_heads; ++q) {
      std::vector<double> shares;
      for (const index_t n : cache) {
        double dot = 0;
        for (index_t c = 0; c < channels; ++c) {
          dot += double{tokens.queries()(q, t, c)} * double{tokens.keys()(q / 2, n, c)};
        }
        shares.push_back(std::exp(dot / 2));
      }
      const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
      for (std::size_t i = 0; i < shares.size(); ++i) mean[i] += shares[i] / sum / 4;
    }
    if (static_cast<index_t>(cache.size()) > cache_size) {
      const auto lowest = std::min_element(mean.begin(), mean.end()) - mean.begin();
      newest_dropped += lowest + 1 == static_cast<std::ptrdiff_t>(cache.size()) ? 1 : 0;
      cache.erase(cache.begin() + lowest);
    }
    append(owner.session, tokens, t, 1);
    REQUIRE(owner.session.evict_if_due(0).ok());
    REQUIRE(kept_of(owner.session) == std::vector<std::vector<index_t>>(2, cache));
  }
  CHECK(newest_dropped > 0);
}

TEST_CASE("one piece, chunks, and token by token leave the same bits") {
  random_engine random(4);
  auto sums = make_policy<running_policy>(9, 1.0f, {.sink = 1, .recent = 3}, 16);
  check_pieces(random, sums, 70);
  sums.running.choice = restkv::running_ema{};
  sums.policy.budget.floor = 0.2f;
  sums.refresh = 4;
  sums.evict_every = 3;
  check_pieces(random, sums, 70);
  auto window = make_policy<window_policy>(9, 1.0f, {.sink = 1, .recent = 0}, 14);
  window.policy.window = 5;
  check_pieces(random, window, 70);
  window.policy.budget.floor = 0.0f;
  window.evict_every = 4;
  check_pieces(random, window, 70);
  auto norms = make_policy<static_policy>(9, 0.0f, {.sink = 1, .recent = 2}, 12);
  check_pieces(random, norms, 70);
  norms.policy.granularity.tokens = 2;
  norms.high_water = 20;
  norms.policy.budget.floor = 1.0f;
  check_pieces(random, norms, 90);
}

TEST_CASE("scores of single tokens keep the same whenever evictions come") {
  random_engine random(5);
  reference_backend backend;
  for (const auto kind : {static_score::kind::newest, static_score::kind::key_norm}) {
    const token_stream tokens(random, shape.query_heads, shape.kv_heads, 90);
    std::vector<std::vector<index_t>> first;
    for (const index_t mark : {11, 12, 20, 47, 200}) {
      for (const index_t every : {0, 1, 7}) {
        auto policy = make_policy<static_policy>(10, 1.0f, {.sink = 2, .recent = 3}, mark);
        policy.policy.score.what = kind;
        policy.evict_every = every;
        owned_session<static_policy> owner(backend, plan_for(policy, shape));
        append(owner.session, tokens, 0, tokens.tokens);
        REQUIRE(owner.session.evict(0).ok());
        if (first.empty()) first = kept_of(owner.session);
        CAPTURE(mark, every);
        CHECK(kept_of(owner.session) == first);
      }
    }
    // And as a selection from the whole prompt.
    restkv::layer_view<float> prompt;
    prompt.query = {tokens.query.data(), {1, shape.query_heads, 90, channels}};
    prompt.key = tensor_view<const float, 4>(tokens.key.data(), {1, shape.kv_heads, 90, channels});
    prompt.value = tensor_view<const float, 4>(tokens.value.data(), {1, shape.kv_heads, 90, channels});
    auto policy = make_policy<static_policy>(10, 1.0f, {.sink = 2, .recent = 3}, 200).policy;
    policy.score.what = kind;
    const auto selection = restkv::select(backend, policy, prompt);
    for (index_t h = 0; h < shape.kv_heads; ++h) {
      const auto& kept = selection.kept();
      REQUIRE(kept.lengths(0, h) == 10);
      for (index_t i = 0; i < 10; ++i) {
        CHECK(kept.positions(0, h, i) == first[static_cast<std::size_t>(h)][static_cast<std::size_t>(i)]);
      }
    }
  }
}

TEST_CASE("a prompt below the mark, then one eviction: the selection from the prompt") {
  random_engine random(6);
  reference_backend backend;
  const token_stream tokens(random, shape.query_heads, shape.kv_heads, 50);
  auto policy = make_policy<window_policy>(20, 0.2f, {.sink = 1, .recent = 0}, 50);
  policy.policy.window = 6;
  owned_session<window_policy> owner(backend, plan_for(policy, shape));
  append(owner.session, tokens, 0, 50);
  REQUIRE(owner.session.evictions(0) == 0);
  const auto prompt = owner.session.cache(0);
  CHECK(prompt.query.extent(2) == 6);
  restkv::layer_view<float> view;
  view.query = {tokens.query.data(), {1, shape.query_heads, 50, channels}};
  view.key = tensor_view<const float, 4>(tokens.key.data(), {1, shape.kv_heads, 50, channels});
  view.value = tensor_view<const float, 4>(tokens.value.data(), {1, shape.kv_heads, 50, channels});
  const auto selection = restkv::select(backend, policy.policy, view);
  REQUIRE(owner.session.evict(0).ok());
  index_t total = 0;
  for (index_t h = 0; h < shape.kv_heads; ++h) {
    REQUIRE(selection.kept().lengths(0, h) == owner.session.length(0, h));
    total += owner.session.length(0, h);
    for (index_t i = 0; i < owner.session.length(0, h); ++i) {
      const index_t position = owner.session.positions(0, h)[static_cast<std::size_t>(i)];
      CHECK(position == selection.kept().positions(0, h, i));
      CHECK(owner.session.cache(0).key.chunk(0)(0, h, i, 0) == tokens.keys()(h, position, 0));
    }
  }
  CHECK(owner.session.length(0, 0) != owner.session.length(0, 1));  // heads compete
  CHECK(total == 2 * 20);
}

TEST_CASE("a second prompt on an evicted cache, window of queries") {
  random_engine random(7);
  reference_backend backend;
  auto policy = make_policy<window_policy>(10, 0.0f, {.sink = 2, .recent = 4}, 24);
  policy.policy.window = 4;
  const auto plan = plan_for(policy, shape);
  owned_session<window_policy> owner(backend, plan);
  naive_session naive(rule_of(plan));
  for (const index_t turn : {40, 1, 1, 1, 1, 1, 30, 1, 1, 1, 1, 25}) {
    const token_stream tokens(random, shape.query_heads, shape.kv_heads, turn);
    append(owner.session, tokens, 0, turn);
    for (index_t t = 0; t < turn; ++t) naive.append(naive.layers[0], tokens.at(t));
    const std::string found = difference(owner.session, 0, naive.layers[0]);
    INFO(found);
    REQUIRE(found.empty());
  }
  CHECK(owner.session.tokens_seen(0) == 40 + 30 + 25 + 9);
  CHECK(owner.session.positions(0, 0)[1] == 1);  // a sink of the first prompt
}

TEST_CASE("whole pages of 4 between 32 protected tokens at either end") {
  // The range of pages that may go, and how many do: 196 tokens -> one of pages [8, 41), 200 -> [8, 42), 227 -> [8,
  // 48).
  random_engine random(8);
  reference_backend backend;
  struct expectation {
    index_t tokens, first, end, pages;
  };
  for (const auto& wanted : {expectation{196, 8, 41, 1}, expectation{200, 8, 42, 2}, expectation{227, 8, 48, 9}}) {
    for (const auto kind : {static_score::kind::newest, static_score::kind::oldest}) {
      CAPTURE(wanted.tokens, static_cast<int>(kind));
      auto policy = make_policy<static_policy>(192, 1.0f, {.sink = 32, .recent = 32}, 240);
      policy.policy.score.what = kind;
      policy.policy.granularity.tokens = 4;
      owned_session<static_policy> owner(backend, plan_for(policy, shape));
      const token_stream tokens(random, shape.query_heads, shape.kv_heads, wanted.tokens);
      append(owner.session, tokens, 0, wanted.tokens);
      REQUIRE(owner.session.evictions(0) == 0);
      REQUIRE(owner.session.evict(0).ok());
      // The oldest pages of the range go where the newest are worth most, and the other way round.
      const index_t first = kind == static_score::kind::newest ? wanted.first : wanted.end - wanted.pages;
      std::vector<index_t> expected;
      for (index_t t = 0; t < wanted.tokens; ++t) {
        if (t / 4 < first || t / 4 >= first + wanted.pages) expected.push_back(t);
      }
      CHECK(kept_of(owner.session)[0] == expected);
    }
  }
}

TEST_CASE("speculation: what is accepted counts as if nothing else had come, across evictions") {
  random_engine random(9);
  reference_backend backend;
  auto policy = make_policy<running_policy>(9, 0.0f, {.sink = 1, .recent = 2}, 12);
  policy.running.choice = restkv::running_ema{};
  policy.speculation = 6;
  const auto plan = plan_for(policy, shape);
  owned_session<running_policy> drafted(backend, plan);
  owned_session<running_policy> plain(backend, plan);
  for (int round = 0; round < 60; ++round) {
    const token_stream tokens(random, shape.query_heads, shape.kv_heads, 6);
    const index_t accepted = pick(random, 0, 6);
    REQUIRE(drafted.session.begin_speculation().ok());
    append(drafted.session, tokens, 0, 2);
    append(drafted.session, tokens, 2, 4);
    CHECK(drafted.session.positions(0, 0).back() == drafted.session.tokens_seen(0) + 5);
    REQUIRE(drafted.session.commit(accepted).ok());
    append(plain.session, tokens, 0, accepted);
    REQUIRE(drafted.bytes() == plain.bytes());
  }
  CHECK(plain.session.evictions(0) > 10);
}

TEST_CASE("scores through W_O, on half elements: the metric comes from the caller") {
  using restkv::half;
  random_engine random(10);
  reference_backend backend;
  auto policy = session_policy<eviction_policy<>>{};  // the default: deletion errors through W_O
  policy.policy.window = 4;
  policy.policy.budget.budget = 12;
  policy.policy.protect = {.sink = 1, .recent = 4};
  policy.high_water = 20;
  const auto plan = restkv::make_session_plan<half>(backend, policy, shape);
  auto bare = policy;
  bare.policy.score.metric_of_distance = restkv::metric::identity;
  const auto bare_plan = restkv::make_session_plan<half>(backend, bare, shape);
  owned_session<decltype(policy), reference_backend, half> through(backend, plan);
  owned_session<decltype(policy), reference_backend, half> without(backend, bare_plan);

  const token_stream tokens(random, shape.query_heads, shape.kv_heads, 70);
  const auto halves = [](const std::vector<float>& from) {
    std::vector<half> to;
    for (const float x : from) to.push_back(restkv::narrow<half>(x));
    return to;
  };
  const auto query = halves(tokens.query);
  const auto key = halves(tokens.key);
  const auto value = halves(tokens.value);
  const tensor_view<const half, 3> q(query.data(), {4, 70, channels});
  const tensor_view<const half, 3> k(key.data(), {2, 70, channels});
  const tensor_view<const half, 3> v(value.data(), {2, 70, channels});
  const auto before = through.bytes();
  const status missing = through.session.append(0, q, k, v);
  CHECK(missing.code() == restkv::errc::missing_input);
  CHECK(std::string(missing.message()).find("metric") != std::string::npos);
  CHECK(through.bytes() == before);
  CHECK(!through.session.set_projection(1, {}, {}).ok());

  // W_O that keeps every length: the metric of the identity.
  std::vector<double> gram(4 * channels * channels, 0.0);
  std::vector<float> factor(gram.size(), 0.0f);
  const std::vector<float> spectrum(4 * channels, 1.0f);
  for (std::size_t h = 0; h < 4; ++h) {
    for (std::size_t c = 0; c < channels; ++c) gram[(h * channels + c) * channels + c] = 1;
  }
  for (std::size_t i = 0; i < gram.size(); ++i) factor[i] = static_cast<float>(gram[i]);
  restkv::output_metric_view metric;
  metric.gram = {gram.data(), {4, channels, channels}};
  metric.factor = {factor.data(), {4, channels, channels}};
  metric.spectrum = {spectrum.data(), {4, channels}};
  REQUIRE(through.session.set_projection(0, {}, metric).ok());
  for (index_t t = 0; t < 70; t += 7) {
    REQUIRE(through.session.append(0, q.slice(1, t, 7), k.slice(1, t, 7), v.slice(1, t, 7)).ok());
    REQUIRE(without.session.append(0, q.slice(1, t, 7), k.slice(1, t, 7), v.slice(1, t, 7)).ok());
    CHECK(through.bytes() == without.bytes());
  }
  CHECK(through.session.evictions(0) > 4);
  const auto positions = through.session.positions(0, 1);
  for (std::size_t i = 0; i < positions.size(); ++i) {
    CHECK(through.session.cache(0).key.chunk(0)(0, 1, static_cast<index_t>(i), 2).bits() ==
          k(1, positions[i], 2).bits());
  }
  through.session.clear();
  CHECK(through.session.append(0, q, k, v).ok());  // the metric stays
}
