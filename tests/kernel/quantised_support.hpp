// SPDX-License-Identifier: Apache-2.0
// Random quantised caches of every format, in guarded memory.
#pragma once

#include "support/guarded_tensor.hpp"

#include <restkv/cache/quantised_view.hpp>

#include <cmath>

namespace restkv_test {

using namespace restkv;

/// What a quantised cache should be like.
struct quantised_recipe {
  index_t batch = 1, heads = 1, tokens = 1, channels = 1, tokens_per_group = 1, channels_per_group = 1;
  code_format format{};
  quantisation_kind kind = quantisation_kind::symmetric;

  quantised_recipe() = default;
  quantised_recipe(random_engine& random, index_t turn) {
    constexpr index_t of_tokens[] = {1, 2, 3, 4, 8, 32};
    constexpr index_t of_channels[] = {1, 4, 5, 1000, 32};
    batch = pick(random, 1, 2);
    heads = pick(random, 1, 3);
    tokens = pick(random, 1, 70);
    channels = pick(random, 1, 40);
    tokens_per_group = of_tokens[turn % 6];
    channels_per_group = std::min(of_channels[turn % 5], channels);
    format.bits = 1 << (1 + turn % 3);
    kind = static_cast<quantisation_kind>(turn / 2 % 3);
    format.is_signed = kind == quantisation_kind::symmetric || chance(random, 50);
    format.packed = chance(random, 50) ? cache_axis::channels : cache_axis::tokens;
  }
  [[nodiscard]] static index_t groups(index_t count, index_t of) { return (count + of - 1) / of; }
};

/// A cache of random codes and parameters.
template <class Scale>
struct quantised_memory {
  quantised_recipe how;
  guarded_tensor<std::uint8_t, 4> codes;
  guarded_tensor<Scale, 4> scale;
  guarded_tensor<Scale, 4> second;

  quantised_memory(random_engine& random, const quantised_recipe& made, bool plain)
      : how(made),
        codes(random,
              made.format.packed == cache_axis::channels
                  ? std::array<index_t, 4>{made.batch, made.heads, made.tokens, made.format.bytes(made.channels)}
                  : std::array<index_t, 4>{made.batch, made.heads, made.format.bytes(made.tokens), made.channels},
              {.contiguous_channels = plain, .row_major = plain, .gaps = !plain}),
        scale(random, parameters(), {.gaps = !plain}),
        second(random, parameters(), {.gaps = !plain}) {
    const auto fill = [&](Scale& x) { x = narrow<Scale>(normal(random)); };
    for_each(scale.view(), [&](Scale& x) { x = narrow<Scale>(std::abs(normal(random))); });
    for_each(second.view(), fill);
  }
  [[nodiscard]] std::array<index_t, 4> parameters() const {
    return {how.batch, how.heads, quantised_recipe::groups(how.tokens, how.tokens_per_group),
            quantised_recipe::groups(how.channels, how.channels_per_group)};
  }
  [[nodiscard]] quantised_view<Scale> view() const {
    quantised_view<Scale> made{.codes = codes.view(),
                               .scale = scale.view(),
                               .tokens = how.tokens,
                               .channels = how.channels,
                               .tokens_per_group = how.tokens_per_group,
                               .channels_per_group = how.channels_per_group,
                               .format = how.format};
    if (how.kind == quantisation_kind::zero) made.zero = second.view();
    if (how.kind == quantisation_kind::offset) made.offset = second.view();
    return made;
  }
  [[nodiscard]] bool same_bytes(const quantised_memory& other) const {
    return codes.same_bytes(other.codes) && scale.same_bytes(other.scale) && second.same_bytes(other.second);
  }
};

}  // namespace restkv_test
