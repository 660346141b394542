// SPDX-License-Identifier: Apache-2.0
/// @file
/// `given_attention`: an attention matrix that somebody else computed.
#pragma once

#include <restkv/core/check_view.hpp>
#include <restkv/core/dtype.hpp>
#include <restkv/score/given_scores.hpp>
#include <restkv/smoothing/temporal.hpp>

namespace restkv {

/// score = the temporal reduction of a column of an attention matrix of the user's, for engines whose attention kernel
/// returns its rows. `attention` holds the rows of each sequence's last queries, oldest first, over the tokens of the
/// layer's token axis, padding included; row i of w belongs to the query of token length - w + i, and what it does not see
/// is not read. A token is scored by the rows that see it, as `observed_attention` does: with `sum` H2O, with `last` TOVA.
///
/// A policy's own temporal smoother does not act: it is here. NaN is chosen last. Cost: one read of the matrix.
template <temporal_smoother Temporal = mean, element Element = float>
struct given_attention {
  tensor_view<const Element, 4> attention{};  ///< [batch, query_heads, queries, tokens]
  Temporal temporal{};                        ///< over the rows that see a token

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::none;
  static constexpr bool per_query_head = true;

  [[nodiscard]] status check() const noexcept {
    if constexpr (requires { { temporal.check() } -> std::same_as<status>; }) return temporal.check();
    return {};
  }
  [[nodiscard]] status check(const problem_shape& shape) const noexcept {
    const auto mismatch = [](const char* axis, index_t has, const char* relation, index_t want) {
      return status::error(errc::shape_mismatch, "attention has %lld %s, the plan needs %s%lld",
                           static_cast<long long>(has), axis, relation, static_cast<long long>(want));
    };
    if (attention.data == nullptr) return status::error(errc::missing_input, "given_attention has no matrix");
    if (attention.extent(0) != shape.batch) return mismatch("sequences", attention.extent(0), "", shape.batch);
    if (attention.extent(1) != shape.query_heads) {
      return mismatch("query heads", attention.extent(1), "", shape.query_heads);
    }
    if (attention.extent(3) < shape.tokens) return mismatch("tokens", attention.extent(3), "at least ", shape.tokens);
    return detail::check_view("attention", attention);
  }

  [[nodiscard]] constexpr index_t scratch_size(const problem_shape&) const noexcept { return attention.extent(2); }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const index_t rows = std::min(attention.extent(2), head.length());
    const index_t first_row = attention.extent(2) - rows;
    const index_t begin = sequence(head.layer(), head.batch(), head.kv_head()).begin;
    const auto matrix = attention[head.batch()][head.query_head()];
    for (index_t n = 0; n < head.length(); ++n) {
      const index_t unseen = std::max<index_t>(0, n - (head.length() - rows));  // rows before the token
      for (index_t i = unseen; i < rows; ++i) {
        scratch[static_cast<std::size_t>(i)] = widen<Real>(matrix(first_row + i, begin + n));
      }
      const auto column = scratch.subspan(static_cast<std::size_t>(unseen), static_cast<std::size_t>(rows - unseen));
      scores[static_cast<std::size_t>(n)] = static_cast<Real>(temporal(std::span<const Real>(column)));
    }
  }
  ///@}
};

}  // namespace restkv
