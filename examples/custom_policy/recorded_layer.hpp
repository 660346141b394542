// SPDX-License-Identifier: Apache-2.0
/// @file
/// One layer of a recorded prompt, read from a safetensors file. Needs nlohmann/json.
#pragma once

#include <restkv/backend/eigen/output_metric.hpp>
#include <restkv/interop/safetensors.hpp>
#include <restkv/verify/future_error.hpp>

#include <string>
#include <vector>

/// Owns its tensors, in float. The views are valid as long as it lives.
class recorded_layer {
 public:
  /// Throws `restkv::error`.
  recorded_layer(const restkv::safetensors_file& file, const std::string& prefix)
      : query_(file, prefix + "q"),
        key_(file, prefix + "k"),
        value_(file, prefix + "v"),
        query_future_(file, prefix + "q_future"),
        key_future_(file, prefix + "k_future"),
        value_future_(file, prefix + "v_future") {
    restkv::tensor_view<float, 2> weights;
    restkv::throw_if_failed(file.convert(prefix + "wo", projection_, weights));
    prompt_.query = query_.view;
    prompt_.key = key_.view;
    prompt_.value = value_.view;
    prompt_.projection = weights;
    restkv::throw_if_failed(
        metric_.build(prompt_.projection, prompt_.query.extent(1), prompt_.query.extent(3)));
    prompt_.metric = metric_.view();
  }
  recorded_layer(const recorded_layer&) = delete;
  recorded_layer& operator=(const recorded_layer&) = delete;

  [[nodiscard]] const restkv::layer_view<float>& prompt() const noexcept { return prompt_; }
  [[nodiscard]] restkv::future_view<float> future() const noexcept {
    return {query_future_.view, key_future_.view, value_future_.view};
  }

 private:
  /// A tensor [heads, tokens, head_dim] of the file as a batch of one.
  struct tensor {
    tensor(const restkv::safetensors_file& file, const std::string& name) {
      restkv::tensor_view<float, 3> heads;
      restkv::throw_if_failed(file.convert(name, elements, heads));
      view = {elements.data(), {1, heads.extent(0), heads.extent(1), heads.extent(2)}};
    }
    std::vector<float> elements;
    restkv::tensor_view<const float, 4> view;
  };

  tensor query_, key_, value_, query_future_, key_future_, value_future_;
  std::vector<float> projection_;
  restkv::output_metric metric_;
  restkv::layer_view<float> prompt_;
};
