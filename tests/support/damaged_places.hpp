// SPDX-License-Identifier: Apache-2.0
// Where the numbers of a layer may be damaged: what backends must do with it is tested for each place.
#pragma once

#include "support/arranged_layer.hpp"

#include <functional>
#include <limits>

namespace restkv_test {

inline constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
inline constexpr float infinity = std::numeric_limits<float>::infinity();

/// The layer that is damaged, its window, and the tokens before that.
inline const layer_sizes damaged_sizes{.batch = 1,
                                       .query_heads = 4,
                                       .kv_heads = 2,
                                       .head_dim = 8,
                                       .tokens = 150,
                                       .queries = 6,
                                       .hidden = 24,
                                       .sharpness = 2.0};
inline constexpr index_t damaged_window = 5;
inline constexpr index_t damaged_past = 145;

/// One place, and how a number gets there.
struct place {
  const char* name;
  std::function<void(arranged_layer<float>&, float)> damage;
};

inline const place places[] = {{"one channel of a key", [](auto& l, float bad) { l.key(0, 1, 40, 3) = bad; }},
                               {"a whole key",
                                [](auto& l, float bad) {
                                  for (index_t c = 0; c < damaged_sizes.head_dim; ++c) l.key(0, 1, 40, c) = bad;
                                }},
                               {"a key of the window", [](auto& l, float bad) { l.key(0, 1, 147, 2) = bad; }},
                               {"all keys of the past",
                                [](auto& l, float bad) {
                                  for (index_t n = 0; n < damaged_past; ++n) l.key(0, 1, n, 2) = bad;
                                }},
                               {"a query", [](auto& l, float bad) { l.query(0, 3, 3, 1) = bad; }},
                               {"the newest query", [](auto& l, float bad) { l.query(0, 3, 5, 1) = bad; }},
                               {"a value", [](auto& l, float bad) { l.value(0, 1, 40, 3) = bad; }},
                               {"the first value", [](auto& l, float bad) { l.value(0, 1, 0, 0) = bad; }},
                               {"a value of the window", [](auto& l, float bad) { l.value(0, 1, 147, 3) = bad; }},
                               {"all values", [](auto& l, float bad) {
                                  for (index_t n = 0; n < damaged_sizes.tokens; ++n) l.value(0, 1, n, 1) = bad;
                                }}};

}  // namespace restkv_test
