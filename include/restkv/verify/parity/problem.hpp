// SPDX-License-Identifier: Apache-2.0
/// @file
/// `parity::problem`: one case of a comparison, as a value that prints as the line that makes it.
#pragma once

#include <restkv/core/counter_random.hpp>
#include <restkv/core/dtype.hpp>

#include <array>
#include <string>
#include <type_traits>

/// Comparing two implementations of the same thing on generated problems.
namespace restkv::parity {

/// Elements of queries, keys and values. Scores are float throughout.
enum class element_type : std::uint8_t { float32, float16, bfloat16 };

/// How numbers are distributed. Named after what it is meant to break.
enum class distribution : std::uint8_t {
  normal,                 ///< nothing in particular
  all_equal,              ///< every token the same: all ties
  five_values,            ///< every token one of five: ties everywhere, at the cut too
  leading_bits,           ///< numbers that agree in their leading bits: the first digits of a radix decide nothing
  dominant_token,         ///< one token that takes all of the attention but 1e-9 or so
  mostly_minus_infinity,  ///< nine tokens in ten without any weight
  non_finite,             ///< NaN of both signs, infinities, -0 and denormals among the numbers
  huge,                   ///< magnitudes near the end of the type's range, as far as sums of products fit into a float
};

/// How tensors lie in memory.
enum class memory_order : std::uint8_t {
  heads_tokens,  ///< [batch, heads, tokens, head_dim], dense
  tokens_heads,  ///< [batch, tokens, heads, head_dim], dense
  gaps,          ///< [batch, heads, tokens, head_dim + 3]; the gaps hold what must not be read
  reversed,      ///< as heads_tokens with the tokens in descending order of addresses: a negative stride
};

/// Which tokens of the token axis are a sequence's.
enum class sequence_lengths : std::uint8_t {
  whole,         ///< all
  left_padded,   ///< the last ones, a number of its own for each sequence
  right_padded,  ///< the first ones
};

/// One case. Every number in it follows from these members, and an element's number from `seed` and its own index
/// alone: a smaller problem with the same seed has the same numbers where it has elements.
struct problem {
  std::uint64_t seed = 1;                              ///< of the numbers
  index_t batch = 1;                                   ///< sequences, or rows of scores
  index_t kv_heads = 1;                                ///< heads of the cache
  index_t group = 1;                                   ///< query heads of each KV head
  index_t head_dim = 1;                                ///< channels of a head
  index_t tokens = 1;                                  ///< of the token axis
  index_t window = 1;                                  ///< queries that are observed
  index_t k = 1;                                       ///< tokens to keep, of each row
  element_type type = element_type::float32;           ///< of queries, keys and values
  distribution values = distribution::normal;          ///< of the numbers
  memory_order order = memory_order::heads_tokens;     ///< of the tensors
  sequence_lengths lengths = sequence_lengths::whole;  ///< of the sequences

  /// True where every member is the same.
  [[nodiscard]] constexpr bool operator==(const problem&) const = default;

  /// Query heads.
  [[nodiscard]] constexpr index_t query_heads() const noexcept { return kv_heads * group; }
  /// Tokens of sequence `b`: one in four is empty, one in four whole, where lengths differ at all.
  [[nodiscard]] constexpr index_t length_of(index_t b) const noexcept {
    const std::uint64_t bits = counter_bits(seed, 0x1e57, b);
    if (lengths == sequence_lengths::whole || (bits & 3u) == 1 || tokens == 0) return tokens;
    return (bits & 3u) == 0 ? 0 : static_cast<index_t>((bits >> 8) % static_cast<std::uint64_t>(tokens + 1));
  }
};

///@{
/// The name, as in the source.
[[nodiscard]] constexpr const char* name_of(element_type type) noexcept {
  constexpr std::array names{"float32", "float16", "bfloat16"};
  return names[static_cast<std::size_t>(type)];
}
[[nodiscard]] constexpr const char* name_of(distribution values) noexcept {
  constexpr std::array names{
      "normal",     "all_equal", "five_values", "leading_bits", "dominant_token", "mostly_minus_infinity",
      "non_finite", "huge"};
  return names[static_cast<std::size_t>(values)];
}
[[nodiscard]] constexpr const char* name_of(memory_order order) noexcept {
  constexpr std::array names{"heads_tokens", "tokens_heads", "gaps", "reversed"};
  return names[static_cast<std::size_t>(order)];
}
[[nodiscard]] constexpr const char* name_of(sequence_lengths lengths) noexcept {
  constexpr std::array names{"whole", "left_padded", "right_padded"};
  return names[static_cast<std::size_t>(lengths)];
}
///@}

/// The element type as a type: `element_of<element_type::float16>` is `half`.
template <element_type Type>
using element_of = std::conditional_t<Type == element_type::float32, float,
                                      std::conditional_t<Type == element_type::float16, half, bfloat16>>;

/// The C++ expression that makes a problem, on one line, without the members that are as they are by default.
[[nodiscard]] inline std::string to_string(const problem& p) {
  const problem plain;
  std::string text = "restkv::parity::problem{.seed = " + std::to_string(p.seed);
  const auto number = [&](const char* name, index_t value, index_t usual) {
    if (value != usual) text += std::string(", .") + name + " = " + std::to_string(value);
  };
  const auto choice = [&](const char* name, const char* type, auto value, auto usual) {
    if (value != usual) text += std::string(", .") + name + " = restkv::parity::" + type + "::" + name_of(value);
  };
  number("batch", p.batch, plain.batch);
  number("kv_heads", p.kv_heads, plain.kv_heads);
  number("group", p.group, plain.group);
  number("head_dim", p.head_dim, plain.head_dim);
  number("tokens", p.tokens, plain.tokens);
  number("window", p.window, plain.window);
  number("k", p.k, plain.k);
  choice("type", "element_type", p.type, plain.type);
  choice("values", "distribution", p.values, plain.values);
  choice("order", "memory_order", p.order, plain.order);
  choice("lengths", "sequence_lengths", p.lengths, plain.lengths);
  return text + "}";
}

}  // namespace restkv::parity
