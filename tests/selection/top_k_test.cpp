// SPDX-License-Identifier: Apache-2.0
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/selection/top_k.hpp>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

using namespace restkv_test;
using restkv::excluded_key;
using restkv::find_pivot;
using restkv::order_key;
using restkv::position_t;
using restkv::tensor_view;
using restkv::top_k;

namespace {

template <class Key>
using score_of = std::conditional_t<sizeof(Key) == 4, float, double>;

enum class kind {
  normal,
  equal,
  five_values,
  same_leading_bits,
  mostly_lowest,
  some_nan,
  denormal,
  any_key,
  excluded,
  end
};

template <class Key>
std::vector<Key> random_keys(random_engine& random, kind which, index_t length) {
  using real = score_of<Key>;
  constexpr real infinity = std::numeric_limits<real>::infinity();
  constexpr real not_a_number = std::numeric_limits<real>::quiet_NaN();
  const auto some_number = [&] { return static_cast<real>(normal(random)); };
  std::vector<Key> keys(static_cast<std::size_t>(length));
  for (Key& key : keys) {
    switch (which) {
      case kind::normal: key = order_key(some_number()); break;
      case kind::equal: key = order_key(real(0.5)); break;
      case kind::five_values: key = order_key(static_cast<real>(pick(random, 0, 4))); break;
      case kind::same_leading_bits:  // only the lowest byte differs
        key = static_cast<Key>(order_key(real(1.5)) + static_cast<Key>(pick(random, 0, 255)));
        break;
      case kind::mostly_lowest: key = order_key(chance(random, 90) ? -infinity : some_number()); break;
      case kind::some_nan: key = order_key(chance(random, 40) ? not_a_number : some_number()); break;
      case kind::denormal:
        key = order_key(static_cast<real>(pick(random, -20, 20)) * std::numeric_limits<real>::denorm_min());
        break;
      case kind::any_key: key = static_cast<Key>((std::uint64_t{random()} << 32) | random()); break;
      case kind::excluded:
      case kind::end:
        key = chance(random, 60) ? Key{excluded_key} : order_key(static_cast<real>(pick(random, 0, 3)));
        break;
    }
  }
  return keys;
}

/// The k largest keys by a stable sort: among equal ones the smaller index. Ascending.
template <class Key>
std::vector<position_t> by_sorting(const std::vector<Key>& keys, index_t k) {
  std::vector<position_t> order;
  for (std::size_t n = 0; n < keys.size(); ++n) {
    if (keys[n] != excluded_key) order.push_back(static_cast<position_t>(n));
  }
  std::stable_sort(order.begin(), order.end(), [&](position_t a, position_t b) {
    return keys[static_cast<std::size_t>(a)] > keys[static_cast<std::size_t>(b)];
  });
  order.resize(std::min(order.size(), static_cast<std::size_t>(std::max<index_t>(k, 0))));
  std::sort(order.begin(), order.end());
  return order;
}

template <class Key>
std::vector<position_t> chosen(const std::vector<Key>& keys, index_t k) {
  std::vector<position_t> out(std::min(keys.size(), static_cast<std::size_t>(std::max<index_t>(k, 0))) + 1, -7);
  const index_t count = top_k<Key>(keys, k, out.data());
  REQUIRE(count >= 0);
  REQUIRE(count < static_cast<index_t>(out.size()));
  CHECK(out[static_cast<std::size_t>(count)] == -7);  // nothing is written beyond
  out.resize(static_cast<std::size_t>(count));
  return out;
}

template <class Key>
void check_properties(const std::vector<Key>& keys, index_t k) {
  const auto kept = chosen(keys, k);
  CHECK(kept == by_sorting(keys, k));
  // Said once more by properties, which do not rest on the sort above.
  const auto candidates =
      static_cast<index_t>(keys.size()) - std::count(keys.begin(), keys.end(), Key{excluded_key});
  CHECK(static_cast<index_t>(kept.size()) == std::min(std::max<index_t>(k, 0), candidates));
  std::vector<bool> is_kept(keys.size());
  position_t previous = -1;
  for (const position_t n : kept) {
    CHECK(n > previous);
    previous = n;
    REQUIRE(n < static_cast<position_t>(keys.size()));
    is_kept[static_cast<std::size_t>(n)] = true;
  }
  for (std::size_t in = 0; in < keys.size(); ++in) {
    for (std::size_t out = 0; is_kept[in] && out < keys.size(); ++out) {
      if (is_kept[out] || keys[out] == excluded_key) continue;
      if (keys[in] < keys[out] || (keys[in] == keys[out] && in > out)) FAIL("kept " << in << " before " << out);
    }
  }
  const auto more = chosen(keys, k + 1);
  CHECK(std::includes(more.begin(), more.end(), kept.begin(), kept.end()));
}

/// The pivot of several rows, by its definition.
template <class Key>
void check_pivot(const std::vector<Key>& keys, index_t rows, index_t k) {
  const index_t length = static_cast<index_t>(keys.size()) / rows;
  const auto pivot = find_pivot<Key>(tensor_view<const Key, 2>(keys.data(), {rows, length}), k);
  index_t greater = 0;
  index_t equal = 0;
  for (const Key key : keys) {
    greater += key != excluded_key && key > pivot.key ? 1 : 0;
    equal += key != excluded_key && key == pivot.key ? 1 : 0;
  }
  const auto candidates = std::ssize(keys) - std::count(keys.begin(), keys.end(), Key{excluded_key});
  CAPTURE(rows, length, k, pivot.key, pivot.greater, pivot.equal, greater, equal, candidates);
  CHECK(pivot.greater == greater);
  CHECK(pivot.equal >= 0);
  CHECK(pivot.equal <= equal);
  CHECK(pivot.greater + pivot.equal == std::min(std::max<index_t>(k, 0), candidates));
  if (k > 0 && k <= candidates) CHECK(pivot.equal > 0);  // the k-th largest key itself
}

}  // namespace

TEMPLATE_TEST_CASE("top_k is the stable sort's beginning, in order of position", "", std::uint32_t, std::uint64_t) {
  random_engine random(1);
  for (int which = 0; which < static_cast<int>(kind::end); ++which) {
    for (int trial = 0; trial < 60; ++trial) {
      const index_t length = trial < 9 ? trial / 3 : pick(random, 0, 80);
      const auto keys = random_keys<TestType>(random, static_cast<kind>(which), length);
      CAPTURE(which, trial, length);
      check_properties(keys, pick(random, 0, length + 2));
      for (const index_t k : {index_t{0}, index_t{1}, length - 1, length, length + 1, index_t{-3}}) {
        check_properties(keys, k);
      }
    }
  }
}

TEMPLATE_TEST_CASE("lengths around k and around a tile", "", std::uint32_t, std::uint64_t) {
  random_engine random(2);
  const index_t k = 33;
  for (const index_t length : {0, 1, 32, 33, 34, 95, 96, 97, 191, 192, 193, 511, 512, 513}) {
    for (const kind which : {kind::normal, kind::equal, kind::five_values}) {
      CAPTURE(length, static_cast<int>(which));
      check_properties(random_keys<TestType>(random, which, length), k);
    }
  }
}

TEMPLATE_TEST_CASE("a long row, every digit of the key deciding", "", std::uint32_t, std::uint64_t) {
  random_engine random(3);
  for (const kind which : {kind::any_key, kind::same_leading_bits, kind::normal}) {
    const auto keys = random_keys<TestType>(random, which, 20000);
    for (const index_t k : {1, 2, 777, 10000, 19999, 20000}) {
      CAPTURE(static_cast<int>(which), k);
      CHECK(chosen(keys, k) == by_sorting(keys, k));
    }
  }
}

TEMPLATE_TEST_CASE("the pivot splits several rows where it says", "", std::uint32_t, std::uint64_t) {
  random_engine random(4);
  for (int which = 0; which < static_cast<int>(kind::end); ++which) {
    for (int trial = 0; trial < 100; ++trial) {
      const index_t rows = pick(random, 1, 5);
      const index_t length = pick(random, 0, 40);
      const auto keys = random_keys<TestType>(random, static_cast<kind>(which), rows * length);
      CAPTURE(which);
      check_pivot(keys, rows, pick(random, -1, rows * length + 3));
    }
  }
}

TEST_CASE("rows may have any strides") {
  random_engine random(5);
  const auto keys = random_keys<std::uint32_t>(random, kind::five_values, 7 * 30);
  std::vector<std::uint32_t> transposed(keys.size());
  for (std::size_t r = 0; r < 7; ++r) {
    for (std::size_t n = 0; n < 30; ++n) transposed[(29 - n) * 7 + r] = keys[r * 30 + n];
  }
  for (index_t k = 0; k < 212; ++k) {
    const auto dense = find_pivot<std::uint32_t>(tensor_view<const std::uint32_t, 2>(keys.data(), {7, 30}), k);
    const auto strided = find_pivot<std::uint32_t>(
        tensor_view<const std::uint32_t, 2>(transposed.data() + 29 * 7, {7, 30}, {1, -7}), k);
    CHECK(dense.key == strided.key);
    CHECK(dense.greater == strided.greater);
    CHECK(dense.equal == strided.equal);
  }
}
