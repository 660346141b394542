// SPDX-License-Identifier: Apache-2.0
/// @file
/// `given_scores`: scores that somebody else computed.
#pragma once

#include <restkv/core/check_view.hpp>
#include <restkv/core/dtype.hpp>
#include <restkv/core/status.hpp>
#include <restkv/score/head_score.hpp>

namespace restkv {

/// What the rows of an array of scores belong to.
enum class score_rows {
  kv_heads,     ///< one row for each KV head
  query_heads,  ///< one row for each query head; a policy's group reduction makes one of a group's rows
};

/// score = an element of an array of the user's: an engine's own attention statistics, a learned gate, `kv_zip`.
/// Tokens are those of the layer's token axis, padding included, so that the array lies beside the cache. It may be
/// strided; a stride of 0 along the batch or the heads repeats.
///
/// NaN is chosen last, ties go to the smaller index. Cost: one read of a number a token; no scratch.
template <score_rows Rows = score_rows::kv_heads, element Element = float>
struct given_scores {
  tensor_view<const Element, 3> scores{};  ///< [batch, kv_heads or query_heads, tokens]

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::none;
  static constexpr bool per_query_head = Rows == score_rows::query_heads;

  [[nodiscard]] status check(const problem_shape& shape) const noexcept {
    const auto mismatch = [](const char* axis, index_t has, const char* relation, index_t want) {
      return status::error(errc::shape_mismatch, "scores has %lld %s, the plan needs %s%lld",
                           static_cast<long long>(has), axis, relation, static_cast<long long>(want));
    };
    if (scores.data == nullptr) return status::error(errc::missing_input, "given_scores has no array of scores");
    if (scores.extent(0) != shape.batch) return mismatch("sequences", scores.extent(0), "", shape.batch);
    const index_t heads = per_query_head ? shape.query_heads : shape.kv_heads;
    if (scores.extent(1) != heads) {
      return mismatch(per_query_head ? "query heads" : "KV heads", scores.extent(1), "", heads);
    }
    // A layer may have fewer tokens than its plan.
    if (scores.extent(2) < shape.tokens) return mismatch("tokens", scores.extent(2), "at least ", shape.tokens);
    return detail::check_view("scores", scores);
  }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> out, std::span<Real>) const noexcept {
    const index_t row = per_query_head ? head.query_head() : head.kv_head();
    const index_t begin = sequence(head.layer(), head.batch(), head.kv_head()).begin;
    for (index_t n = 0; n < head.length(); ++n) {
      out[static_cast<std::size_t>(n)] = widen<Real>(scores(head.batch(), row, begin + n));
    }
  }
  ///@}
};

}  // namespace restkv
