// SPDX-License-Identifier: Apache-2.0
// Random quantised caches of every format, in guarded memory.
#pragma once

#include "support/guarded_tensor.hpp"
#include "support/quantised_recipe.hpp"

#include <cmath>

namespace restkv_test {

using namespace restkv;

/// The recipe of a turn: every format and grouping comes in its turn.
inline quantised_recipe random_recipe(random_engine& random, index_t turn) {
  quantised_recipe made;
  constexpr index_t of_tokens[] = {1, 2, 3, 4, 8, 32};
  constexpr index_t of_channels[] = {1, 4, 5, 1000, 32};
  made.batch = pick(random, 1, 2);
  made.heads = pick(random, 1, 3);
  made.tokens = pick(random, 1, 70);
  made.channels = pick(random, 1, 40);
  made.tokens_per_group = of_tokens[turn % 6];
  made.channels_per_group = std::min(of_channels[turn % 5], made.channels);
  made.format.bits = 1 << (1 + turn % 3);
  made.kind = static_cast<quantisation_kind>(turn / 2 % 3);
  made.format.is_signed = made.kind == quantisation_kind::symmetric || chance(random, 50);
  made.format.packed = chance(random, 50) ? cache_axis::channels : cache_axis::tokens;
  return made;
}

/// A cache of random codes and parameters.
template <class Scale>
struct quantised_memory {
  quantised_recipe how;
  guarded_tensor<std::uint8_t, 4> codes;
  guarded_tensor<Scale, 4> scale;
  guarded_tensor<Scale, 4> second;

  quantised_memory(random_engine& random, const quantised_recipe& made, bool plain)
      : how(made),
        codes(random, made.codes(), {.contiguous_channels = plain, .row_major = plain, .gaps = !plain}),
        scale(random, made.parameters(), {.gaps = !plain}),
        second(random, made.parameters(), {.gaps = !plain}) {
    const auto fill = [&](Scale& x) { x = narrow<Scale>(normal(random)); };
    for_each(scale.view(), [&](Scale& x) { x = narrow<Scale>(std::abs(normal(random))); });
    for_each(second.view(), fill);
  }
  [[nodiscard]] quantised_view<Scale> view() const {
    return quantised_view_of<Scale>(how, codes.view(), scale.view(), second.view());
  }
  [[nodiscard]] bool same_bytes(const quantised_memory& other) const {
    return codes.same_bytes(other.codes) && scale.same_bytes(other.scale) && second.same_bytes(other.second);
  }
};

}  // namespace restkv_test
