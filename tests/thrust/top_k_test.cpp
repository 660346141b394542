// SPDX-License-Identifier: Apache-2.0
// The batched top-k of Thrust backends against the library's own: pivots, counts and positions, ties and all.
#include "support/catch.hpp"
#include "support/random.hpp"

#include <restkv/backend/thrust/backend.cuh>

#include <algorithm>
#include <limits>
#include <new>
#include <string>
#include <vector>

using namespace restkv;
using namespace restkv_test;

namespace {

constexpr std::uint32_t most = std::numeric_limits<std::uint32_t>::max();

/// Rows of keys as a selection has them, with guards between the rows.
struct key_problem {
  std::vector<bulk_span> spans;
  std::vector<index_t> firsts;  // of rows that lie in another order
  std::vector<std::uint32_t> keys;
  bulk_rows rows;
  index_t units = 0;  ///< of the longest row
  index_t rows_per_segment = 1;

  explicit key_problem(random_engine& random) {
    constexpr index_t lengths[] = {0, 1, 2, 31, 32, 33, 100, 257, 1000};
    rows.rows_per_span = pick(random, 1, 3);
    const index_t span_count = pick(random, 1, 3);
    rows.count = rows.rows_per_span * span_count;
    rows.unit = chance(random, 60) ? 1 : pick(random, 2, 5);
    for (index_t i = 0; i < span_count; ++i) {
      bulk_span span{};
      span.begin = static_cast<position_t>(pick(random, 0, 9));
      span.length = static_cast<position_t>(lengths[pick(random, 0, 8)]);
      spans.push_back(span);
      units = std::max(units, (span.length + rows.unit - 1) / rows.unit);
    }
    rows.spans = spans.data();
    rows.stride = units + pick(random, 0, 3);
    for (index_t row = rows.count; row-- > 0;) firsts.push_back(row * rows.stride);
    if (chance(random, 50)) rows.firsts = firsts.data();
    rows_per_segment = chance(random, 50) ? 1 : rows.rows_per_span;
    keys.assign(static_cast<std::size_t>(rows.count * rows.stride), most);  // what nobody may count
    const index_t kind = pick(random, 0, 5);
    for (index_t row = 0; row < rows.count; ++row) {
      for (index_t u = 0; u < rows.units_of(row); ++u) {
        std::uint32_t& key = keys[static_cast<std::size_t>(rows.begin_of(row) + u)];
        key = static_cast<std::uint32_t>(random());
        if (kind == 1) key = 5;                            // all equal
        if (kind == 2) key = 100 + key % 5;                // five values
        if (kind == 3) key = 0xabcd0000u | (key & 0xffu);  // the same leading bits
        if (kind == 4) key = chance(random, 90) ? std::uint32_t{excluded_key} : key;
        if (kind == 5) key = chance(random, 50) ? most : 1 + key % 3;  // both ends
      }
    }
  }

  [[nodiscard]] std::uint32_t key(index_t row, index_t u) const {
    return u < rows.units_of(row) ? keys[static_cast<std::size_t>(rows.begin_of(row) + u)] : std::uint32_t{excluded_key};
  }
};

/// Carves a scratch and hands it to `use`; the memory was used before.
template <class Backend, class Use>
void with_scratch(const Backend& backend, const bulk_shape& shape, const Use& use) {
  workspace counting;
  typename Backend::top_k_scratch(backend, shape, counting);
  std::vector<std::byte> memory(counting.required_bytes(), std::byte{0x5a});
  workspace space(memory.data(), memory.size());
  typename Backend::top_k_scratch scratch(backend, shape, space);
  REQUIRE(space.check().ok());
  use(scratch);
}

template <class System>
void check_problem(random_engine& random) {
  const key_problem problem(random);
  const bulk_rows& rows = problem.rows;
  const thrust_backend<System> backend;
  // Memory for less than all rows at once, in half of the cases: slab by slab, or a segment in memory of its own.
  const bulk_shape at_once{chance(random, 50) ? rows.count : 1, problem.units};
  with_scratch(backend, at_once, [&](auto& scratch) {
    const index_t segments = rows.count / problem.rows_per_segment;
    CAPTURE(rows.count, rows.unit, rows.stride, problem.rows_per_segment, problem.units);
    std::vector<index_t> wanted;
    for (index_t s = 0; s < segments; ++s) {
      const index_t total = problem.rows_per_segment * problem.units;
      const index_t choices[] = {0, 1, total / 2, total - 1, total, total + 1, pick(random, -2, total + 5)};
      wanted.push_back(choices[pick(random, 0, 6)]);
    }
    std::vector<top_k_pivot<std::uint32_t>> pivots(static_cast<std::size_t>(segments));
    REQUIRE(
        backend.find_pivots(scratch, problem.keys.data(), rows, problem.rows_per_segment, wanted.data(), pivots.data())
            .ok());
    std::vector<index_t> counts(static_cast<std::size_t>(rows.count), -1);
    with_scratch(backend, {rows.count, problem.units}, [&](auto& whole) {
      REQUIRE(
          backend.count_chosen(whole, problem.keys.data(), rows, problem.rows_per_segment, pivots.data(), counts.data())
              .ok());
    });
    for (index_t s = 0; s < segments; ++s) {
      const auto at = static_cast<std::size_t>(s);
      const auto expected = find_pivot<std::uint32_t>(
          problem.rows_per_segment, problem.units,
          [&](index_t r, index_t u) { return problem.key(s * problem.rows_per_segment + r, u); }, wanted[at]);
      CAPTURE(s, wanted[at]);
      CHECK(pivots[at].key == expected.key);
      CHECK(pivots[at].greater == expected.greater);
      CHECK(pivots[at].equal == expected.equal);
      index_t equal_left = expected.equal;
      for (index_t row = s * problem.rows_per_segment; row < (s + 1) * problem.rows_per_segment; ++row) {
        index_t count = 0;
        for (index_t u = 0; u < rows.units_of(row); ++u) {
          const std::uint32_t key = problem.key(row, u);
          if (key == excluded_key) continue;
          count += key > expected.key || (key == expected.key && equal_left-- > 0) ? 1 : 0;
        }
        CHECK(counts[static_cast<std::size_t>(row)] == count);
      }
    }

    // The positions, with a pivot for each row.
    std::vector<index_t> of_rows;
    index_t capacity = 0;
    for (index_t row = 0; row < rows.count; ++row) {
      of_rows.push_back(pick(random, 0, rows.units_of(row) + 1));
      capacity = std::max<index_t>(capacity, rows.span_of(row).length);
    }
    pivots.resize(static_cast<std::size_t>(rows.count));
    REQUIRE(backend.find_pivots(scratch, problem.keys.data(), rows, 1, of_rows.data(), pivots.data()).ok());
    const index_t copies = pick(random, 1, 3);
    const auto room = static_cast<std::size_t>(rows.count * copies);
    std::vector<position_t> positions(room * static_cast<std::size_t>(capacity) + 1, -7);
    std::vector<position_t> lengths(room, -7);
    REQUIRE(backend
                .write_chosen(scratch, problem.keys.data(), rows, pivots.data(),
                              {positions.data(), lengths.data(), capacity, copies})
                .ok());
    for (index_t row = 0; row < rows.count; ++row) {
      std::vector<std::uint32_t> keys;
      for (index_t u = 0; u < rows.units_of(row); ++u) keys.push_back(problem.key(row, u));
      std::vector<position_t> chosen(keys.size());
      chosen.resize(static_cast<std::size_t>(top_k<std::uint32_t>(
          std::span<const std::uint32_t>(keys), of_rows[static_cast<std::size_t>(row)], chosen.data())));
      std::vector<position_t> expected;
      for (index_t u = 0; u < rows.units_of(row); ++u) {
        const bool in = keys[static_cast<std::size_t>(u)] == excluded_key ||
                        std::find(chosen.begin(), chosen.end(), static_cast<position_t>(u)) != chosen.end();
        const bulk_span& span = rows.span_of(row);
        for (index_t n = u * rows.unit; in && n < std::min<index_t>((u + 1) * rows.unit, span.length); ++n) {
          expected.push_back(static_cast<position_t>(span.begin + n));
        }
      }
      CAPTURE(row, of_rows[static_cast<std::size_t>(row)]);
      for (index_t copy = row * copies; copy < (row + 1) * copies; ++copy) {
        const auto length = lengths[static_cast<std::size_t>(copy)];
        REQUIRE(static_cast<std::size_t>(length) == expected.size());
        const auto first = positions.begin() + copy * capacity;
        CHECK(std::equal(expected.begin(), expected.end(), first));
        CHECK(std::all_of(first + length, first + capacity, [](position_t n) { return n == -7; }));
      }
    }
    CHECK(positions.back() == -7);
  });
}

}  // namespace

TEST_CASE("top-k on Thrust's sequential system is the library's") {
  random_engine random(31);
  for (int i = 0; i < 300; ++i) check_problem<thrust_cpp>(random);
}

TEST_CASE("top-k on Thrust's OpenMP system is the library's") {
  random_engine random(32);
  for (int i = 0; i < 100; ++i) check_problem<thrust_omp>(random);
}

TEST_CASE("a unit that would pass the capacity is left out") {
  const thrust_backend<thrust_cpp> backend;
  const bulk_span span{.begin = 3, .length = 10};
  const std::uint32_t keys[] = {0, 9, 0, 9};  // units of 3 tokens: 3, 3, 3 and 1
  const bulk_rows rows{.spans = &span, .count = 1, .rows_per_span = 1, .stride = 4, .unit = 3};
  with_scratch(backend, {1, 4}, [&](auto& scratch) {
    for (index_t capacity = 0; capacity < 12; ++capacity) {
      const top_k_pivot<std::uint32_t> everything{};
      std::vector<position_t> positions(12, -7);
      position_t length = -7;
      REQUIRE(backend.write_chosen(scratch, keys, rows, &everything, {positions.data(), &length, capacity, 1}).ok());
      const index_t fits = capacity >= 10 ? 10 : capacity / 3 * 3;
      CAPTURE(capacity);
      CHECK(length == fits);
      for (index_t i = 0; i < 12; ++i) {
        CHECK(positions[static_cast<std::size_t>(i)] == (i < fits ? static_cast<position_t>(3 + i) : -7));
      }
    }
  });
}

TEST_CASE("values of any number are uploaded in order") {
  const thrust_backend<thrust_omp> backend;
  for (const std::size_t count :
       {std::size_t{0}, std::size_t{1}, std::size_t{255}, std::size_t{256}, std::size_t{1000}}) {
    std::vector<index_t> values(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<index_t>(7 * i);
    std::vector<index_t> got(count + 1, -1);
    REQUIRE(backend.upload(got.data(), values).ok());
    CHECK(std::equal(values.begin(), values.end(), got.begin()));
    CHECK(got.back() == -1);
  }
}

namespace {

struct allocates_too_much {
  void operator()(index_t) const { throw std::bad_alloc(); }
};

}  // namespace

TEST_CASE("memory that Thrust does not get is a status") {
  const thrust_backend<thrust_cpp> backend;
  const status outcome = backend.for_each(3, allocates_too_much{});
  CHECK(outcome.code() == errc::out_of_memory);
  CHECK(std::string(outcome.message()).find("memory") != std::string::npos);
}
