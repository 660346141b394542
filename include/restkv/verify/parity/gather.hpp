// SPDX-License-Identifier: Apache-2.0
/// @file
/// `compare_gather`: a compaction kernel alone, on caches of every arrangement.
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/verify/parity/layer_data.hpp>
#include <restkv/verify/parity/run_cases.hpp>

#include <concepts>
#include <cstring>
#include <vector>

namespace restkv::parity {

/// What a compaction kernel is given: out(b, h, i) = source(b, h / group, kept.positions(b, h, i)) for every slot
/// i < kept.lengths(b, h), group = kept.heads() / source.extent(1).
template <element T>
struct gather_call {
  const_kept_tokens kept{};          ///< positions [batch, heads, capacity] and lengths [batch, heads]
  tensor_view<const T, 4> source{};  ///< [batch, kv_heads, tokens, head_dim], any strides
  tensor_view<T, 4> out{};           ///< [batch, heads, capacity, head_dim], any strides; slots behind a length stay
};

namespace detail {

template <class Mine>
struct gathers {
  template <class T>
  using of = std::bool_constant<std::invocable<Mine&, const gather_call<T>&>>;
};

template <element T, class Mine>
[[nodiscard]] std::string compare_gather_once(Mine& mine, const problem& p, tally& counts) {
  // Bytes that are no number of a distribution: a gather copies, whatever it copies.
  const arranged_tensor<T> source(p.order, {p.batch, p.kv_heads, p.tokens, p.head_dim}, T{});
  source.for_each([&](index_t b, index_t h, index_t n, index_t c, T& element) {
    const std::uint64_t bits = counter_bits(p.seed, 0x6a7, b, h, n, c);
    std::memcpy(static_cast<void*>(&element), &bits, sizeof element);
  });
  const index_t heads = p.query_heads();
  std::vector<position_t> positions(static_cast<std::size_t>(p.batch * heads * p.k), -1);
  std::vector<position_t> lengths(static_cast<std::size_t>(p.batch * heads));
  for (index_t row = 0; row < p.batch * heads; ++row) {
    // Ascending, and in runs: every token with the same chance, as long as there is room.
    const index_t length = p.length_of(row / heads);
    const index_t begin = p.lengths == sequence_lengths::left_padded ? p.tokens - length : 0;
    position_t& count = lengths[static_cast<std::size_t>(row)];
    const index_t wanted =
        std::min(p.k, length) - static_cast<index_t>(counter_bits(p.seed, 0x11, row) % 2) * (length > 0);
    for (index_t n = 0; n < length && count < wanted; ++n) {
      const index_t left = length - n;
      if (static_cast<index_t>(counter_bits(p.seed, 0x12, row, n / 3) % static_cast<std::uint64_t>(left)) <
          wanted - count) {
        positions[static_cast<std::size_t>(row * p.k + count++)] = static_cast<position_t>(begin + n);
      }
    }
  }
  T filler;
  std::memset(static_cast<void*>(&filler), 0x5a, sizeof filler);
  const arranged_tensor<T> out(p.order, {p.batch, heads, p.k, p.head_dim}, filler);
  const const_kept_tokens kept{{positions.data(), {p.batch, heads, p.k}}, {lengths.data(), {p.batch, heads}}};
  mine(gather_call<T>{kept, source.read(), out.view()});

  std::string wrong;
  out.for_each([&](index_t b, index_t h, index_t slot, index_t c, const T& element) {
    if (!wrong.empty()) return;
    ++counts.values_compared;
    const bool filled = slot < kept.lengths(b, h);
    const index_t position = filled ? kept.positions(b, h, slot) : -1;
    const T& expected = filled ? source.view()(b, h / p.group, position, c) : filler;
    if (std::memcmp(&element, &expected, sizeof(T)) == 0) return;
    wrong = "channel " + std::to_string(c) + " of slot " + std::to_string(slot) + ", head " + std::to_string(h) +
            ", sequence " + std::to_string(b);
    if (!filled) {
      wrong += ": the head keeps " + std::to_string(kept.lengths(b, h)) + " tokens, the slot behind them was written";
      return;
    }
    wrong += " is not that of token " + std::to_string(position);
    if (std::memcmp(&element, &filler, sizeof(T)) == 0) {
      wrong += ": it was not written";
      return;
    }
    // Where does it come from?
    bool found = false;
    source.for_each([&](index_t sb, index_t sh, index_t n, index_t sc, const T& other) {
      if (found || std::memcmp(&element, &other, sizeof(T)) != 0) return;
      found = true;
      wrong += ", but channel " + std::to_string(sc) + " of token " + std::to_string(n) + ", KV head " +
               std::to_string(sh) + " (instead of " + std::to_string(h / p.group) + "), sequence " + std::to_string(sb);
    });
  });
  if (wrong.empty() && !out.surroundings_intact())
    wrong = "something was written between or outside of the output's rows";
  return wrong;
}

}  // namespace detail

/// Checks a compaction kernel, `mine(const gather_call<T>&)` for T = float, half, bfloat16, as far as it can be called:
/// a kernel for half alone is tried with half alone. Copies are compared bit by bit; memory that is none of the
/// kernel's must stay as it is.
template <class Mine>
[[nodiscard]] report compare_gather(Mine&& mine, const options& how = {}) {
  using kernel = detail::gathers<std::remove_reference_t<Mine>>;
  problem_space space;
  space.has_heads = true;
  space.has_queries = true;
  space.usual_window = 1;
  space.types = {kernel::template of<float>::value, kernel::template of<half>::value,
                 kernel::template of<bfloat16>::value};
  static_assert(
      kernel::template of<float>::value || kernel::template of<half>::value || kernel::template of<bfloat16>::value,
      "a compaction kernel is called with a gather_call<float>, <half> or <bfloat16>");
  space.work = [](const problem& p) {
    return 16.0 * static_cast<double>(p.batch * p.query_heads()) * static_cast<double>((p.tokens + p.k) * p.head_dim);
  };
  return run_cases("gather", space, how, [&](const problem& p, tally& counts, bool) -> std::string {
    return with_element<kernel::template of>(
        p.type, [&]<class T>(std::type_identity<T>) { return detail::compare_gather_once<T>(mine, p, counts); });
  });
}

}  // namespace restkv::parity
