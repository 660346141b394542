// SPDX-License-Identifier: Apache-2.0
// With a guard no step ever raises the window's error, neither a head's nor the layer's through W_O: judged directly,
// in long double. And the steps that fit something find the minimum of what they say they minimise.
#include "merge/merge_support.hpp"
#include "support/check_error.hpp"

#include <restkv/merge/add_summary.hpp>
#include <restkv/merge/cam.hpp>
#include <restkv/merge/fit_values.hpp>
#include <restkv/merge/look_m.hpp>
#include <restkv/merge/merge.hpp>
#include <restkv/merge/value_merge.hpp>

using namespace restkv_test;
using restkv::errc;
using restkv::merge_guard;
using restkv::merge_options;

namespace {

template <class T, class Operator>
restkv::status run_merge(compacted_layer<T>& made, const Operator& merging, const merge_options& options) {
  std::vector<std::byte> memory(restkv::merge_workspace_bytes(made.cache(), made.layer, merging, options));
  return restkv::merge(made.cache(), made.layer, merging, options, restkv::workspace(memory));
}
template <class T>
restkv::status run_fit(compacted_layer<T>& made, const restkv::fit_options& options) {
  std::vector<std::byte> memory(restkv::fit_workspace_bytes(made.cache(), made.layer, options));
  return restkv::fit_values(made.cache(), made.layer, options, restkv::workspace(memory));
}
template <class T>
restkv::status run_summary(compacted_layer<T>& made, const restkv::summary_options& options) {
  std::vector<std::byte> memory(restkv::summary_workspace_bytes(made.cache(), made.layer, options));
  return restkv::add_summary(made.cache(), made.layer, options, restkv::workspace(memory));
}

/// Compares the errors before and after a step; counts what fell.
struct fall_count {
  index_t heads = 0;
  index_t layers = 0;

  void compare(const direct_error& before, const direct_error& after) {
    for (std::size_t i = 0; i < before.head.size(); ++i) {
      CHECK(after.head[i] <= before.head[i] * (1 + 1e-10));
      heads += after.head[i] < before.head[i] ? 1 : 0;
    }
    CHECK(after.layer <= before.layer * (1 + 1e-10));
    layers += after.layer < before.layer ? 1 : 0;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("a guarded step never raises the window's error", "[merge][guard]", float, restkv::bfloat16) {
  random_engine random(21);
  fall_count merges, fits, summaries;
  index_t worse_without = 0;
  const auto frequencies = frequencies_of(4);
  for (int trial = 0; trial < 25; ++trial) {
    CAPTURE(trial);
    const index_t window = pick(random, 1, 10);
    arranged_layer<TestType> layer({.batch = pick(random, 1, 2),
                                    .query_heads = 4,
                                    .kv_heads = 2,
                                    .head_dim = 8,
                                    .tokens = pick(random, 4, 40),
                                    .queries = 12,
                                    .hidden = chance(random, 60) ? 9 : 0,
                                    .sharpness = chance(random, 20) ? 30.0 : 1.5},
                                   static_cast<unsigned>(trial));
    if (layer.sizes.batch == 2) {
      layer.pad_to({static_cast<std::int32_t>(layer.sizes.tokens), static_cast<std::int32_t>(pick(random, 0, 3))},
                   restkv::padding::left);
    }
    const auto kept =
        keep_some(random, layer.view(), chance(random, 30) ? 4 : 2, static_cast<int>(pick(random, 5, 80)));
    compacted_layer<TestType> made(layer, kept);
    const direct_error before(made, window);
    merge_options options{.window = window,
                          .guard = chance(random, 50) ? merge_guard::token : merge_guard::head};
    options.rope.frequencies = frequencies;
    const auto attempt = [&](const auto& merging) {
      made.reset();
      REQUIRE(run_merge(made, merging, options).ok());
      merges.compare(before, direct_error(made, window));
    };
    attempt(restkv::average_merge{});
    attempt(restkv::pivot_merge{});
    attempt(restkv::value_merge{});
    attempt(restkv::cam_merge{.targets = 4});
    // One step after the other, each from where the last one left.
    const direct_error merged(made, window);
    REQUIRE(run_summary(made, {.window = window}).ok());
    const direct_error summarised(made, window);
    summaries.compare(merged, summarised);
    REQUIRE(run_fit(made, {.window = window}).ok());
    fits.compare(summarised, direct_error(made, window));
    options.guard = merge_guard::none;
    made.reset();
    REQUIRE(run_merge(made, restkv::average_merge{}, options).ok());
    worse_without += direct_error(made, window).layer > before.layer ? 1 : 0;
  }
  CHECK(merges.heads > 40);
  CHECK(merges.layers > 25);
  CHECK(summaries.heads > 10);
  CHECK(fits.heads > 30);
  CHECK(fits.layers > 10);
  CHECK(worse_without > 5);  // the guard has something to do
}

TEST_CASE("heads of different lengths are judged each by its own tokens", "[merge][guard]") {
  const arranged_layer<float> layer({.batch = 2, .head_dim = 8, .tokens = 40, .queries = 10, .hidden = 9}, 26);
  const std::vector<std::int32_t> own{40, 23, 31, 12};
  const auto kept = keep_where(2, 2, 40, [&](index_t b, index_t h, index_t n) {
    return n >= 40 - own[static_cast<std::size_t>(2 * b + h)] && n % 3 == 0;
  });
  compacted_layer<float> made(layer, kept);
  made.layer.head_lengths = {own.data(), {2, 2}};
  for (index_t b = 0; b < 2; ++b) {  // what is not there may be anything
    for (index_t h = 0; h < 2; ++h) {
      for (index_t n = 0; n < 40 - own[static_cast<std::size_t>(2 * b + h)]; ++n) {
        layer.key(b, h, n, 0) = layer.value(b, h, n, 0) = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
  fall_count steps;
  const direct_error before(made, 8);
  merge_options options{.window = 8};
  options.rope.ignore = true;
  REQUIRE(run_merge(made, restkv::average_merge{}, options).ok());
  const direct_error merged(made, 8);
  steps.compare(before, merged);
  REQUIRE(run_summary(made, {.window = 8}).ok());
  const direct_error summarised(made, 8);
  steps.compare(merged, summarised);
  REQUIRE(run_fit(made, {.window = 8}).ok());
  steps.compare(summarised, direct_error(made, 8));
  CHECK(steps.heads > 6);
}

TEST_CASE("a guard by the token finds merges that are good where the rest is bad", "[merge][guard]") {
  const arranged_layer<float> layer({.head_dim = 8, .tokens = 60, .queries = 8}, 22);
  const auto kept = keep_where(1, 2, 60, [](index_t, index_t, index_t n) { return n % 4 == 0 || n >= 52; });
  compacted_layer<float> made(layer, kept);
  merge_options options{.window = 8, .guard = merge_guard::head};
  options.rope.ignore = true;
  REQUIRE(run_merge(made, restkv::average_merge{}, options).ok());
  const double by_head = direct_error(made, 8).layer;
  options.guard = merge_guard::token;
  made.reset();
  REQUIRE(run_merge(made, restkv::average_merge{}, options).ok());
  CHECK(direct_error(made, 8).layer < 0.97 * by_head);
}

TEST_CASE("fitted values are the minimum of the ridge regression", "[merge][fit]") {
  for (const bool summarised : {false, true}) {
    const arranged_layer<double> layer({.query_heads = 6, .kv_heads = 2, .head_dim = 8, .tokens = 50, .queries = 6},
                                       23);
    const auto kept = keep_where(1, 2, 50, [](index_t, index_t, index_t n) { return n % 3 == 1 || n >= 46; });
    compacted_layer<double> made(layer, kept);
    if (summarised) REQUIRE(run_summary(made, {.window = 5}).ok());
    const auto old_values = made.value_memory;
    const auto old_keys = made.key_memory;
    REQUIRE(run_fit(made, {.window = 5, .ridge = 0.2}).ok());
    CHECK(same_memory(old_keys, made.key_memory));
    for (index_t h = 0; h < 2; ++h) {
      const index_t count = made.lengths[static_cast<std::size_t>(h)];
      const index_t stride = made.kept.capacity() + 1;
      CHECK(count == made.kept.lengths(0, h) + (summarised ? 1 : 0));
      // P and O, directly.
      std::vector<std::vector<double>> shares, outputs;
      double trace = 0;
      for (index_t q = 3 * h; q < 3 * h + 3; ++q) {
        for (index_t i = 1; i < 6; ++i) {
          const auto query = row_of(layer.query[0][q][i]);
          std::vector<std::vector<double>> keys, values;
          for (index_t n = 0; n < 45 + i; ++n) {
            keys.push_back(row_of(layer.key[0][h][n]));
            values.push_back(row_of(layer.value[0][h][n]));
          }
          outputs.emplace_back();
          for (const auto x : attend_directly(query, keys, values)) outputs.back().push_back(static_cast<double>(x));
          std::vector<double> share;
          double mass = 0;
          for (index_t n = 0; n < count; ++n) {
            const bool seen = n >= made.kept.lengths(0, h) || made.kept.positions(0, h, n) < 45 + i;
            double logit = 0;
            for (index_t c = 0; c < 8; ++c) logit += query[static_cast<std::size_t>(c)] * made.key().rows(0, h, n, c);
            share.push_back(seen ? std::exp(logit / std::sqrt(8.0)) : 0.0);
            mass += share.back();
          }
          for (double& x : share) x /= mass;
          for (const double x : share) trace += x * x;
          shares.push_back(share);
        }
      }
      const double ridge = 0.2 * trace / static_cast<double>(shares.size());
      // The gradient of ||O - P V'||^2 + ridge ||V' - V||^2 is 0.
      double worst = 0, moved = 0;
      for (index_t n = 0; n < count; ++n) {
        for (index_t c = 0; c < 8; ++c) {
          const auto at = static_cast<std::size_t>((h * stride + n) * 8 + c);
          const double change = made.value_memory[at] - old_values[at];
          moved = std::max(moved, std::abs(change));
          double gradient = ridge * change;
          for (std::size_t r = 0; r < shares.size(); ++r) {
            double residual = -outputs[r][static_cast<std::size_t>(c)];
            for (index_t m = 0; m < count; ++m) {
              residual += shares[r][static_cast<std::size_t>(m)] *
                          made.value_memory[static_cast<std::size_t>((h * stride + m) * 8 + c)];
            }
            gradient += shares[r][static_cast<std::size_t>(n)] * residual;
          }
          worst = std::max(worst, std::abs(gradient));
        }
      }
      CHECK(moved > 1e-2);
      CHECK(worst < 1e-12);
    }
  }
}

TEST_CASE("a summary is the mean of what was dropped, its key raised by log n", "[merge][summary]") {
  const arranged_layer<double> layer({.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 64, .queries = 6}, 24);
  const auto kept = keep_where(1, 2, 64, [](index_t, index_t h, index_t n) { return n % 4 == h || n >= 60; });
  compacted_layer<double> made(layer, kept);
  const auto keys = made.key_memory;
  REQUIRE(run_summary(made, {.window = 6, .ridge = 0.05}).ok());
  index_t added = 0;
  for (index_t h = 0; h < 2; ++h) {
    const index_t entry = made.kept.lengths(0, h);
    if (made.lengths[static_cast<std::size_t>(h)] == entry) continue;
    ++added;
    CHECK(made.lengths[static_cast<std::size_t>(h)] == entry + 1);
    std::vector<double> key(8), value(8);
    const auto n = static_cast<double>(64 - entry);
    for (index_t t = 0; t < 64; ++t) {
      if (keeps(kept, 0, h, t)) continue;
      for (index_t c = 0; c < 8; ++c) {
        key[static_cast<std::size_t>(c)] += layer.key(0, h, t, c) / n;
        value[static_cast<std::size_t>(c)] += layer.value(0, h, t, c) / n;
      }
    }
    double squares = 0;
    for (index_t q = 2 * h; q < 2 * h + 2; ++q) {
      for (index_t i = 0; i < 6; ++i) {
        for (index_t c = 0; c < 8; ++c) squares += layer.query(0, q, i, c) * layer.query(0, q, i, c);
      }
    }
    std::vector<double> delta, gradient;
    for (index_t c = 0; c < 8; ++c) {
      CHECK(made.value().rows(0, h, entry, c) == Approx(value[static_cast<std::size_t>(c)]).margin(1e-12));
      delta.push_back(made.key().rows(0, h, entry, c) - key[static_cast<std::size_t>(c)]);
      gradient.push_back(0.05 * squares / 12 * delta.back());
    }
    // The gradient of sum (q . delta - sqrt(d) log n)^2 + ridge |delta|^2 is 0.
    for (index_t q = 2 * h; q < 2 * h + 2; ++q) {
      for (index_t i = 0; i < 6; ++i) {
        double residual = -std::sqrt(8.0) * std::log(n);
        for (index_t c = 0; c < 8; ++c) residual += layer.query(0, q, i, c) * delta[static_cast<std::size_t>(c)];
        for (index_t c = 0; c < 8; ++c) gradient[static_cast<std::size_t>(c)] += residual * layer.query(0, q, i, c);
      }
    }
    for (const double x : gradient) CHECK(std::abs(x) < 1e-10);
    CHECK(std::abs(delta[0]) > 1e-3);
  }
  CHECK(added > 0);
  // The kept entries are as they were, and a second call starts from them.
  for (index_t h = 0; h < 2; ++h) {
    const auto begin = static_cast<std::ptrdiff_t>(h * (made.kept.capacity() + 1) * 8);
    CHECK(std::equal(keys.begin() + begin, keys.begin() + begin + 8 * made.kept.lengths(0, h),
                     made.key_memory.begin() + begin));
  }
  const auto again = made.key_memory;
  const auto lengths = made.lengths;
  REQUIRE(run_summary(made, {.window = 6, .ridge = 0.05}).ok());
  CHECK(same_memory(again, made.key_memory));
  CHECK(lengths == made.lengths);
}

TEST_CASE("edges and errors of fits and summaries", "[merge][fit][summary]") {
  const arranged_layer<float> layer({.head_dim = 8, .tokens = 20, .queries = 4}, 25);
  // Nothing dropped, nothing kept.
  for (const int percent : {100, 0}) {
    random_engine random(1);
    const auto kept = keep_some(random, layer.view(), 2, percent);
    compacted_layer<float> made(layer, kept);
    const auto values = made.value_memory;
    REQUIRE(run_fit(made, {}).ok());
    CHECK(same_memory(values, made.value_memory));
    REQUIRE(run_summary(made, {}).ok());
    if (percent == 100) CHECK(made.lengths == std::vector<position_t>{20, 20});
    for (const float x : made.value_memory) CHECK(std::isfinite(x));
  }
  const auto kept = keep_where(1, 2, 20, [](index_t, index_t, index_t n) { return n % 2 == 0; });
  compacted_layer<float> made(layer, kept);
  check_error(run_fit(made, {.window = 0}), errc::invalid_argument, {0, 4096}, "window");
  check_error(run_fit(made, {.ridge = 0}), errc::invalid_argument, {0}, "ridge");
  check_error(run_summary(made, {.ridge = -1}), errc::invalid_argument, {-1}, "ridge");
  std::vector<std::byte> memory(64);
  check_error(restkv::fit_values(made.cache(), made.layer, {}, restkv::workspace(memory)), errc::workspace_too_small,
              {64}, "workspace");
  check_error(restkv::add_summary(made.cache(), made.layer, {}, restkv::workspace(memory)), errc::workspace_too_small,
              {64}, "workspace");
  auto without = made.cache();
  without.lengths = {};
  check_error(restkv::add_summary(without, made.layer, {}, restkv::workspace(memory)), errc::missing_input, {2},
              "lengths");
  auto full = made.cache();
  full.key.rows = full.key.rows.slice(2, 0, made.kept.lengths(0, 0));
  full.kept.positions = full.kept.positions.slice(2, 0, made.kept.lengths(0, 0));
  check_error(restkv::add_summary(full, made.layer, {}, restkv::workspace(memory)), errc::shape_mismatch,
              {made.kept.lengths(0, 0), made.kept.lengths(0, 0) + 1}, "room");
  auto shared = made.cache();
  restkv::owned_kept_tokens writable = kept;
  shared.kept = writable.kept();
  shared.lengths = writable.kept().lengths;
  check_error(restkv::add_summary(shared, made.layer, {}, restkv::workspace(memory)), errc::aliasing, {}, "lengths");
  auto no_query = made.layer;
  no_query.query = {};
  check_error(restkv::fit_values(made.cache(), no_query, {}, restkv::workspace(memory)), errc::missing_input, {32},
              "query");
  made.layer.value = restkv::tensor_view<const float, 4>{};
  check_error(run_fit(made, {}), errc::shape_mismatch, {0, 1}, "value");
}
