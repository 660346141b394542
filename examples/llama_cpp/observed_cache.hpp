// SPDX-License-Identifier: Apache-2.0
/// @file
/// `observed_cache`: queries, keys and values of every layer, as llama.cpp's evaluation callback hands them over.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <restkv/core/layer.hpp>

#include <charconv>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

/// A copy of what is in llama.cpp's cache, in the order of its tokens: its interface does not show the cache itself.
/// Keys and queries are those after RoPE. Give `callback` and this object to the context (`cb_eval`,
/// `cb_eval_user_data`).
class observed_cache {
 public:
  using index_t = restkv::index_t;

  observed_cache(index_t layers, index_t query_heads, index_t kv_heads, index_t head_dim, index_t window)
      : query_heads_(query_heads),
        kv_heads_(kv_heads),
        head_dim_(head_dim),
        window_(window),
        layers_(static_cast<std::size_t>(layers)) {}
  observed_cache(const observed_cache&) = delete;  // the context holds its address
  observed_cache& operator=(const observed_cache&) = delete;

  /// What llama.cpp asks before each node of its graph, and calls after those that were wanted.
  static bool callback(ggml_tensor* node, bool ask, void* cache) {
    auto& self = *static_cast<observed_cache*>(cache);
    const index_t layer = self.layer_of(*node);
    if (layer < 0) return !ask;
    if (!ask) self.store(*node, self.layers_[static_cast<std::size_t>(layer)]);
    return true;
  }

  [[nodiscard]] index_t layers() const noexcept { return static_cast<index_t>(layers_.size()); }
  /// Tokens that every layer has. Throws std::runtime_error where layers differ: the model names its tensors otherwise,
  /// or they are not of type float.
  [[nodiscard]] index_t tokens() const {
    const auto row = static_cast<std::size_t>(kv_heads_ * head_dim_);
    const std::size_t elements = layers_.front().key.size();
    for (const stored& layer : layers_) {
      if (layer.key.size() == elements && layer.value.size() == elements && !layer.query.empty()) continue;
      throw std::runtime_error("layers were seen with " + std::to_string(elements / row) + " and " +
                               std::to_string(layer.key.size() / row) + " keys and " +
                               std::to_string(layer.value.size() / row) + " values");
    }
    return static_cast<index_t>(elements / row);
  }

  /// A layer for a policy. Valid until tokens are added or dropped.
  [[nodiscard]] restkv::layer_view<float> view(index_t layer) const {
    const stored& from = layers_[static_cast<std::size_t>(layer)];
    const auto tensor = [&](const std::vector<float>& rows, index_t heads) {
      const index_t count = static_cast<index_t>(rows.size()) / (heads * head_dim_);
      return restkv::tensor_view<const float, 4>(rows.data(), {1, heads, count, head_dim_},
                                                 {0, head_dim_, heads * head_dim_, 1});
    };
    restkv::layer_view<float> made;
    made.query = tensor(from.query, query_heads_);
    made.key = tensor(from.key, kv_heads_);
    made.value = tensor(from.value, kv_heads_);
    return made;
  }

  /// Drops all tokens but those at `kept`, ascending, from every layer.
  void keep(const std::vector<restkv::position_t>& kept) {
    const auto row = static_cast<std::size_t>(kv_heads_ * head_dim_);
    for (stored& layer : layers_) {
      for (std::vector<float>* const rows : {&layer.key, &layer.value}) {
        for (std::size_t i = 0; i < kept.size(); ++i) {
          std::memmove(rows->data() + i * row, rows->data() + static_cast<std::size_t>(kept[i]) * row,
                       row * sizeof(float));
        }
        rows->resize(kept.size() * row);
      }
    }
  }

 private:
  struct stored {
    std::vector<float> query;  // [at most window, query_heads, head_dim], the newest
    std::vector<float> key;    // [tokens, kv_heads, head_dim]
    std::vector<float> value;  // [tokens, kv_heads, head_dim]
  };

  /// The layer whose queries, keys or values a node computes, -1 for all others. Nodes are named "Qcur-12"; those of
  /// queries and keys before RoPE have the same name, and so have values before they are split into heads.
  [[nodiscard]] index_t layer_of(const ggml_tensor& node) const {
    const std::string_view name(node.name);
    if (name.size() < 6 || name.substr(1, 4) != "cur-") return -1;
    const bool query = name[0] == 'Q';
    if (!query && name[0] != 'K' && name[0] != 'V') return -1;
    if (name[0] != 'V' && node.op != GGML_OP_ROPE) return -1;
    if (node.ne[0] != head_dim_ || node.ne[1] != (query ? query_heads_ : kv_heads_)) return -1;
    index_t layer = -1;
    std::from_chars(name.data() + 5, name.data() + name.size(), layer);
    return layer < layers() ? layer : -1;
  }

  /// Appends the tokens of one batch. [head_dim, heads, tokens], the first axis contiguous
  void store(const ggml_tensor& node, stored& layer) {
    if (node.type != GGML_TYPE_F32) return;  // `tokens` says so: nothing may be thrown through llama.cpp
    bytes_.resize(ggml_nbytes(&node));
    ggml_backend_tensor_get(&node, bytes_.data(), 0, bytes_.size());
    const char kind = node.name[0];
    std::vector<float>& rows = kind == 'Q' ? layer.query : kind == 'K' ? layer.key : layer.value;
    for (index_t n = 0; n < node.ne[2]; ++n) {
      for (index_t h = 0; h < node.ne[1]; ++h) {
        const std::size_t at = rows.size();
        rows.resize(at + static_cast<std::size_t>(head_dim_));
        std::memcpy(rows.data() + at,
                    bytes_.data() + static_cast<std::size_t>(n) * node.nb[2] + static_cast<std::size_t>(h) * node.nb[1],
                    static_cast<std::size_t>(head_dim_) * sizeof(float));
      }
    }
    const auto most = static_cast<std::size_t>(window_ * query_heads_ * head_dim_);
    if (kind == 'Q' && rows.size() > most) rows.erase(rows.begin(), rows.end() - static_cast<std::ptrdiff_t>(most));
  }

  index_t query_heads_;
  index_t kv_heads_;
  index_t head_dim_;
  index_t window_;
  std::vector<stored> layers_;
  std::vector<unsigned char> bytes_;
};
