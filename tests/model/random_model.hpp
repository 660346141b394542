// SPDX-License-Identifier: Apache-2.0
// Models of a few random layers, and policies and budgets for them.
#pragma once

#include "support/arranged_layer.hpp"

#include <restkv/policy.hpp>

#include <deque>
#include <vector>

namespace restkv_test {

using namespace restkv;

/// A model's layers, random, of the same sizes.
struct random_model {
  layer_sizes sizes;
  std::deque<arranged_layer<float>> layers;
  std::vector<std::uint8_t> mask;                       // [batch, tokens]
  std::vector<std::int32_t> lengths;                    // [batch]
  std::vector<std::vector<std::int32_t>> head_lengths;  // [layers][batch, kv_heads]
  std::vector<index_t> axes;  // [layers], tokens of the layers that have fewer than sizes.tokens
  padding pad = padding::left;

  random_model(random_engine& random, index_t count, const layer_sizes& how) : sizes(how) {
    for (index_t l = 0; l < count; ++l) {
      sizes.sharpness = uniform_real(random, 0.5, 4);
      layers.emplace_back(sizes, static_cast<unsigned>(random()));
    }
  }
  [[nodiscard]] layer_view<float> view(index_t l) const {
    layer_view<float> made = layers[static_cast<std::size_t>(l)].view();
    if (!axes.empty()) {
      const index_t tokens = axes[static_cast<std::size_t>(l)];
      made.key = made.key.chunk(0).slice(2, 0, tokens);
      made.value = made.value.chunk(0).slice(2, 0, tokens);
    }
    if (!mask.empty()) made.keep_mask = {mask.data(), {sizes.batch, sizes.tokens}};
    if (!lengths.empty()) made.lengths = {lengths.data(), {sizes.batch}};
    if (!head_lengths.empty()) {
      made.head_lengths = {head_lengths[static_cast<std::size_t>(l)].data(), {sizes.batch, sizes.kv_heads}};
    }
    made.pad = pad;
    return made;
  }
  [[nodiscard]] index_t count() const { return std::ssize(layers); }
};

template <class Policy>
Policy random_policy(random_engine& random) {
  Policy policy;
  policy.window = pick(random, 1, 8);
  policy.protect = {.sink = pick(random, 0, 3), .recent = pick(random, 0, 6)};
  policy.spatial.width = chance(random, 50) ? 1 : 5;
  constexpr group_reduce groups[] = {group_reduce::none, group_reduce::mean, group_reduce::max};
  policy.group = groups[pick(random, 0, 2)];
  policy.granularity.tokens = chance(random, 60) ? 1 : pick(random, 2, 5);
  if (policy.group != group_reduce::none) policy.granularity.shared = chance(random, 20);
  return policy;
}

inline budget_size random_size(random_engine& random, index_t tokens) {
  return chance(random, 30) ? budget_size::keep_ratio(uniform_real(random, 0.2, 1))
                            : budget_size(pick(random, 6, tokens + 5));
}

inline random_model random_layers(random_engine& random, int kind) {
  layer_sizes sizes{.batch = pick(random, 1, 2),
                    .query_heads = 4,
                    .kv_heads = 2,
                    .head_dim = 6,
                    .tokens = pick(random, 10, 40),
                    .queries = 10};
  random_model model(random, pick(random, 1, 6), sizes);
  if (kind == 1) {  // masks
    for (index_t i = 0; i < sizes.batch * sizes.tokens; ++i) model.mask.push_back(chance(random, 10) ? 1 : 0);
  } else if (kind == 2) {  // padding
    for (index_t b = 0; b < sizes.batch; ++b) {
      model.lengths.push_back(static_cast<std::int32_t>(pick(random, 0, sizes.tokens)));
    }
    model.pad = chance(random, 50) ? padding::left : padding::right;
  } else if (kind == 3) {  // heads of different lengths
    std::vector<std::int32_t> head_lengths;
    for (index_t i = 0; i < sizes.batch * 2; ++i) {
      head_lengths.push_back(static_cast<std::int32_t>(pick(random, 0, sizes.tokens)));
    }
    for (index_t l = 0; l < model.count(); ++l) model.head_lengths.push_back(head_lengths);
  }
  return model;
}

}  // namespace restkv_test
