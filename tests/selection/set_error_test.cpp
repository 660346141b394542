// SPDX-License-Identifier: Apache-2.0
#include "support/check_error.hpp"
#include "support/random_layer.hpp"
#include "support/test_data.hpp"

#include <restkv/reference/backend.hpp>
#include <restkv/reference/set_error.hpp>
#include <restkv/selection/set_error.hpp>
#include <restkv/verify/future_error.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

using namespace restkv_test;
using restkv::const_kept_tokens;
using restkv::errc;
using restkv::group_metric;
using restkv::kept_tokens;
using restkv::layer_view;
using restkv::owned_kept_tokens;
using restkv::position_t;
using restkv::reference_backend;
using restkv::set_error;
using restkv::set_error_report;
using restkv::workspace;

namespace {

using mask = std::vector<std::vector<bool>>;

/// Runs the tasks of a loop in two threads, the last ones first.
struct backward_backend : reference_backend {
  template <class Body>
  void parallel_for(index_t n, const Body& body) const {
    const auto half = [&](index_t begin, index_t end) {
      for (index_t i = end - 1; i >= begin; --i) body(i);
    };
    std::thread other([&] { half(0, n / 2); });
    half(n / 2, n);
    other.join();
  }
};

/// Random sets of `count` tokens of each head; nested where one is drawn from the other.
template <class T>
owned_kept_tokens draw_set(random_engine& random, const layer_view<T>& layer, index_t heads, index_t count) {
  owned_kept_tokens drawn(layer.key.extent(0), heads, layer.key.extent(2));
  const kept_tokens set = drawn.kept();
  for (index_t b = 0; b < set.batch(); ++b) {
    for (index_t h = 0; h < heads; ++h) {
      const auto span = restkv::sequence(layer, b, h * layer.key.extent(1) / heads);
      std::vector<position_t> all(static_cast<std::size_t>(span.length));
      std::iota(all.begin(), all.end(), static_cast<position_t>(span.begin));
      std::shuffle(all.begin(), all.end(), random);
      const index_t taken = std::min(count, span.length);
      std::sort(all.begin(), all.begin() + taken);
      std::copy_n(all.begin(), taken, &set.positions(b, h, 0));
      set.lengths(b, h) = static_cast<position_t>(taken);
    }
  }
  return drawn;
}

std::vector<position_t> tokens_of(const const_kept_tokens& set, index_t b, index_t h) {
  const position_t* const first = &set.positions(b, h, 0);
  return {first, first + set.lengths(b, h)};
}

/// Which tokens of sequence b the set holds, counted from its beginning. [heads][length]
template <class T>
mask mask_of(const layer_view<T>& layer, const const_kept_tokens& set, index_t b) {
  mask made;
  for (index_t h = 0; h < set.heads(); ++h) {
    const auto span = restkv::sequence(layer, b, h * layer.key.extent(1) / set.heads());
    made.emplace_back(static_cast<std::size_t>(span.length), false);
    for (const position_t token : tokens_of(set, b, h)) {
      made.back()[static_cast<std::size_t>(token - span.begin)] = true;
    }
  }
  return made;
}

mask both(mask a, const mask& b) {
  for (std::size_t h = 0; h < a.size(); ++h) {
    for (std::size_t n = 0; n < a[h].size(); ++n) a[h][n] = a[h][n] || b[h][n];
  }
  return a;
}

template <class T>
group_metric metric_of(const layer_view<T>& layer, index_t heads) {
  group_metric metric;
  const auto outcome = metric.build(layer.projection, layer.query.extent(1), layer.key.extent(3), heads);
  INFO(outcome.message());
  REQUIRE(outcome.ok());
  return metric;
}

template <class Backend, class T>
set_error_report refine(Backend& backend, const set_error& options, const layer_view<T>& layer,
                        const const_kept_tokens& candidates, kept_tokens kept) {
  const group_metric metric = metric_of(layer, kept.heads());
  std::vector<std::byte> memory(restkv::set_error_workspace_bytes(options, layer, candidates, kept));
  set_error_report report;
  const auto outcome = restkv::refine_set_error(backend, options, layer, metric.view(), candidates, kept,
                                                workspace(memory.data(), memory.size()), &report);
  INFO(outcome.message());
  REQUIRE(outcome.ok());
  return report;
}

/// sum_r ||error_r||^2 / sum_r ||y_r||^2, by the verifier.
template <class T>
double judged(const layer_view<T>& layer, const const_kept_tokens& kept, index_t queries) {
  reference_backend backend;
  restkv::output_errors errors;
  const auto outcome = restkv::output_error(backend, kept, layer, errors, queries);
  INFO(outcome.message());
  REQUIRE(outcome.ok());
  return errors.mean_relative() * errors.mean_relative();
}

}  // namespace

TEST_CASE("set_error: the objective is what its definition gives", "[set_error]") {
  random_engine random(1);
  for (int trial = 0; trial < 12; ++trial) {
    const index_t kv_heads = pick(random, 1, 3);
    const random_layer<float> owner(random, {.kv_heads = kv_heads,
                                             .group = pick(random, 1, 3),
                                             .head_dim = pick(random, 1, 20),
                                             .tokens = pick(random, 20, 45),
                                             .query_rows = 12,
                                             .hidden = chance(random, 30) ? 0 : pick(random, 1, 40),
                                             .strided = chance(random, 50),
                                             .chunks = pick(random, 1, 3)});
    const auto& layer = owner.view();
    const index_t heads = chance(random, 30) ? layer.query.extent(1) : kv_heads;
    const std::vector<float> weights{1.0f, 0.5f, 2.0f, 0.0f, 1.0f, 1.0f, 3.0f, 0.25f};
    set_error options{.window = 8, .attention_noise = 0.5f, .passes = 5, .protect = {.sink = 1, .recent = 2}};
    if (chance(random, 50)) options.horizon = 4;
    if (chance(random, 50)) options.weights = weights;
    const std::vector<float> noise_weights{0.0f, 1.0f, 0.0f, 0.0f, 3.0f, 1.0f, 3.0f, 2.0f};
    if (chance(random, 50)) options.noise_weights = noise_weights;
    owned_kept_tokens chosen = draw_set(random, layer, heads, 9);
    const owned_kept_tokens candidates = draw_set(random, layer, heads, pick(random, 5, 18));
    const restkv::reference::set_error_oracle<float> oracle(layer, options, 0, heads);
    const mask start = mask_of(layer, chosen, 0);
    const mask taking_part = both(start, mask_of(layer, candidates.kept(), 0));
    const auto before = oracle(start, taking_part);
    reference_backend backend;
    const set_error_report report = refine(backend, options, layer, candidates.kept(), chosen.kept());
    const auto after = oracle(mask_of(layer, chosen, 0), taking_part);
    INFO("trial " << trial << ", exchanged " << report.exchanged);
    CHECK(report.before == Approx(before.window + 0.5 * before.noise).epsilon(1e-3));
    CHECK(report.after == Approx(after.window + 0.5 * after.noise).epsilon(1e-3));
    CHECK(after.window <= before.window * (1 + 1e-4));
    CHECK(report.exchanged > 0);
  }
}

TEST_CASE("set_error: gains of single tokens are differences of the objective", "[set_error]") {
  random_engine random(2);
  for (int trial = 0; trial < 6; ++trial) {
    const random_layer<float> owner(
        random, {.group = pick(random, 1, 3), .tokens = 30, .hidden = 10 * pick(random, 0, 2)});
    const auto& layer = owner.view();
    set_error options{.window = 6, .attention_noise = 0.5f};
    owned_kept_tokens chosen = draw_set(random, layer, 2, 10);
    const owned_kept_tokens every = draw_set(random, layer, 2, 30);
    const restkv::reference::set_error_oracle<float> oracle(layer, options, 0, 2);
    const mask all = mask_of(layer, every.kept(), 0);
    const mask kept = mask_of(layer, chosen, 0);
    const auto sizes = restkv::detail::exchange_sizes_of(options, layer, 2, 30, 30);
    workspace counting;
    restkv::detail::exchange_memory counted(sizes, counting);
    static_cast<void>(counted);
    std::vector<std::byte> bytes(counting.required_bytes());
    workspace space(bytes.data(), bytes.size());
    restkv::detail::exchange_memory memory(sizes, space);
    const group_metric metric = metric_of(layer, 2);
    reference_backend backend;
    restkv::detail::exchange<reference_backend, float> steps(backend, layer, metric.view(), sizes, memory, 0.5);
    for (index_t i = 0; i < sizes.observed.lanes; ++i) {
      memory.weights[i] = memory.noise_weights[i] = i < 6 ? 1.0f / 6 : 0.0f;
    }
    for (index_t h = 0; h < 2; ++h) {
      memory.counts[h] = 30;
      for (index_t n = 0; n < 30; ++n) {
        memory.tokens[h * 30 + n] = static_cast<position_t>(n);
        memory.states[h * 30 + n] = kept[static_cast<std::size_t>(h)][static_cast<std::size_t>(n)]
                                        ? restkv::detail::exchange_state::kept
                                        : restkv::detail::exchange_state::out;
      }
    }
    REQUIRE(steps.observe(0));
    steps.evaluate(memory.states, memory.now);
    steps.compute_gains();
    const auto value = [&](const mask& set) {
      const auto parts = oracle(set, all);
      return parts.window + 0.5 * parts.noise;
    };
    const double now = value(kept);
    for (std::size_t h = 0; h < 2; ++h) {
      for (std::size_t n = 0; n < 30; n += 3) {
        mask toggled = kept;
        toggled[h][n] = !toggled[h][n];
        INFO("head " << h << ", token " << n);
        CHECK(memory.gains[h * 30 + n] == Approx(value(toggled) - now).epsilon(1e-3).margin(1e-5 * now));
      }
    }
  }
}

TEST_CASE("set_error: the error that the verifier measures never rises", "[set_error]") {
  random_engine random(3);
  index_t lowered = 0;
  for (int trial = 0; trial < 20; ++trial) {
    const random_layer<float> owner(random, {.group = pick(random, 1, 4),
                                             .tokens = pick(random, 30, 90),
                                             .hidden = chance(random, 20) ? 0 : 30,
                                             .sharpness = chance(random, 30) ? 6.0 : 1.5});
    const auto& layer = owner.view();
    const set_error options{.window = 10,
                            .attention_noise = chance(random, 50) ? 0.0f : 2.0f,
                            .passes = pick(random, 0, 20),
                            .protect = {.sink = 0, .recent = 3}};
    owned_kept_tokens chosen = draw_set(random, layer, 2, 16);
    const owned_kept_tokens candidates = draw_set(random, layer, 2, 40);
    const double before = judged(layer, chosen, 10);
    reference_backend backend;
    const set_error_report report = refine(backend, options, layer, candidates.kept(), chosen.kept());
    INFO("trial " << trial << ", exchanged " << report.exchanged);
    CHECK(judged(layer, chosen, 10) <= before * (1 + 1e-4));
    CHECK(report.after <= report.before);
    CHECK(report.passes <= options.passes);
    lowered += judged(layer, chosen, 10) < 0.95 * before ? 1 : 0;
  }
  CHECK(lowered >= 15);
}

TEST_CASE("set_error: totals and protected tokens stay, whatever the memory and the padding", "[set_error]") {
  random_engine random(4);
  for (int trial = 0; trial < 20; ++trial) {
    const random_layer<restkv::half> owner(random, {.batch = pick(random, 0, 3),
                                                    .tokens = pick(random, 12, 60),
                                                    .query_rows = 12,
                                                    .strided = chance(random, 50),
                                                    .chunks = pick(random, 1, 3),
                                                    .padded = chance(random, 70),
                                                    .pad = chance(random, 50) ? restkv::padding::left
                                                                              : restkv::padding::right,
                                                    .masked_percent = chance(random, 50) ? 20 : 0});
    const auto& layer = owner.view();
    const set_error options{.window = 8, .passes = 6, .protect = {.sink = 2, .recent = 5}};
    owned_kept_tokens chosen = draw_set(random, layer, 2, 14);
    owned_kept_tokens other = chosen;
    const owned_kept_tokens start = chosen;
    const owned_kept_tokens candidates = draw_set(random, layer, 2, 25);
    reference_backend forward;
    backward_backend backward;
    const set_error_report report = refine(forward, options, layer, candidates.kept(), chosen.kept());
    const set_error_report again = refine(backward, options, layer, candidates.kept(), other.kept());
    INFO("trial " << trial);
    CHECK(report.after == again.after);
    CHECK(report.exchanged == again.exchanged);
    const const_kept_tokens was = start.kept();
    const const_kept_tokens is = chosen.kept();
    CHECK(restkv::check_kept(is, layer.key.extent(0), 2, layer.key.extent(2)).ok());
    for (index_t b = 0; b < is.batch(); ++b) {
      index_t total = 0;
      for (index_t h = 0; h < 2; ++h) {
        total += is.lengths(b, h) - was.lengths(b, h);
        CHECK(tokens_of(is, b, h) == tokens_of(other.kept(), b, h));
        const auto now = tokens_of(is, b, h);
        const auto entered = tokens_of(candidates.kept(), b, h);
        const auto old = tokens_of(was, b, h);
        const auto span = restkv::sequence(layer, b, h);
        for (const position_t token : old) {
          const bool masked = layer.keep_mask.data != nullptr && layer.keep_mask(b, token) != 0;
          if (!masked && token - span.begin >= 2 && token - span.begin < span.length - 5) continue;
          CHECK(std::binary_search(now.begin(), now.end(), token));
        }
        for (const position_t token : now) {
          CHECK((std::binary_search(old.begin(), old.end(), token) ||
                 std::binary_search(entered.begin(), entered.end(), token)));
        }
      }
      CHECK(total == 0);
    }
  }
}

TEST_CASE("set_error: damaged tensors leave a set valid", "[set_error]") {
  random_engine random(5);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e38f}) {
    for (int tensor = 0; tensor < 3; ++tensor) {
      random_layer<float> owner(random, {.tokens = 40});
      const auto& layer = owner.view();
      (tensor == 0 ? owner.key : tensor == 1 ? owner.value : owner.query).view()(0, 0, 5, 1) = bad;
      owned_kept_tokens chosen = draw_set(random, layer, 2, 12);
      const owned_kept_tokens start = chosen;
      const owned_kept_tokens candidates = draw_set(random, layer, 2, 30);
      reference_backend backend;
      const auto report = refine(backend, {.window = 8, .protect = {0, 2}}, layer, candidates.kept(), chosen.kept());
      INFO("tensor " << tensor << ", " << bad);
      CHECK(restkv::check_kept(chosen.kept(), 1, 2, 40).ok());
      CHECK(chosen.kept().total() == start.kept().total());
      CHECK(std::isfinite(report.after));
      // Every output has a value that is not finite.
      if (tensor == 1 && bad != 1e38f) CHECK(report.exchanged == 0);
    }
  }
}

TEST_CASE("set_error: a real layer, the window's error and that of the queries to come", "[set_error]") {
  const auto file = open_file(example_data("trace-2k.safetensors"));
  const std::string prefix = "layers.10.";
  const auto tensor = [&](const char* name) { return file_tensor<float, 3>(file, prefix + name); };
  const auto q = tensor("q");
  const auto k = tensor("k");
  const auto v = tensor("v");
  const auto q_future = tensor("q_future");
  const auto k_future = tensor("k_future");
  const auto v_future = tensor("v_future");
  const file_tensor<float, 2> wo(file, prefix + "wo");
  const auto batched = [](const file_tensor<float, 3>& t) {
    return restkv::tensor_view<const float, 4>(t.view.data,
                                               {1, t.view.extent(0), t.view.extent(1), t.view.extent(2)});
  };
  layer_view<float> layer;
  layer.query = batched(q);
  layer.key = batched(k);
  layer.value = batched(v);
  layer.projection = wo.view;
  // Every eighth token and the last 32 are kept, every third one may enter.
  const index_t tokens = layer.key.extent(2);
  owned_kept_tokens chosen(1, 3, tokens);
  owned_kept_tokens candidates(1, 3, tokens);
  for (index_t h = 0; h < 3; ++h) {
    for (index_t n = 0; n < tokens; ++n) {
      const auto add = [&](const kept_tokens& set) {
        set.positions(0, h, set.lengths(0, h)++) = static_cast<position_t>(n);
      };
      if (n % 8 == 0 || n >= tokens - 32) add(chosen.kept());
      if (n % 3 == 0) add(candidates.kept());
    }
  }
  reference_backend backend;
  const restkv::future_view<float> future{batched(q_future), batched(k_future), batched(v_future)};
  const auto future_of = [&] {
    restkv::output_errors errors;
    REQUIRE(restkv::future_error(backend, chosen.kept(), layer, future, errors).ok());
    return errors.mean_relative();
  };
  const double before = judged(layer, chosen.kept(), 16);
  const double future_before = future_of();
  refine(backend, {.window = 16, .passes = 6}, layer, candidates.kept(), chosen.kept());
  CHECK(judged(layer, chosen.kept(), 16) < 0.5 * before);
  CHECK(future_of() < 0.8 * future_before);
}

TEST_CASE("set_error: what does not fit is named", "[set_error]") {
  random_engine random(6);
  const random_layer<float> owner(random, {.tokens = 40, .query_rows = 10});
  const auto& layer = owner.view();
  owned_kept_tokens chosen = draw_set(random, layer, 2, 12);
  const owned_kept_tokens start = chosen;
  const owned_kept_tokens candidates = draw_set(random, layer, 2, 30);
  const group_metric metric = metric_of(layer, 2);
  reference_backend backend;
  std::vector<std::byte> memory(restkv::set_error_workspace_bytes({}, layer, candidates.kept(), chosen.kept()));
  const auto run = [&](const set_error& options, const restkv::group_metric_view& grams, std::size_t bytes) {
    kept_tokens kept = chosen.kept();
    return restkv::refine_set_error(backend, options, layer, grams, candidates.kept(), kept,
                                    workspace(memory.data(), bytes));
  };
  const std::vector<float> weights(3, 1.0f);
  const std::vector<float> negative(10, -1.0f);
  check_error(run({.window = 11}, metric.view(), memory.size()), errc::shape_mismatch, {11, 10});
  check_error(run({.window = -1}, metric.view(), memory.size()), errc::invalid_argument, {-1});
  check_error(run({.horizon = 4}, metric.view(), memory.size()), errc::invalid_argument, {10, 4});
  check_error(run({.weights = weights}, metric.view(), memory.size()), errc::shape_mismatch, {3, 10});
  check_error(run({.weights = negative}, metric.view(), memory.size()), errc::invalid_argument, {-1});
  check_error(run({.attention_noise = -2.0f}, metric.view(), memory.size()), errc::invalid_argument, {-2});
  check_error(run({.passes = -3}, metric.view(), memory.size()), errc::invalid_argument, {-3});
  check_error(run({}, metric_of(layer, 4).view(), memory.size()), errc::shape_mismatch, {4, 2});
  check_error(run({}, {}, memory.size()), errc::shape_mismatch, {});
  check_error(run({}, metric.view(), memory.size() / 2), errc::workspace_too_small, {});
  group_metric unfit;
  check_error(unfit.build(layer.projection, 4, 9, 2), errc::shape_mismatch, {32, 9, 36});
  check_error(unfit.build(layer.projection, 4, 8, 3), errc::shape_mismatch, {4, 3});
  for (index_t h = 0; h < 2; ++h) CHECK(tokens_of(chosen.kept(), 0, h) == tokens_of(start.kept(), 0, h));
  CHECK(run({}, metric.view(), memory.size()).ok());
}
