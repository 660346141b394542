// SPDX-License-Identifier: Apache-2.0
// Random attention layers of every kind of memory, padding and mask. Link with layer_metric.cpp; needs no test library.
#pragma once

#include "support/guarded_tensor.hpp"
#include "support/layer_metric.hpp"

#include <restkv/core/layer.hpp>

#include <cstdint>
#include <vector>

namespace restkv_test {

/// What a random layer should be like. Every member may be left as it is.
struct layer_recipe {
  index_t batch = 1;
  index_t kv_heads = 2;
  index_t group = 2;  ///< query heads per KV head
  index_t head_dim = 8;
  index_t tokens = 60;
  index_t query_rows = 16;
  index_t hidden = 24;     ///< rows of W_O; 0: no projection and no metric
  double sharpness = 1.5;  ///< standard deviation of the logits, about; large ones make sinks and underflow
  bool strided = false;    ///< random order of axes, gaps and negative strides instead of row-major tensors
  index_t chunks = 1;      ///< pieces of the key's token axis; the value is cut elsewhere
  bool padded = false;     ///< sequences of random length, 0 and all tokens among them
  restkv::padding pad = restkv::padding::left;
  int masked_percent = 0;  ///< part of the tokens that the keep mask protects; 0: no mask
};

/// A layer with its memory. Memory between and around the elements holds random bytes, padding tokens hold huge
/// numbers: whoever reads them shows it. Not copyable: the view points into it.
template <class T = float>
class random_layer {
 public:
  random_layer(random_engine& random, const layer_recipe& recipe)
      : query(random, {recipe.batch, recipe.kv_heads * recipe.group, recipe.query_rows, recipe.head_dim}, how(recipe)),
        key(random, {recipe.batch, recipe.kv_heads, recipe.tokens, recipe.head_dim}, how(recipe)),
        value(random, {recipe.batch, recipe.kv_heads, recipe.tokens, recipe.head_dim}, how(recipe)),
        projection(random, {recipe.hidden, recipe.kv_heads * recipe.group * recipe.head_dim}, how<2>(recipe)) {
    const auto set = [](T& element, double number) { element = restkv::narrow<T>(number); };
    for_each(query.view(), [&](T& element) { set(element, recipe.sharpness * normal(random)); });
    for_each(key.view(), [&](T& element) { set(element, normal(random)); });
    for_each(value.view(), [&](T& element) { set(element, normal(random)); });
    for_each(projection.view(), [&](T& element) { set(element, 0.3 * normal(random)); });
    view_.query = query.read();
    view_.key = chunked(random, key.read(), recipe.chunks, key_chunks_);
    view_.value = chunked(random, value.read(), recipe.chunks, value_chunks_);
    if (recipe.hidden > 0) {
      view_.projection = projection.read();
      std::vector<float> weights;
      for_each(projection.read(), [&](const T& weight) { weights.push_back(restkv::widen<float>(weight)); });
      metric = build_metric({weights.data(), projection.view().extents}, recipe.kv_heads * recipe.group,
                            recipe.head_dim);
      view_.metric = metric.view();
    }
    if (recipe.padded) {
      view_.pad = recipe.pad;
      for (index_t b = 0; b < recipe.batch; ++b) {
        const index_t kind = pick(random, 0, 4);
        lengths.push_back(static_cast<std::int32_t>(kind == 0   ? 0
                                                    : kind == 1 ? recipe.tokens
                                                                : pick(random, 0, recipe.tokens)));
      }
      if (lengths.empty()) lengths.resize(1);  // a pointer that is not null, for a batch of 0
      view_.lengths = {lengths.data(), {recipe.batch}};
      for (index_t b = 0; b < recipe.batch; ++b) {
        const auto span = restkv::sequence(view_, b, 0);
        for (index_t n = 0; n < recipe.tokens; ++n) {
          if (n >= span.begin && n < span.begin + span.length) continue;
          for (const auto* cache : {&key, &value}) {
            for_each(cache->view().slice(0, b, 1).slice(2, n, 1), [&](T& element) { set(element, 6e4); });
          }
        }
      }
    }
    if (recipe.masked_percent > 0) {
      keep_mask.resize(static_cast<std::size_t>(std::max<index_t>(recipe.batch * recipe.tokens, 1)));
      for (auto& bit : keep_mask) bit = chance(random, recipe.masked_percent) ? 1 : 0;
      view_.keep_mask = {keep_mask.data(), {recipe.batch, recipe.tokens}};
    }
  }
  random_layer(const random_layer&) = delete;
  random_layer& operator=(const random_layer&) = delete;

  [[nodiscard]] const restkv::layer_view<T>& view() const { return view_; }
  /// For tests that damage a layer.
  [[nodiscard]] restkv::layer_view<T>& view() { return view_; }

  guarded_tensor<T, 4> query;
  guarded_tensor<T, 4> key;
  guarded_tensor<T, 4> value;
  guarded_tensor<T, 2> projection;
  std::vector<std::int32_t> lengths{};
  std::vector<std::uint8_t> keep_mask{};
  restkv::output_metric metric{};

 private:
  using chunk_views = std::vector<tensor_view<const T, 4>>;

  template <std::size_t Rank = 4>
  static typename guarded_tensor<T, Rank>::options how(const layer_recipe& recipe) {
    return {.row_major = !recipe.strided, .reversed_axes = recipe.strided, .gaps = recipe.strided};
  }

  static restkv::chunked_tensor_view<const T> chunked(random_engine& random, const tensor_view<const T, 4>& whole,
                                                      index_t count, chunk_views& views) {
    if (count <= 1) return whole;
    index_t begin = 0;
    for (index_t i = 0; i < count; ++i) {
      const index_t left = whole.extent(2) - begin;
      const index_t size = i + 1 == count ? left : pick(random, 0, left);
      views.push_back(whole.slice(2, begin, size));
      begin += size;
    }
    return {views.data(), count};
  }

  chunk_views key_chunks_;
  chunk_views value_chunks_;
  restkv::layer_view<T> view_{};
};

}  // namespace restkv_test
