// SPDX-License-Identifier: Apache-2.0
// What the cache tests share: random kept sets, and layouts and loops of a user's own.
#pragma once

#include "support/check_error.hpp"
#include "support/guarded_tensor.hpp"
#include "support/random.hpp"

#include <restkv/core/dtype.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

namespace restkv_test {

using restkv::position_t;
using restkv::tensor_view;

/// An element whose three bytes are a value of no arithmetic type.
struct packed_code {
  unsigned char bytes[3];
};

/// A kept set with its memory. What is behind a head's length is no position at all.
class random_kept {
 public:
  random_kept(random_engine& random, index_t batch, index_t heads, index_t tokens, index_t capacity)
      : positions_(random, {batch, heads, capacity}, {}), lengths_(random, {batch, heads}, {}) {
    std::vector<position_t> all(static_cast<std::size_t>(tokens));
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        const index_t most = std::min(tokens, capacity);
        const index_t kind = pick(random, 0, 5);
        const index_t length = kind == 0   ? 0
                               : kind == 1 ? std::min<index_t>(1, most)
                               : kind == 2 ? most
                                           : pick(random, 0, most);
        std::iota(all.begin(), all.end(), position_t{0});
        if (kind != 3) std::shuffle(all.begin(), all.end(), random);  // 3: a prefix, nothing moves
        std::sort(all.begin(), all.begin() + length);
        for (index_t i = 0; i < capacity; ++i) {
          positions_.view()(b, h, i) = i < length           ? all[static_cast<std::size_t>(i)]
                                       : chance(random, 50) ? -7
                                                            : std::numeric_limits<position_t>::max();
        }
        lengths_.view()(b, h) = static_cast<position_t>(length);
      }
    }
  }

  [[nodiscard]] restkv::kept_tokens set() const { return {positions_.view(), lengths_.view()}; }
  [[nodiscard]] restkv::const_kept_tokens read() const { return set(); }

 private:
  guarded_tensor<position_t, 3> positions_;
  guarded_tensor<position_t, 2> lengths_;
};

/// Runs the rows from the last to the first, and counts them.
struct backward_for {
  mutable index_t rows = 0;
  template <class Body>
  void operator()(index_t n, const Body& body) const {
    for (index_t i = n; i-- > 0; ++rows) body(i);
  }
};

/// Key and value rows in pages of `page` slots; pages are handed out in any order.
template <class T>
struct paged_rows {
  using value_type = T;
  tensor_view<T, 3> pages{};                  ///< [pages, page, head_dim]
  std::vector<std::vector<index_t>> table{};  ///< [batch * heads][pages of the head]
  index_t sequences = 0;
  index_t heads_per_sequence = 0;

  [[nodiscard]] index_t batch() const { return sequences; }
  [[nodiscard]] index_t heads() const { return heads_per_sequence; }
  [[nodiscard]] index_t head_dim() const { return pages.extent(2); }
  [[nodiscard]] const std::vector<index_t>& pages_of(index_t b, index_t h) const {
    return table[static_cast<std::size_t>(b * heads_per_sequence + h)];
  }
  [[nodiscard]] index_t capacity(index_t b, index_t h) const {
    return static_cast<index_t>(pages_of(b, h).size()) * pages.extent(1);
  }
  [[nodiscard]] tensor_view<T, 1> row(index_t b, index_t h, index_t slot) const {
    const index_t page = pages_of(b, h)[static_cast<std::size_t>(slot / pages.extent(1))];
    return pages[page][slot % pages.extent(1)];
  }
  [[nodiscard]] restkv::byte_range touched() const { return restkv::touched_bytes(pages); }
  [[nodiscard]] restkv::status check() const { return {}; }
};

/// Deals the pages of a pool out to the heads of a kept set, enough for each head's length.
inline std::vector<std::vector<index_t>> deal_pages(random_engine& random, const restkv::const_kept_tokens& kept,
                                                    index_t page, index_t& pool) {
  std::vector<std::vector<index_t>> table;
  pool = 0;
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      const index_t needed = (kept.lengths(b, h) + page - 1) / page;
      std::vector<index_t> numbers(static_cast<std::size_t>(needed));
      std::iota(numbers.begin(), numbers.end(), pool);
      pool += needed;
      table.push_back(numbers);
    }
  }
  std::vector<index_t> renamed(static_cast<std::size_t>(pool));
  std::iota(renamed.begin(), renamed.end(), index_t{0});
  std::shuffle(renamed.begin(), renamed.end(), random);
  for (auto& numbers : table) {
    for (index_t& number : numbers) number = renamed[static_cast<std::size_t>(number)];
  }
  return table;
}

}  // namespace restkv_test
