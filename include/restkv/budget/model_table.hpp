// SPDX-License-Identifier: Apache-2.0
/// @file
/// `model_table`: a number for each layer and head of a model, read by the rows of a kept set.
#pragma once

#include <restkv/budget/budget.hpp>
#include <restkv/core/check_view.hpp>

namespace restkv {

/// A table [layers, heads] of the caller's, which must live as long as what reads it. The rows of a kept set need not
/// be the table's heads: several heads of the table are taken together where the kept set has fewer (a table of query
/// heads, a set per KV head, or one that all heads share), and one head counts for several rows where it has more (one
/// column: the same for all heads of a layer).
template <class T>
struct model_table {
  tensor_view<const T, 2> values{};  ///< [layers, heads]

  constexpr model_table() = default;
  /// A dense table, one layer behind the other.
  constexpr model_table(const T* data, index_t layers, index_t heads) noexcept : values(data, {layers, heads}) {}
  /// A table in memory of your own, with any strides.
  constexpr model_table(const tensor_view<const T, 2>& view) noexcept  // NOLINT(google-explicit-constructor)
      : values(view) {}
  /// The same of elements that may be written.
  constexpr model_table(const tensor_view<T, 2>& view) noexcept
      : values(view) {}  // NOLINT(google-explicit-constructor)

  /// The table's heads that row h of `rows` stands for: [first, first + count).
  struct columns {
    index_t first = 0;  ///< first head of the table
    index_t count = 1;  ///< heads
  };
  /// See `columns`. For a table that `check` accepts.
  [[nodiscard]] constexpr columns columns_of(index_t h, index_t rows) const noexcept {
    const index_t heads = values.extent(1);
    return heads >= rows ? columns{h * (heads / rows), heads / rows} : columns{h / (rows / heads), 1};
  }

  /// That the table has the problem's layers, and heads that fit its rows; the message begins with `owner`.
  [[nodiscard]] status check(const char* owner, const budget_problem& problem) const noexcept {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    if (values.data == nullptr) return status::error(errc::missing_input, "%s is missing", owner);
    RESTKV_RETURN_IF_FAILED(detail::check_view(owner, values));
    if (values.extent(0) != problem.layers) {
      return status::error(errc::shape_mismatch, "%s has %lld layers, the model has %lld", owner, ll(values.extent(0)),
                           ll(problem.layers));
    }
    const index_t heads = values.extent(1);
    if (heads < 1 || problem.heads < 1 || (heads % problem.heads != 0 && problem.heads % heads != 0)) {
      return status::error(errc::shape_mismatch,
                           "%s has %lld heads, the kept set has %lld rows: one must be a multiple of the other", owner,
                           ll(heads), ll(problem.heads));
    }
    return {};
  }
  /// True where `check` accepts.
  [[nodiscard]] bool fits(const budget_problem& problem) const noexcept { return check("", problem).ok(); }
};

}  // namespace restkv
