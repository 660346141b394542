// SPDX-License-Identifier: Apache-2.0
/// @file
/// `keep_bytes`: a budget from the bytes that a cache may take.
#pragma once

#include <restkv/budget/budget.hpp>

#include <cstdint>
#include <limits>

namespace restkv {

/// What a token of a model's cache takes. The defaults are half precision without scales.
struct cache_bytes {
  index_t layers = 1;             ///< that share the budget
  index_t heads = 1;              ///< rows of the kept set: KV heads, or query heads where each has a set of its own
  index_t head_dim = 128;         ///< channels of a key and of a value
  index_t key_bits = 16;          ///< of a key's channel
  index_t value_bits = 16;        ///< of a value's channel
  index_t token_scale_bytes = 0;  ///< scales and zero points of a token and head, keys and values together
  index_t scale_group = 1;        ///< tokens that share the scales of `group_scale_bytes`
  index_t group_scale_bytes = 0;  ///< of each group of tokens of a head that is begun (per-channel keys: KIVI)

  /// Bytes of one head of one layer that keeps `tokens` tokens; the largest number where they are more.
  [[nodiscard]] constexpr std::uint64_t of_head(index_t tokens) const noexcept {
    const auto n = static_cast<std::uint64_t>(tokens);
    const std::uint64_t row = bytes_of(key_bits) + bytes_of(value_bits) + static_cast<std::uint64_t>(token_scale_bytes);
    const auto group = static_cast<std::uint64_t>(scale_group);
    const std::uint64_t groups = n / group + (n % group != 0 ? 1 : 0);
    return add(multiply(n, row), multiply(groups, static_cast<std::uint64_t>(group_scale_bytes)));
  }
  /// Bytes of the whole cache when every head keeps `tokens` tokens.
  [[nodiscard]] constexpr std::uint64_t of(index_t tokens) const noexcept {
    return multiply(of_head(tokens), multiply(static_cast<std::uint64_t>(layers), static_cast<std::uint64_t>(heads)));
  }

  /// Fails on a count below 1 and on negative bytes.
  [[nodiscard]] status check() const noexcept {
    const index_t counts[] = {layers, heads, head_dim, key_bits, value_bits, scale_group};
    const char* const names[] = {"layers", "heads", "head_dim", "key_bits", "value_bits", "scale_group"};
    constexpr index_t most = index_t(1) << 31;
    for (std::size_t i = 0; i < 6; ++i) {
      if (counts[i] >= 1 && counts[i] <= most) continue;
      return status::error(errc::invalid_argument, "cache_bytes.%s is %lld, must be within [1, %lld]", names[i],
                           static_cast<long long>(counts[i]), static_cast<long long>(most));
    }
    if (token_scale_bytes < 0 || group_scale_bytes < 0 || token_scale_bytes > most || group_scale_bytes > most) {
      return status::error(errc::invalid_argument,
                           "cache_bytes has scales of %lld bytes a token and %lld a group, must be within [0, %lld]",
                           static_cast<long long>(token_scale_bytes), static_cast<long long>(group_scale_bytes),
                           static_cast<long long>(most));
    }
    return {};
  }

 private:
  static constexpr std::uint64_t largest = std::numeric_limits<std::uint64_t>::max();
  [[nodiscard]] static constexpr std::uint64_t add(std::uint64_t a, std::uint64_t b) noexcept {
    return a > largest - b ? largest : a + b;
  }
  [[nodiscard]] static constexpr std::uint64_t multiply(std::uint64_t a, std::uint64_t b) noexcept {
    return b != 0 && a > largest / b ? largest : a * b;
  }
  /// Bytes of a row of channels; a row ends with a whole byte.
  [[nodiscard]] constexpr std::uint64_t bytes_of(index_t bits) const noexcept {
    return (multiply(static_cast<std::uint64_t>(head_dim), static_cast<std::uint64_t>(bits)) + 7) / 8;
  }
};

/// The largest count of tokens per head with which a cache takes no more than `bytes`: cache.of(tokens) <= bytes <
/// cache.of(tokens + 1). Allocators that move tokens between heads keep their number, hence the bytes (up to a group of
/// scales that is begun a head). 0 tokens, which every allocator's `check` refuses, where not even one fits or `cache`
/// does not pass its check.
[[nodiscard]] inline budget_size keep_bytes(std::uint64_t bytes, const cache_bytes& cache) noexcept {
  if (!cache.check().ok()) return budget_size(0);
  index_t fits = 0;
  index_t exceeds = index_t(std::numeric_limits<position_t>::max()) + 1;
  while (exceeds - fits > 1) {
    const index_t middle = fits + (exceeds - fits) / 2;
    (cache.of(middle) <= bytes ? fits : exceeds) = middle;
  }
  return budget_size(fits);
}

}  // namespace restkv
