// SPDX-License-Identifier: Apache-2.0
/// @file
/// `recorded_model`: a `model` read from a trace. Needs nlohmann/json and Eigen.
#pragma once

#include "model.hpp"

#include <restkv/backend/eigen/output_metric.hpp>
#include <restkv/interop/safetensors.hpp>

#include <algorithm>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

namespace engine {

/// The layers of a trace, each a prompt and what the model wrote after it: layers.N.{q, k, v, wo} and .{q, k,
/// v}_future. Owns the tensors that its view shows.
class recorded_model {
 public:
  /// Throws `restkv::error`, and std::runtime_error for a file without layers or with layers that differ in shape.
  explicit recorded_model(const std::string& path) {
    restkv::safetensors_file file;
    restkv::throw_if_failed(restkv::safetensors_file::open(path, file));
    for (int number = 0; number < most_layers; ++number) {
      const std::string prefix = "layers." + std::to_string(number) + ".";
      if (file.find(prefix + "k") != nullptr) read(file, prefix);
    }
    if (view_.layers.empty()) throw std::runtime_error(path + " has no layers");
    const model_layer& first = view_.layers.front();
    view_.first_query = first.key.extent(1) - first.query.extent(1);
    for (const model_layer& layer : view_.layers) {
      if (layer.key.extents == first.key.extents && layer.value.extents == first.value.extents &&
          layer.query.extents == first.query.extents) {
        continue;
      }
      throw std::runtime_error(path + ": its layers have different shapes");
    }
  }
  recorded_model(const recorded_model&) = delete;
  recorded_model& operator=(const recorded_model&) = delete;

  [[nodiscard]] const model& view() const noexcept { return view_; }
  /// Tokens of the prompt; those behind were written by the model.
  [[nodiscard]] index_t prompt_tokens() const noexcept { return prompt_tokens_; }

 private:
  static constexpr int most_layers = 256;

  void read(const restkv::safetensors_file& file, const std::string& prefix) {
    model_layer layer;
    layer.key = join(file, prefix + "k");
    layer.value = join(file, prefix + "v");
    layer.query = join(file, prefix + "q");
    prompt_tokens_ = file.find(prefix + "k")->shape[1];
    std::vector<float>& weights = memory_.emplace_back();
    tensor_view<float, 2> projection;
    restkv::throw_if_failed(file.convert(prefix + "wo", weights, projection));
    layer.projection = projection;
    restkv::throw_if_failed(
        metrics_.emplace_back().build(layer.projection, layer.query.extent(0), layer.query.extent(2)));
    layer.metric = metrics_.back().view();
    view_.layers.push_back(layer);
  }

  /// A tensor [heads, tokens, head_dim] with what came after it behind its tokens.
  tensor_view<const float, 3> join(const restkv::safetensors_file& file, const std::string& name) {
    std::vector<float> before_memory;
    std::vector<float> after_memory;
    tensor_view<float, 3> before;
    tensor_view<float, 3> after;
    restkv::throw_if_failed(file.convert(name, before_memory, before));
    restkv::throw_if_failed(file.convert(name + "_future", after_memory, after));
    if (before.extent(0) != after.extent(0) || before.extent(2) != after.extent(2)) {
      throw std::runtime_error(name + " and " + name + "_future have other heads or channels");
    }
    std::vector<float>& joined = memory_.emplace_back();
    for (index_t h = 0; h < before.extent(0); ++h) {
      for (const tensor_view<float, 3>& part : {before, after}) {
        const tensor_view<float, 2> head = part[h];
        joined.insert(joined.end(), head.data, head.data + head.size());
      }
    }
    return {joined.data(), {before.extent(0), before.extent(1) + after.extent(1), before.extent(2)}};
  }

  std::deque<std::vector<float>> memory_;
  std::deque<restkv::output_metric> metrics_;
  model view_;
  index_t prompt_tokens_ = 0;
};

}  // namespace engine
