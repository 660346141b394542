// SPDX-License-Identifier: Apache-2.0
// A layer of the size that inference engines meet, filled with data whose attention looks like a model's.
#pragma once

#include <restkv/backend/eigen/output_metric.hpp>
#include <restkv/core/layer.hpp>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace restkv_bench {

/// How attention is spread over the tokens. A benchmark that shows one of them only would flatter one algorithm.
enum class spread {
  concentrated,  ///< as in trained models: sinks, a heavy tail of tokens that all queries of the window attend to
  gaussian,      ///< independent normal numbers: attention nearly flat, the worst case for pruning
};

/// Llama-3-8B: 32 query heads, 8 KV heads, 128 channels, hidden size 4096; the last 32 queries.
struct attention_problem {
  static constexpr restkv::index_t query_heads = 32;
  static constexpr restkv::index_t kv_heads = 8;
  static constexpr restkv::index_t head_dim = 128;
  static constexpr restkv::index_t hidden = 4096;
  static constexpr restkv::index_t window = 32;

  attention_problem(restkv::index_t tokens, spread how)
      : query_(static_cast<std::size_t>(query_heads * window * head_dim)),
        key_(static_cast<std::size_t>(kv_heads * tokens * head_dim)),
        value_(key_.size()) {
    std::mt19937_64 bits(7);
    std::normal_distribution<float> normal;
    for (float& x : query_) x = normal(bits);
    for (float& x : key_) x = normal(bits);
    for (float& x : value_) x = normal(bits);
    if (how == spread::concentrated) {
      // Queries of a group share most of their direction, and keys have a component along it whose size is heavy-tailed;
      // the first token is a sink with a small value.
      std::exponential_distribution<float> tail(1.0f);
      std::vector<float> direction(head_dim);
      for (restkv::index_t h = 0; h < kv_heads; ++h) {
        for (float& x : direction) x = normal(bits);
        for (restkv::index_t i = 0; i < query_heads / kv_heads * window; ++i) {
          float* const row = query_.data() + (h * (query_heads / kv_heads) * window + i) * head_dim;
          for (restkv::index_t c = 0; c < head_dim; ++c) {
            row[c] = 0.8f * direction[static_cast<std::size_t>(c)] + 0.6f * row[c];
          }
        }
        for (restkv::index_t n = 0; n < tokens; ++n) {
          const float pull = n == 0 ? 1.2f : 0.11f * tail(bits);
          float* const row = key_.data() + (h * tokens + n) * head_dim;
          for (restkv::index_t c = 0; c < head_dim; ++c) row[c] += pull * direction[static_cast<std::size_t>(c)];
        }
        for (restkv::index_t c = 0; c < head_dim; ++c) value_[static_cast<std::size_t>(h * tokens * head_dim + c)] *= 0.05f;
      }
    }
    view.query = {query_.data(), {1, query_heads, window, head_dim}};
    view.key = restkv::tensor_view<const float, 4>(key_.data(), {1, kv_heads, tokens, head_dim});
    view.value = restkv::tensor_view<const float, 4>(value_.data(), {1, kv_heads, tokens, head_dim});
    view.metric = metric().view();
  }
  attention_problem(const attention_problem&) = delete;
  attention_problem& operator=(const attention_problem&) = delete;

  restkv::layer_view<float> view;

 private:
  /// W_O is a weight: prepared when a model is loaded, not for each prompt.
  static const restkv::output_metric& metric() {
    static const restkv::output_metric made = [] {
      std::mt19937_64 bits(11);
      std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(hidden)));
      std::vector<float> projection(static_cast<std::size_t>(hidden * query_heads * head_dim));
      for (float& x : projection) x = normal(bits);
      restkv::output_metric built;
      restkv::throw_if_failed(built.build(
          restkv::tensor_view<const float, 2>(projection.data(), {hidden, query_heads * head_dim}), query_heads,
          head_dim));
      return built;
    }();
    return made;
  }

  std::vector<float> query_;
  std::vector<float> key_;
  std::vector<float> value_;
};

}  // namespace restkv_bench
