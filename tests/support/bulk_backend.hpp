// SPDX-License-Identifier: Apache-2.0
// The Eigen backend with the primitives that take all rows at once, each in the plainest way: what `select` does on a
// bulk backend can then be compared with what it does row by row, on the same scores.
#pragma once

#include <restkv/backend/bulk.hpp>
#include <restkv/backend/eigen/backend.hpp>
#include <restkv/selection/top_k.hpp>

#include <algorithm>

namespace restkv_test {

class bulk_eigen_backend : public restkv::eigen_backend {
 public:
  using index_t = restkv::index_t;
  using pivot = restkv::top_k_pivot<std::uint32_t>;

  explicit bulk_eigen_backend(const restkv::eigen_tuning& tuning = {}) : eigen_backend(1, tuning) {}

  struct top_k_scratch {
    top_k_scratch(const bulk_eigen_backend&, const restkv::bulk_shape&, restkv::workspace&) noexcept {}
  };

  template <class Body>
  restkv::status for_each(index_t n, const Body& body) const {
    static_assert(std::is_trivially_copyable_v<Body>);
    for (index_t i = n; i-- > 0;) body(i);  // the order does not matter
    return {};
  }
  template <class T>
  restkv::status upload(T* to, std::span<const T> values) const {
    std::copy(values.begin(), values.end(), to);
    return {};
  }
  restkv::status find_pivots(top_k_scratch&, const std::uint32_t* keys, const restkv::bulk_rows& rows,
                             index_t rows_per_segment, const index_t* wanted, pivot* pivots) const {
    for (index_t s = 0; s < rows.count / rows_per_segment; ++s) {
      const index_t first = s * rows_per_segment;
      index_t longest = 0;
      for (index_t r = first; r < first + rows_per_segment; ++r) longest = std::max(longest, rows.units_of(r));
      pivots[s] = restkv::find_pivot<std::uint32_t>(
          rows_per_segment, longest,
          [&](index_t r, index_t n) {
            return n < rows.units_of(first + r) ? keys[rows.begin_of(first + r) + n] : restkv::excluded_key;
          },
          wanted[s]);
    }
    return {};
  }
  restkv::status count_chosen(top_k_scratch&, const std::uint32_t* keys, const restkv::bulk_rows& rows,
                              index_t rows_per_segment, const pivot* pivots, index_t* counts) const {
    for (index_t row = 0; row < rows.count; ++row) {
      const pivot& cut = pivots[row / rows_per_segment];
      index_t equal_before = 0;
      for (index_t r = row / rows_per_segment * rows_per_segment; r < row; ++r)
        equal_before += count_equal(keys, rows, r, cut);
      counts[row] = 0;
      for (index_t u = 0; u < rows.units_of(row); ++u) {
        const std::uint32_t key = keys[rows.begin_of(row) + u];
        if (key == restkv::excluded_key) continue;
        counts[row] += key > cut.key || (key == cut.key && equal_before++ < cut.equal) ? 1 : 0;
      }
    }
    return {};
  }
  restkv::status write_chosen(top_k_scratch&, const std::uint32_t* keys, const restkv::bulk_rows& rows,
                              const pivot* pivots, const restkv::bulk_kept& kept) const {
    for (index_t row = 0; row < rows.count; ++row) {
      const restkv::bulk_span& span = rows.span_of(row);
      index_t equal_left = pivots[row].equal;
      index_t written = 0;
      for (index_t u = 0; u < rows.units_of(row); ++u) {
        const std::uint32_t key = keys[rows.begin_of(row) + u];
        const bool chosen =
            key == restkv::excluded_key || key > pivots[row].key || (key == pivots[row].key && equal_left-- > 0);
        const index_t end = std::min<index_t>(span.length, (u + 1) * rows.unit);
        if (!chosen || written + end - u * rows.unit > kept.capacity) continue;
        for (index_t n = u * rows.unit; n < end; ++n, ++written) {
          for (index_t h = 0; h < kept.copies; ++h) {
            kept.positions[kept.begin_of(row * kept.copies + h) + written] =
                static_cast<restkv::position_t>(span.begin + n);
          }
        }
      }
      for (index_t h = 0; h < kept.copies; ++h) {
        kept.lengths[row * kept.copies + h] = static_cast<restkv::position_t>(written);
      }
    }
    return {};
  }

 private:
  static index_t count_equal(const std::uint32_t* keys, const restkv::bulk_rows& rows, index_t row, const pivot& cut) {
    const std::uint32_t* const first = keys + rows.begin_of(row);
    return cut.key == restkv::excluded_key ? 0 : std::count(first, first + rows.units_of(row), cut.key);
  }
};

static_assert(restkv::bulk_backend<bulk_eigen_backend>);

}  // namespace restkv_test
