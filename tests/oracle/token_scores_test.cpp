// SPDX-License-Identifier: Apache-2.0
// Token scores and rescorers of the field against their published formulas, evaluated directly in long double. What the
// production backend makes of the features is compared with the reference elsewhere; here it is the formulas.
#include "support/catch.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/reference/backend.hpp>
#include <restkv/rescoring/caote.hpp>
#include <restkv/rescoring/critical_kv.hpp>
#include <restkv/rescoring/defensive_kv.hpp>
#include <restkv/rescoring/r_kv.hpp>
#include <restkv/score/an_d_pro.hpp>
#include <restkv/score/caote.hpp>
#include <restkv/score/defensive_kv.hpp>
#include <restkv/score/drop_kv.hpp>
#include <restkv/score/given_attention.hpp>
#include <restkv/score/keyformer.hpp>
#include <restkv/score/la_prox.hpp>
#include <restkv/score/ob_cache.hpp>
#include <restkv/score/observed_attention.hpp>
#include <restkv/score/vatp.hpp>

#include <cmath>
#include <numeric>
#include <random>

using namespace restkv;
using restkv_test::select_tokens;

namespace {

using real = long double;

constexpr index_t query_heads = 4, kv_heads = 2, group = 2, tokens = 23, window = 5, head_dim = 6, hidden = 7;

/// A small layer in double, and everything about it by its definition.
struct problem {
  std::vector<double> q, k, v, w, gram;
  std::vector<float> factor, spectrum;
  layer_view<double> layer;

  explicit problem(unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](index_t count) {
      std::vector<double> numbers(static_cast<std::size_t>(count));
      for (double& x : numbers) x = normal(random);
      return numbers;
    };
    q = fill(query_heads * tokens * head_dim);
    k = fill(kv_heads * tokens * head_dim);
    v = fill(kv_heads * tokens * head_dim);
    w = fill(hidden * query_heads * head_dim);
    for (index_t h = 0; h < query_heads; ++h) {
      for (index_t r = 0; r < head_dim; ++r) {
        for (index_t c = 0; c < head_dim; ++c) {
          double sum = 0;
          for (index_t i = 0; i < hidden; ++i) sum += W(h, i, r) * W(h, i, c);
          gram.push_back(sum);
        }
      }
    }
    factor.resize(gram.size());  // the reference does not look at it
    spectrum.resize(static_cast<std::size_t>(query_heads * head_dim));
    layer.query = {q.data(), {1, query_heads, tokens, head_dim}};
    layer.key = tensor_view<const double, 4>(k.data(), {1, kv_heads, tokens, head_dim});
    layer.value = tensor_view<const double, 4>(v.data(), {1, kv_heads, tokens, head_dim});
    layer.projection = {w.data(), {hidden, query_heads * head_dim}};
    layer.metric = {{gram.data(), {query_heads, head_dim, head_dim}},
                    {factor.data(), {query_heads, head_dim, head_dim}},
                    {spectrum.data(), {query_heads, head_dim}}};
  }

  [[nodiscard]] double W(index_t h, index_t i, index_t c) const {
    return w[static_cast<std::size_t>(i * query_heads * head_dim + h * head_dim + c)];
  }
  [[nodiscard]] real value(index_t h, index_t n, index_t c) const {
    return v[static_cast<std::size_t>((h / group * tokens + n) * head_dim + c)];
  }
  /// Logit of query t (a position) and token n.
  [[nodiscard]] real logit(index_t h, index_t t, index_t n) const {
    real dot = 0;
    for (index_t c = 0; c < head_dim; ++c) {
      dot += real(q[static_cast<std::size_t>((h * tokens + t) * head_dim + c)]) *
             real(k[static_cast<std::size_t>((h / group * tokens + n) * head_dim + c)]);
    }
    return dot / std::sqrt(real(head_dim));
  }
  [[nodiscard]] real attention(index_t h, index_t t, index_t n) const {
    if (n > t) return 0;
    real sum = 0;
    for (index_t m = 0; m <= t; ++m) sum += std::exp(logit(h, t, m));
    return std::exp(logit(h, t, n)) / sum;
  }
  [[nodiscard]] std::vector<real> output(index_t h, index_t t) const {
    std::vector<real> o(head_dim);
    for (index_t n = 0; n <= t; ++n) {
      for (index_t c = 0; c < head_dim; ++c) o[static_cast<std::size_t>(c)] += attention(h, t, n) * value(h, n, c);
    }
    return o;
  }
  [[nodiscard]] std::vector<real> value_of(index_t h, index_t n) const {
    std::vector<real> x;
    for (index_t c = 0; c < head_dim; ++c) x.push_back(value(h, n, c));
    return x;
  }
  /// W[h] x.
  [[nodiscard]] std::vector<real> project(index_t h, const std::vector<real>& x) const {
    std::vector<real> y(hidden);
    for (index_t i = 0; i < hidden; ++i) {
      for (index_t c = 0; c < head_dim; ++c) y[static_cast<std::size_t>(i)] += W(h, i, c) * x[static_cast<std::size_t>(c)];
    }
    return y;
  }
  [[nodiscard]] std::vector<real> mean_value(index_t h) const {
    std::vector<real> mean(head_dim);
    for (index_t n = 0; n < tokens; ++n) {
      for (index_t c = 0; c < head_dim; ++c) mean[static_cast<std::size_t>(c)] += value(h, n, c) / tokens;
    }
    return mean;
  }
};

real dot(const std::vector<real>& x, const std::vector<real>& y) {
  return std::inner_product(x.begin(), x.end(), y.begin(), real(0));
}
real l1(const std::vector<real>& x) {
  return std::accumulate(x.begin(), x.end(), real(0), [](real sum, real y) { return sum + std::abs(y); });
}
std::vector<real> minus(std::vector<real> x, const std::vector<real>& y) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] -= y[i];
  return x;
}
real l2(const std::vector<real>& x) { return std::sqrt(dot(x, x)); }

template <class Score, class Temporal, class Rescoring = no_rescoring>
auto policy_of(const Score& score, const Temporal& temporal, index_t observed = window,
               const Rescoring& rescoring = {}) {
  return eviction_policy<Score, Temporal, no_pool, uniform, Rescoring>{.score = score,
                                                                       .window = observed,
                                                                       .temporal = temporal,
                                                                       .group = group_reduce::none,
                                                                       .rescoring = rescoring,
                                                                       .budget = uniform{12},
                                                                       .protect = {.sink = 1, .recent = 0}};
}

/// The backend's score of every query head and token against `expected(head, token)`.
template <class Policy, class Expected>
void check(const problem& p, const Policy& policy, index_t past, const Expected& expected) {
  reference_backend backend;
  const auto got = select_tokens(backend, policy, p.layer);
  REQUIRE(got.result.message() == std::string());
  for (index_t h = 0; h < got.heads; ++h) {
    for (index_t n = 0; n < past; ++n) {
      const auto want = static_cast<double>(expected(h, n));
      const double have = got.smoothed_of(0, h)[static_cast<std::size_t>(n)];
      CAPTURE(h, n, want, have);
      REQUIRE(std::fabs(want - have) <= 1e-11 * (std::fabs(want) + 1e-3));
    }
  }
}

/// The sum of `term(t)` over the window's queries.
template <class Term>
real over_window(const Term& term) {
  real sum = 0;
  for (index_t t = tokens - window; t < tokens; ++t) sum += term(t);
  return sum;
}

constexpr index_t past = tokens - window;

}  // namespace

TEST_CASE("scores of the window's queries are their published formulas") {
  const problem p(GENERATE(1u, 2u, 3u));
  const auto odds = [&](index_t h, index_t t, index_t n) {
    return p.attention(h, t, n) / (1 - p.attention(h, t, n));
  };
  const auto distance = [&](index_t h, index_t t, index_t n) { return l2(minus(p.output(h, t), p.value_of(h, n))); };
  check(p, policy_of(vatp{}, sum{}), past, [&](index_t h, index_t n) {
    return over_window([&](index_t t) { return p.attention(h, t, n) * l1(p.value_of(h, n)); });
  });
  check(p, policy_of(caote{}, mean{}), past, [&](index_t h, index_t n) {
    return over_window([&](index_t t) { return odds(h, t, n) * distance(h, t, n); }) / window;
  });
  check(p, policy_of(fast_caote{}, mean{}), past, [&](index_t h, index_t n) {
    return over_window([&](index_t t) { return odds(h, t, n); }) * l2(minus(p.mean_value(h), p.value_of(h, n))) / window;
  });
  check(p, policy_of(drop_kv{}, sum{}), past, [&](index_t h, index_t n) {
    return over_window([&](index_t t) {
      const real a = p.attention(h, t, n);
      const real ratio = a / (1 - a + real(1e-6f));
      return ratio * ratio * distance(h, t, n) * distance(h, t, n);
    });
  });
  check(p, policy_of(an_d_pro{}, sum{}), past, [&](index_t h, index_t n) {
    return over_window([&](index_t t) { return p.attention(h, t, n) * dot(p.output(h, t), p.value_of(h, n)); });
  });
  check(p, policy_of(la_prox{}, root_sum_square{}), past, [&](index_t h, index_t n) {
    const real squares = over_window([&](index_t t) { return p.attention(h, t, n) * p.attention(h, t, n); });
    return std::sqrt(squares) * l2(p.project(h, p.value_of(h, n)));
  });
  const auto ob_cache_term = [&](ob_cache_part part, index_t h, index_t t, index_t n) {
    const real a = p.attention(h, t, n), z = p.logit(h, t, n);
    const auto value = p.value_of(h, n);
    const real squared = dot(value, value);
    const real for_value = a * a * squared;
    const real for_key = a * z * a * z * distance(h, t, n) * distance(h, t, n);
    if (part == ob_cache_part::value) return for_value;
    if (part == ob_cache_part::key) return for_key;
    return for_value + for_key + 2 * a * a * z * (squared - dot(value, p.output(h, t)));
  };
  for (const ob_cache_part part : {ob_cache_part::value, ob_cache_part::key, ob_cache_part::joint}) {
    check(p, policy_of(ob_cache{part}, sum{}), past, [&](index_t h, index_t n) {
      return over_window([&](index_t t) { return ob_cache_term(part, h, t, n); });
    });
  }
}

TEST_CASE("observed attention is that of the queries which see a token") {
  const problem p(7);
  const auto queries_from = [&](index_t first, index_t h, index_t n, auto&& weight) {
    real sum = 0;
    for (index_t t = std::max(first, n); t < tokens; ++t) {
      sum += weight(t - std::max(first, n), tokens - std::max(first, n)) * p.attention(h, t, n);
    }
    return sum;
  };
  check(p, policy_of(observed_attention{}, sum{}, every_query), tokens, [&](index_t h, index_t n) {  // H2O
    return queries_from(0, h, n, [](index_t, index_t) { return real(1); });
  });
  check(p, policy_of(observed_attention{}, mean{}, every_query), tokens, [&](index_t h, index_t n) {
    return queries_from(0, h, n, [](index_t, index_t count) { return real(1) / count; });
  });
  check(p, policy_of(observed_attention{}, ema{.alpha = 0.25f}, every_query), tokens, [&](index_t h, index_t n) {
    real running = 0;
    for (index_t t = n; t < tokens; ++t) {
      running = t == n ? p.attention(h, t, n) : real(0.25) * p.attention(h, t, n) + real(0.75) * running;
    }
    return running;
  });
  check(p, policy_of(observed_attention{}, last{}, 1), tokens, [&](index_t h, index_t n) {  // TOVA
    return p.attention(h, tokens - 1, n);
  });
  check(p, policy_of(observed_attention{}, sum{}, 4), tokens, [&](index_t h, index_t n) {
    return queries_from(tokens - 4, h, n, [](index_t, index_t) { return real(1); });
  });
}

TEST_CASE("a given attention matrix scores as the attention that it holds") {
  const problem p(23);
  for (const index_t rows : {tokens, window, index_t(1)}) {
    std::vector<double> matrix;
    for (index_t h = 0; h < query_heads; ++h) {
      for (index_t t = tokens - rows; t < tokens; ++t) {
        for (index_t n = 0; n < tokens; ++n) {
          // What a query does not see must not be read.
          matrix.push_back(n > t ? std::nan("") : static_cast<double>(p.attention(h, t, n)));
        }
      }
    }
    const tensor_view<const double, 4> view(matrix.data(), {1, query_heads, rows, tokens});
    const auto agree = [&](auto temporal) {
      reference_backend backend;
      const auto own = select_tokens(backend, policy_of(observed_attention{}, temporal, rows), p.layer);
      check(p, policy_of(given_attention<decltype(temporal), double>{view, temporal}, mean{}), tokens,
            [&](index_t h, index_t n) { return real(own.scores_of(0, h)[static_cast<std::size_t>(n)]); });
    };
    agree(sum{});
    agree(ema{.alpha = 0.4f});
  }
  const tensor_view<const double, 4> narrow(p.q.data(), {1, query_heads, 1, tokens - 1});
  plan<decltype(policy_of(given_attention<mean, double>{narrow}, mean{}))> made;
  CHECK(std::string(make_plan(reference_backend(), policy_of(given_attention<mean, double>{narrow}, mean{}),
                              shape_of(p.layer), made)
                        .message()) == "attention has 22 tokens, the plan needs at least 23");
}

TEST_CASE("a score of a KV head is not reduced over its query heads") {
  // Negative scores: a root of squares would turn their order around.
  const problem p(29);
  std::vector<double> scores;
  for (index_t i = 0; i < kv_heads * tokens; ++i) scores.push_back(-1.0 - static_cast<double>(i * 7 % 23));
  for (const group_reduce how : {group_reduce::mean, group_reduce::max, group_reduce::sum, group_reduce::l2}) {
    auto policy = policy_of(given_scores<score_rows::kv_heads, double>{{scores.data(), {1, kv_heads, tokens}}}, mean{});
    policy.group = how;
    check(p, policy, tokens, [&](index_t h, index_t n) { return real(scores[static_cast<std::size_t>(h * tokens + n)]); });
  }
}

TEST_CASE("rescorers are their published formulas") {
  const problem p(11);
  const auto score = [&](index_t h, index_t n) {
    return over_window([&](index_t t) { return p.attention(h, t, n); }) / window;
  };
  for (const bool fast : {false, true}) {
    const caote_rescoring rescoring{fast ? caote_output::mean : caote_output::weighted};
    check(p, policy_of(snap_kv{}, mean{}, window, rescoring), past, [&](index_t h, index_t n) {
      real whole = 0;
      for (index_t m = 0; m < past; ++m) whole += score(h, m);
      std::vector<real> o(head_dim);
      for (index_t m = 0; m < past; ++m) {
        const real weight = fast ? real(1) / past : score(h, m) / whole;
        for (index_t c = 0; c < head_dim; ++c) o[static_cast<std::size_t>(c)] += weight * p.value(h, m, c);
      }
      const real alpha = score(h, n) / whole;
      return alpha / (1 - alpha) * l2(minus(o, p.value_of(h, n)));
    });
  }
  // 12 tokens a head, 5 of the window and 1 sink protected: the first half of the budget is protected already but for
  // none, three quarters leave 9 - 6 = 3 tokens to the first stage.
  const auto critical = [&](float first_stage, index_t first) {
    std::vector<std::vector<index_t>> best(query_heads);
    for (index_t h = 0; h < query_heads; ++h) {
      std::vector<index_t> order(past - 1);
      std::iota(order.begin(), order.end(), index_t{1});
      std::sort(order.begin(), order.end(), [&](index_t a, index_t b) { return score(h, a) > score(h, b); });
      best[static_cast<std::size_t>(h)].assign(order.begin(), order.begin() + first);
    }
    check(p, policy_of(snap_kv{}, mean{}, window, critical_kv<>{.first_stage = first_stage}), past,
          [&](index_t h, index_t n) {
            const auto& chosen = best[static_cast<std::size_t>(h)];
            if (std::find(chosen.begin(), chosen.end(), n) != chosen.end()) {
              return real(std::numeric_limits<double>::max());
            }
            return (score(h, n) + real(1e-4f)) * l1(p.project(h, p.value_of(h, n)));
          });
  };
  critical(0.5f, 0);
  critical(0.75f, 3);
  critical(1.0f, 6);
}

TEST_CASE("Keyformer accumulates the softmax of noisy logits") {
  const problem p(13);
  const keyformer score{.temperature = 1.7f, .seed = 5};
  // The noise itself: standard Gumbel, mean 0.5772, variance pi^2 / 6.
  double total_noise = 0, squares = 0;
  constexpr index_t draws = 40000;
  for (index_t i = 0; i < draws; ++i) {
    const double g = logit_perturbation{.gumbel = true, .seed = 5}(0.0, 0, i % 7, i / 7 % 100, i / 700);
    total_noise += g;
    squares += g * g;
  }
  CHECK(std::fabs(total_noise / draws - 0.57722) < 0.03);
  CHECK(std::fabs(squares / draws - (total_noise / draws) * (total_noise / draws) - 1.644934) < 0.08);
  const auto noisy = [&](index_t h, index_t t, index_t n) {
    const double g = logit_perturbation{.gumbel = true, .seed = 5}(0.0, 0, h, t, n);
    return std::exp((p.logit(h, t, n) + real(g)) / real(1.7f));
  };
  check(p, policy_of(score, sum{}, every_query), tokens, [&](index_t h, index_t n) {
    real total = 0;
    for (index_t t = n; t < tokens; ++t) {
      real whole = 0;
      for (index_t m = 0; m <= t; ++m) whole += noisy(h, t, m);
      total += noisy(h, t, n) / whole;
    }
    return total;
  });
}

TEST_CASE("DefensiveKV takes the worst case of pooled attention, with a floor, values and forced tokens") {
  const problem p(GENERATE(17u, 18u));
  constexpr int pool = 3;
  const auto pooled = [&](index_t h, index_t t, index_t n) {
    real mean = 0, before = 0, after = 0;
    for (index_t m = 0; m < past; ++m) {
      before += p.attention(h, t, m);
      for (index_t i = m - 1; i <= m + 1; ++i) {
        if (i < 0 || i >= past) continue;
        after += p.attention(h, t, i) / pool;
        if (m == n) mean += p.attention(h, t, i) / pool;
      }
    }
    return mean * before / after;
  };
  const auto worst = [&](index_t h, index_t n) {
    real most = 0;
    for (index_t t = tokens - window; t < tokens; ++t) most = std::max(most, pooled(h, t, n));
    return most;
  };
  check(p, policy_of(defensive_kv{.attention_pool = pool}, maximum{}), past, worst);

  const auto attention = [&](index_t h, index_t n) {
    return over_window([&](index_t t) { return p.attention(h, t, n); }) / window;
  };
  const auto size = [&](index_t h, index_t n) { return l1(p.project(h, p.value_of(h, n))); };
  for (const float mass : {0.3f, 0.75f, 0.9f}) {
    const defensive_rescoring<> rescoring{.mass = mass};
    check(p, policy_of(defensive_kv{.attention_pool = pool}, maximum{}, window, rescoring), past,
          [&](index_t h, index_t n) {
            real floor = 0, share = 0, sum_of_past = 0;
            for (index_t m = 0; m < past; ++m) floor += worst(h, m) / past;
            for (index_t j = 0; j < query_heads; ++j) share += size(j, n);
            std::vector<index_t> order(past - 1);  // the sink is kept anyhow
            std::iota(order.begin(), order.end(), index_t{1});
            std::sort(order.begin(), order.end(),
                      [&](index_t a, index_t b) { return attention(h, a) > attention(h, b); });
            for (index_t m = 0; m < past; ++m) sum_of_past += attention(h, m);
            real held = 0;
            index_t forced = 0;
            for (const index_t m : order) {
              held += attention(h, m) / sum_of_past;
              if (held >= real(mass) - (1 - sum_of_past) || forced == 12 - window - 1) break;
              if (m == n) return real(std::numeric_limits<double>::max());
              ++forced;
            }
            return std::max(floor, worst(h, n)) * size(h, n) / share;
          });
  }
}

TEST_CASE("R-KV weighs attention against the redundancy of keys") {
  const problem p(19);
  const key_redundancy redundancy{.threshold = 0.2};
  check(p, policy_of(snap_kv{}, mean{}, window, r_kv{.lambda = 0.3f, .weight = redundancy}), past,
        [&](index_t h, index_t n) {
          std::vector<double> scores(tokens), scratch(static_cast<std::size_t>(redundancy.scratch_size(shape_of(p.layer))));
          const problem_shape shape = shape_of(p.layer);
          redundancy.score_head(head_view<double>(p.layer, shape, 0, h), std::span<double>(scores),
                                std::span<double>(scratch));
          const real attention = over_window([&](index_t t) { return p.attention(h, t, n); }) / window;
          return real(0.3f) * attention + (1 - real(0.3f)) * real(scores[static_cast<std::size_t>(n)]);
        });
}
