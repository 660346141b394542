// SPDX-License-Identifier: Apache-2.0
/// @file
/// `decode_batch`: two sequences made of one recorded layer, with what the model wrote after them. Needs nlohmann/json.
#pragma once

#include "engine_cache.hpp"

#include <restkv/core/layer.hpp>
#include <restkv/interop/safetensors.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

/// A tensor that owns its elements.
template <class T>
struct owned_tensor {
  std::vector<T> elements;
  restkv::tensor_view<const T, 4> view;  ///< [batch, heads, tokens, head_dim]

  owned_tensor() = default;
  owned_tensor(const owned_tensor&) = delete;
  owned_tensor& operator=(const owned_tensor&) = delete;
};

/// The whole prompt, and as a second sequence its last part only. They have different lengths and lie on one token
/// axis, padded on the right with what is not a number: whoever reads padding shows it.
class decode_batch {
 public:
  static constexpr restkv::index_t sequences = 2;

  /// Throws `restkv::error`, and std::runtime_error for tensors that do not fit each other.
  decode_batch(const restkv::safetensors_file& file, const std::string& prefix) {
    read(file, prefix + "k", key_, true);
    read(file, prefix + "v", value_, true);
    read(file, prefix + "q", query_, false);
    read(file, prefix + "k_future", key_future_, false);
    read(file, prefix + "v_future", value_future_, false);
    read(file, prefix + "q_future", query_future_, false);
    const auto differs = [&](const owned_tensor<float>& a, const owned_tensor<float>& b, std::size_t axis) {
      return a.view.extent(axis) != b.view.extent(axis);
    };
    if (differs(key_, value_, 1) || differs(key_, value_, 2) || differs(query_future_, query_, 1) ||
        differs(key_, key_future_, 1) || differs(key_future_, value_future_, 1) ||
        differs(key_future_, value_future_, 2) || differs(key_future_, query_future_, 2)) {
      throw std::runtime_error(prefix + "*: other heads or tokens in q, k, v, q_future, k_future and v_future");
    }
    const auto tokens = static_cast<std::int32_t>(key_.view.extent(2));
    lengths_ = {tokens, shorter(tokens)};
  }

  /// What a policy looks at.
  [[nodiscard]] restkv::layer_view<float> layer() const noexcept {
    restkv::layer_view<float> layer;
    layer.query = query_.view;
    layer.key = key_.view;
    layer.value = value_.view;
    layer.lengths = {lengths_.data(), {sequences}};
    layer.pad = restkv::padding::right;
    return layer;
  }
  /// Tokens of each sequence.
  [[nodiscard]] const std::array<std::int32_t, sequences>& lengths() const noexcept { return lengths_; }
  [[nodiscard]] restkv::index_t future_tokens() const noexcept { return key_future_.view.extent(2); }

  /// The same in an engine's element type.
  template <class T>
  struct elements {
    owned_tensor<T> key, value, more_key, more_value, more_query;
  };
  template <class T>
  void convert(elements<T>& out) const {
    convert(key_, out.key);
    convert(value_, out.value);
    convert(key_future_, out.more_key);
    convert(value_future_, out.more_value);
    convert(query_future_, out.more_query);
  }

 private:
  static constexpr std::int32_t shorter(restkv::index_t tokens) noexcept {
    return static_cast<std::int32_t>(tokens - tokens / 3);
  }

  /// Reads a tensor [heads, tokens, head_dim] for both sequences. `prompt`: the second has only its last tokens.
  static void read(const restkv::safetensors_file& file, const std::string& name, owned_tensor<float>& out,
                   bool prompt) {
    restkv::tensor_view<float, 3> heads;
    std::vector<float> one;
    restkv::throw_if_failed(file.convert(name, one, heads));
    const restkv::index_t count = heads.extent(0);
    const restkv::index_t tokens = heads.extent(1);
    const restkv::index_t channels = heads.extent(2);
    const restkv::index_t cut = prompt ? tokens - shorter(tokens) : 0;
    out.elements.assign(static_cast<std::size_t>(sequences * heads.size()), std::numeric_limits<float>::quiet_NaN());
    std::copy(one.begin(), one.end(), out.elements.begin());
    for (restkv::index_t h = 0; h < count; ++h) {
      const auto head = one.begin() + h * tokens * channels;
      std::copy(head + cut * channels, head + tokens * channels,
                out.elements.begin() + heads.size() + h * tokens * channels);
    }
    out.view = {out.elements.data(), {sequences, count, tokens, channels}};
  }

  template <class T>
  static void convert(const owned_tensor<float>& from, owned_tensor<T>& out) {
    out.elements.clear();
    for (const float x : from.elements) out.elements.push_back(restkv::narrow<T>(x));
    out.view = {out.elements.data(), from.view.extents};
  }

  owned_tensor<float> query_, key_, value_, query_future_, key_future_, value_future_;
  std::array<std::int32_t, sequences> lengths_{};
};
