// SPDX-License-Identifier: Apache-2.0
/// @file
/// `compare_top_k`: a selection kernel alone, on rows of scores.
#pragma once

#include <restkv/selection/order_key.hpp>
#include <restkv/verify/parity/arranged.hpp>
#include <restkv/verify/parity/numbers.hpp>
#include <restkv/verify/parity/run_cases.hpp>

#include <algorithm>
#include <concepts>
#include <numeric>
#include <span>
#include <vector>

namespace restkv::parity {

/// What a kernel for many rows is given. Rows lie `stride(0)` apart; their elements are contiguous.
struct top_k_call {
  tensor_view<const float, 2> scores{};          ///< [rows, tokens]
  tensor_view<const std::int32_t, 1> lengths{};  ///< [rows]; scores behind a row's length must not be looked at
  index_t k = 0;                                 ///< tokens to keep of each row, or all where it has fewer
  /// [rows, k], to be filled: min(k, length) indices of each row; what is behind them is the kernel's own
  tensor_view<position_t, 2> positions{};
};

/// What a kernel promises about the indices it writes.
struct top_k_promise {
  bool ascending = true;      ///< indices ascend
  bool smaller_index = true;  ///< among equal scores the smaller index is chosen; else any
};

namespace detail {

template <class F>
concept takes_one_row = std::invocable<F&, std::span<const float>, index_t, std::span<position_t>>;

/// What is wrong with the indices that one row was given; empty when nothing is.
[[nodiscard]] inline std::string compare_row(std::span<const float> scores, index_t k, std::span<const position_t> out,
                                             const top_k_promise& promise, tally& counts) {
  const auto length = static_cast<index_t>(scores.size());
  const index_t wanted = std::min(k, length);
  const auto key = [&](index_t n) { return order_key(scores[static_cast<std::size_t>(n)]); };
  const auto named = [&](index_t n) {
    return "index " + std::to_string(n) + " (score " +
           number_text(static_cast<double>(scores[static_cast<std::size_t>(n)])) + ")";
  };
  std::vector<index_t> order(static_cast<std::size_t>(length));
  std::iota(order.begin(), order.end(), index_t{0});
  std::sort(order.begin(), order.end(),
            [&](index_t a, index_t b) { return key(a) != key(b) ? key(a) > key(b) : a < b; });
  std::vector<bool> is_best(scores.size());
  for (index_t i = 0; i < wanted; ++i) is_best[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])] = true;

  std::vector<bool> is_given(scores.size());
  for (index_t i = 0; i < wanted; ++i) {
    const index_t n = out[static_cast<std::size_t>(i)];
    if (n < 0 || n >= length) {
      return "slot " + std::to_string(i) + " holds " + std::to_string(n) + ", the row has " + std::to_string(length) +
             " scores" + (n == -7 ? ": it was not written" : "");
    }
    if (is_given[static_cast<std::size_t>(n)]) return "index " + std::to_string(n) + " is there twice";
    is_given[static_cast<std::size_t>(n)] = true;
  }
  ++counts.sets_compared;
  // The best that is missing, and the worst that is there in its place.
  index_t missing = -1;
  index_t extra = -1;
  for (const index_t n : order) {
    const auto at = static_cast<std::size_t>(n);
    if (is_best[at] && !is_given[at] && missing < 0) missing = n;
    if (!is_best[at] && is_given[at]) extra = n;
  }
  if (missing >= 0) {
    const bool tie = key(missing) == key(extra);
    if (!tie || promise.smaller_index) {
      const float score = scores[static_cast<std::size_t>(extra)];
      return named(missing) + " is missing, " + named(extra) + " is there" +
             (tie                     ? ": ties go to the smaller index"
              : score != score        ? ": NaN ranks below every number"
              : missing == length - 1 ? ": the last score of the row was not seen"
                                      : "");
    }
    for (std::size_t n = 0; n < scores.size(); ++n) counts.near_ties += is_given[n] && !is_best[n] ? 1 : 0;
  }
  for (index_t i = 1; i < wanted && promise.ascending; ++i) {
    const position_t before = out[static_cast<std::size_t>(i - 1)];
    const position_t after = out[static_cast<std::size_t>(i)];
    if (before > after) {
      return "slot " + std::to_string(i) + " holds " + std::to_string(after) + " behind " + std::to_string(before) +
             ": indices do not ascend";
    }
  }
  return {};
}

}  // namespace detail

/// Checks a kernel that chooses the k best of each row: `mine(const top_k_call&)`, for all rows at once, or
/// `mine(std::span<const float> scores, index_t k, std::span<position_t> out)`, which fills the first min(k, size) of
/// `out`, for one.
///
/// The k best by the library's order (`order_key`): NaN below -inf, -0 equal to 0, ties to the smaller index. They are
/// compared exactly: there is no rounding in a choice. Scores behind a row's length are +inf, so that a kernel that
/// looks at them shows it; so does one that writes outside of its rows.
template <class Mine>
[[nodiscard]] report compare_top_k(Mine&& mine, const options& how = {}, const top_k_promise& promise = {}) {
  problem_space space;
  return run_cases("top k", space, how, [&](const problem& p, tally& counts, bool) -> std::string {
    const memory_order order = p.order == memory_order::gaps ? memory_order::gaps : memory_order::heads_tokens;
    constexpr float poison = std::numeric_limits<float>::infinity();
    // A row of scores is a row of channels here: [1, 1, rows, tokens].
    const arranged_tensor<float> scores(order, {1, 1, p.batch, p.tokens}, poison);
    const arranged_tensor<position_t> positions(order, {1, 1, p.batch, p.k}, -7);
    std::vector<std::int32_t> lengths;
    for (index_t r = 0; r < p.batch; ++r) lengths.push_back(static_cast<std::int32_t>(p.length_of(r)));
    scores.for_each([&](index_t, index_t, index_t row, index_t n, float& score) {
      if (n < p.length_of(row)) score = score_of(p, row, n);
    });
    const top_k_call call{scores.read()[0][0], {lengths.data(), {p.batch}}, p.k, positions.view()[0][0]};
    const auto row_of = [&](index_t r) {
      return std::span<const float>(call.scores[r].data,
                                    static_cast<std::size_t>(lengths[static_cast<std::size_t>(r)]));
    };
    const auto slots_of = [&](index_t r) {
      return std::span<position_t>(call.positions[r].data, static_cast<std::size_t>(p.k));
    };
    if constexpr (detail::takes_one_row<Mine>) {
      for (index_t r = 0; r < p.batch; ++r) mine(row_of(r), p.k, slots_of(r));
    } else {
      static_assert(std::invocable<Mine&, const top_k_call&>,
                    "a top-k kernel is called with a top_k_call, or with (span scores, index_t k, span out)");
      mine(call);
    }
    for (index_t r = 0; r < p.batch; ++r) {
      std::string wrong = detail::compare_row(row_of(r), p.k, slots_of(r), promise, counts);
      if (!wrong.empty()) return "row " + std::to_string(r) + " of " + std::to_string(p.batch) + ": " + wrong;
    }
    if (!positions.surroundings_intact()) return "something was written outside of the rows of indices";
    return {};
  });
}

}  // namespace restkv::parity
