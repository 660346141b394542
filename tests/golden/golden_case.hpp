// SPDX-License-Identifier: Apache-2.0
// Case files of published implementations' results, and the checks of a backend against them.
#pragma once

#include "support/layer_metric.hpp"
#include "support/selection_outcome.hpp"
#include "support/test_data.hpp"

#include <restkv/runtime_parts.hpp>

#include <nlohmann/json.hpp>

#include <memory>
#include <string>

namespace restkv_test {

using namespace restkv;

/// One case file: a layer of half-precision numbers, and what was asked.
struct golden_case {
  safetensors_file file;
  nlohmann::json settings;
  std::string margin;
  std::unique_ptr<file_tensor<half, 3>> q, k, v;
  std::unique_ptr<file_tensor<float, 2>> wo;
  output_metric metric;
  layer_view<half> layer;

  explicit golden_case(const std::string& name) : file(open_file(test_data("golden/" + name + ".safetensors"))) {
    settings = nlohmann::json::parse(*file.find_metadata("case"));
    margin = *file.find_metadata("margin");
    q = std::make_unique<file_tensor<half, 3>>(file, "q");
    k = std::make_unique<file_tensor<half, 3>>(file, "k");
    v = std::make_unique<file_tensor<half, 3>>(file, "v");
    wo = std::make_unique<file_tensor<float, 2>>(file, "wo");
    metric = build_metric({wo->storage.data(), wo->view.extents}, q->view.extent(0), q->view.extent(2));
    const auto batched = [](const file_tensor<half, 3>& tensor) {
      const auto& n = tensor.view.extents;
      return tensor_view<const half, 4>(tensor.storage.data(), {1, n[0], n[1], n[2]});
    };
    layer.query = batched(*q);
    layer.key = batched(*k);
    layer.value = batched(*v);
    layer.metric = metric.view();
  }

  [[nodiscard]] bool has(const std::string& tensor) const { return file.find("expected." + tensor) != nullptr; }

  template <class Score>
  [[nodiscard]] auto policy(const Score& score) const {
    const std::string spatial = settings.value("spatial", "none");
    const std::string temporal = settings.value("temporal", "mean");
    const int width = settings.value("kernel", 5);
    const index_t budget = settings.value("budget", 64);
    eviction_policy<Score, any_temporal, any_spatial, any_budget> made{
        .score = score, .window = settings.at("window"), .protect = {.sink = 0, .recent = 0}};
    if (temporal == "ema") made.temporal.choice = ema{.alpha = settings.at("alpha")};
    if (temporal == "sum") made.temporal.choice = sum{};
    if (spatial == "avgpool") made.spatial.choice = average_pool{.width = width};
    if (spatial == "maxpool") made.spatial.choice = max_pool{.width = width};
    if (spatial == "adaptive") {
      made.spatial.choice = adaptive_window{.min_width = width, .scale = settings.at("scale")};
    }
    made.group = settings.value("group", "none") == "mean" ? group_reduce::mean : group_reduce::none;
    made.budget.choice = uniform{budget};
    if (settings.at("method") == "adakv") {
      made.budget.choice =
          ada_kv{.budget = budget, .floor = settings.at("floor"), .normalise = settings.at("normalize")};
    }
    return made;
  }
  [[nodiscard]] rest_kv score() const {
    return {.order = settings.value("order", "before") == "after" ? query_order::after : query_order::before,
            .metric_of_distance = settings.value("use_wo", false) ? metric::projection : metric::identity,
            .tau = settings.value("tau", 1.0f),
            .normalised = settings.value("use_norm", false)};
  }
};

/// Scores within 1e-4 of each row's largest.
template <class Real>
void check_rows(const golden_case& test, const char* name, const std::vector<Real>& got, index_t tokens) {
  if (!test.has(name)) return;
  const file_tensor<double, 2> wanted(test.file, std::string("expected.") + name);
  for (index_t h = 0; h < wanted.view.extent(0); ++h) {
    double largest = 0;
    double error = 0;
    for (index_t n = 0; n < wanted.view.extent(1); ++n) {
      largest = std::max(largest, wanted.view(h, n));
      const double difference =
          std::fabs(wanted.view(h, n) - static_cast<double>(got[static_cast<std::size_t>(h * tokens + n)]));
      error = difference <= error ? error : difference;
    }
    CAPTURE(name, h);
    CHECK(largest > 0);
    CHECK(error <= 1e-4 * largest);
  }
}

/// Kept positions of the past; where pooling makes exact ties, the values there instead.
template <class Real>
void check_indices(const golden_case& test, const selection_outcome<Real>& got, index_t past) {
  if (!test.has("indices")) return;
  const double margin = std::stod(test.margin);
  const bool ties = margin == 0;
  REQUIRE((ties || margin > 1e-4));
  const file_tensor<index_t, 2> wanted(test.file, "expected.indices");
  for (index_t h = 0; h < wanted.view.extent(0); ++h) {
    std::vector<position_t> expected;
    for (index_t i = 0; i < wanted.view.extent(1); ++i) {
      expected.push_back(static_cast<position_t>(wanted.view(h, i)));
    }
    std::vector<position_t> kept = got.kept_of(0, h);
    REQUIRE(kept.size() == expected.size() + static_cast<std::size_t>(got.tokens - past));
    for (index_t n = past; n < got.tokens; ++n) {
      CHECK(kept[expected.size() + static_cast<std::size_t>(n - past)] == n);
    }
    kept.resize(expected.size());
    if (!ties) {
      CHECK(kept == expected);
      continue;
    }
    const auto values_at = [&](const std::vector<position_t>& positions) {
      std::vector<double> values;
      for (const position_t n : positions) {
        values.push_back(static_cast<double>(got.smoothed_of(0, h)[static_cast<std::size_t>(n)]));
      }
      std::sort(values.begin(), values.end());
      return values;
    };
    const auto mine = values_at(kept);
    const auto theirs = values_at(expected);
    for (std::size_t i = 0; i < mine.size(); ++i) CHECK(mine[i] == Approx(theirs[i]).epsilon(1e-4));
  }
}

template <class Backend, class Policy>
void check_case(const golden_case& test, const Policy& policy) {
  Backend backend;
  const auto outcome = select_tokens(backend, policy, test.layer);
  INFO(outcome.result.message());
  REQUIRE(outcome.result.ok());
  CHECK(select_tokens(backend, policy, test.layer, false).kept == outcome.kept);
  const index_t past = outcome.tokens - policy.window;
  check_rows(test, "score", outcome.score, outcome.tokens);
  check_rows(test, "smoothed", outcome.smoothed, outcome.tokens);
  check_indices(test, outcome, past);
  if (test.has("drift")) {
    const file_tensor<double, 1> drift(test.file, "expected.drift");
    const file_tensor<index_t, 1> width(test.file, "expected.kernel");
    const file_tensor<index_t, 1> shift(test.file, "expected.shift");
    const auto& window = std::get<adaptive_window>(policy.spatial.choice);
    for (index_t h = 0; h < outcome.heads; ++h) {
      const double t = outcome.drift[static_cast<std::size_t>(h)];
      CHECK(t == Approx(drift.view(h)).epsilon(1e-5).margin(1e-4));
      CHECK(window.width(t) == width.view(h));
      CHECK(window.shift(t) == shift.view(h));
    }
  }
  if (test.has("head_lengths")) {
    const file_tensor<index_t, 1> lengths(test.file, "expected.head_lengths");
    index_t total = 0;
    for (index_t h = 0; h < outcome.heads; ++h) {
      const auto kept = static_cast<index_t>(outcome.kept_of(0, h).size());
      total += kept;
      // The release rounds every head for itself, and its total may miss.
      CHECK(std::abs(kept - lengths.view(h)) <= 1);
    }
    CHECK(total == outcome.heads * test.settings.at("budget").get<index_t>());
  }
}

/// The same on each of the backends.
template <class... Backends, class Score>
void check_backends(const golden_case& test, const Score& score) {
  (check_case<Backends>(test, test.policy(score)), ...);
}

/// ReST-KV's release: scores, smoothed scores, drifts, widths, shifts and kept sets.
template <class... Backends>
void check_release() {
  int number = 0;
  int evicting = 0;
  for (const char* order : {"after", "before"}) {
    for (const char* target : {"wo", "v"}) {
      for (const char* temporal : {"ema", "mean"}) {
        for (const char* spatial : {"adaptive", "avgpool", "maxpool", "none"}) {
          const std::string digits = (number < 10 ? "0" : "") + std::to_string(number);
          const std::string name = "restkv-" + digits + "-" + order + "-" + target + "-" + temporal + "-" + spatial;
          INFO(name);
          const golden_case test(name);
          for (const char* tensor : {"score", "smoothed", "indices"}) REQUIRE(test.has(tensor));
          REQUIRE(test.has("drift") == (std::string(spatial) == "adaptive"));
          check_backends<Backends...>(test, test.score());
          evicting += test.settings.at("budget").get<index_t>() < test.layer.key.extent(2) ? 1 : 0;
          ++number;
        }
      }
    }
  }
  CHECK(number == 32);
  CHECK(evicting == 32);
}

/// CAOTE is rest_kv in the identity metric.
template <class... Backends>
void check_caote() {
  for (const char* name : {"caote-0", "caote-1", "caote-2"}) {
    INFO(name);
    const golden_case test(name);
    REQUIRE(test.has("score"));
    check_backends<Backends...>(test, test.score());
  }
}

/// SnapKV at query heads and at KV heads.
template <class... Backends>
void check_snap_kv() {
  for (const char* kind : {"snapkv-qhead-avgpool-", "snapkv-qhead-maxpool-", "snapkv-kvhead-"}) {
    for (const char* number : {"0", "1", "2"}) {
      INFO(kind << number);
      const golden_case test(std::string(kind) + number);
      REQUIRE(test.has("smoothed"));
      check_backends<Backends...>(test, snap_kv{});
    }
  }
}

/// Ada-KV's head lengths.
template <class... Backends>
void check_ada_kv() {
  for (const char* kind : {"floor20-norm-", "floor20-raw-", "floor50-norm-", "floor50-raw-"}) {
    for (const char* number : {"0", "1", "2"}) {
      INFO(kind << number);
      const golden_case test(std::string("adakv-") + kind + number);
      REQUIRE(test.has("head_lengths"));
      check_backends<Backends...>(test, snap_kv{});
    }
  }
}

}  // namespace restkv_test
