// SPDX-License-Identifier: Apache-2.0
// The case files of ReST-KV's release as layers and policies of the types that random tests use. The files'
// half-precision numbers are floats, exactly.
#pragma once

#include "policy/selection_support.hpp"
#include "support/test_data.hpp"

#include <filesystem>

namespace restkv_test {

/// One case file.
struct golden_layer {
  restkv::safetensors_file file;
  file_tensor<float, 3> query, key, value;
  file_tensor<float, 2> projection;
  restkv::output_metric metric;
  layer_view<float> view;
  any_policy<restkv::rest_kv> policy;

  explicit golden_layer(const std::string& path)
      : file(open_file(path)),
        query(file, "q"),
        key(file, "k"),
        value(file, "v"),
        projection(file, "wo"),
        metric(build_metric(projection.view, query.view.extent(0), query.view.extent(2))) {
    view.query = batched(query.view);
    view.key = batched(key.view);
    view.value = batched(value.view);
    view.metric = metric.view();
    const std::string settings(*file.find_metadata("case"));
    const auto has = [&](const char* text) { return settings.find(text) != std::string::npos; };
    const auto number = [&](const std::string& name) {
      const auto found = settings.find("\"" + name + "\": ");
      return found == std::string::npos ? 0.0 : std::stod(settings.substr(found + name.size() + 4));
    };
    policy.score.order = has("\"after\"") ? restkv::query_order::after : restkv::query_order::before;
    policy.score.metric_of_distance = has("\"use_wo\": true") ? restkv::metric::projection : restkv::metric::identity;
    policy.score.normalised = has("\"use_norm\": true");
    policy.window = static_cast<index_t>(number("window"));
    policy.protect = {.sink = 0, .recent = 0};
    policy.temporal.choice = restkv::mean{};
    if (has("\"ema\"")) policy.temporal.choice = restkv::ema{.alpha = static_cast<float>(number("alpha"))};
    const int width = static_cast<int>(number("kernel"));
    policy.spatial.choice = restkv::no_pool{};
    if (has("\"avgpool\"")) policy.spatial.choice = restkv::average_pool{.width = width};
    if (has("\"maxpool\"")) policy.spatial.choice = restkv::max_pool{.width = width};
    if (has("\"adaptive\"")) {
      policy.spatial.choice = restkv::adaptive_window{.min_width = width, .scale = static_cast<float>(number("scale"))};
    }
  }
};

/// Calls check(layer) for the case files, each with a fourth of the tokens before the window for every query head, and
/// with as many for heads that compete.
template <class Check>
void for_each_golden_layer(const Check& check) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(test_data("golden"))) {
    if (entry.path().filename().string().find("restkv-") != 0) continue;
    ++files;
    golden_layer layer(entry.path().string());
    CAPTURE(entry.path().string());
    layer.policy.group = restkv::group_reduce::none;
    const index_t tokens = layer.view.key.extent(2);
    const restkv::budget_size size(layer.policy.window + std::max<index_t>(1, (tokens - layer.policy.window) / 4));
    layer.policy.budget.choice = restkv::uniform{size};
    check(layer);
    layer.policy.group = restkv::group_reduce::l2;
    layer.policy.budget.choice = restkv::ada_kv{.budget = size};
    check(layer);
  }
  CHECK(files == 32);
}

}  // namespace restkv_test
