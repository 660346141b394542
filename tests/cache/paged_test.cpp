// SPDX-License-Identifier: Apache-2.0
#include "cache/cache_support.hpp"

#include <restkv/cache/compact.hpp>
#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_gather.hpp>
#include <restkv/cache/paged_sequence.hpp>

#include <array>
#include <cstring>

using namespace restkv_test;
using restkv::chunked_tensor_view;
using restkv::dense_layout;
using restkv::errc;
using restkv::gather_tokens;
using restkv::page_t;
using restkv::paged_layout;
using restkv::status;

namespace {

/// Tables whose pages are dealt out of a shuffled pool, `spare` pages left over.
struct dealt_tables {
  std::vector<page_t> ids;
  std::vector<position_t> lengths;
  restkv::page_tables tables;
  index_t pages = 0;

  dealt_tables(random_engine& random, index_t batch, index_t count, index_t page_size,
               const std::vector<position_t>& tokens, index_t spare = 2)
      : lengths(tokens) {
    index_t most = 1;
    for (const position_t length : lengths) {
      most = std::max(most, restkv::pages_of(length, page_size));
      pages += restkv::pages_of(length, page_size);
    }
    std::vector<page_t> free(static_cast<std::size_t>(pages + spare));
    pages += spare;
    std::iota(free.begin(), free.end(), page_t{0});
    if (chance(random, 70)) std::shuffle(free.begin(), free.end(), random);
    ids.assign(static_cast<std::size_t>(batch * count * most), 12345);
    std::size_t next = 0;
    for (std::size_t t = 0; t < lengths.size(); ++t) {
      for (index_t i = 0; i < restkv::pages_of(lengths[t], page_size); ++i) {
        ids[t * static_cast<std::size_t>(most) + static_cast<std::size_t>(i)] = free[next++];
      }
    }
    tables = {{ids.data(), {batch, count, most}}, {lengths.data(), {batch, count}}};
  }
};

struct paged_shape {
  index_t batch, tables, heads_per_page, page_size, head_dim;
  std::vector<position_t> lengths;

  explicit paged_shape(random_engine& random)
      : batch(pick(random, 0, 3)),
        tables(chance(random, 50) ? 1 : pick(random, 1, 3)),
        heads_per_page(pick(random, 1, 3)),
        page_size(chance(random, 25) ? 1 : pick(random, 2, 7)),
        head_dim(chance(random, 10) ? pick(random, 0, 1) : pick(random, 2, 9)) {
    for (index_t t = 0; t < batch * tables; ++t) {
      lengths.push_back(static_cast<position_t>(chance(random, 10) ? 0 : pick(random, 1, 40)));
    }
  }
  [[nodiscard]] index_t heads() const { return tables * heads_per_page; }
};

/// A pool of pages that says so, with one reference for each page of the tables.
struct counted_pool {
  std::vector<std::byte> memory;
  restkv::page_pool pool;

  counted_pool(index_t pages, index_t allocated) : memory(restkv::page_pool::required_bytes(pages)) {
    REQUIRE(pool.reset(pages, restkv::workspace(memory)).ok());
    for (page_t page = 0; page < allocated; ++page) {
      page_t taken = restkv::no_page;
      REQUIRE(pool.allocate(taken).ok());
      REQUIRE(taken == page);
    }
  }
};

/// A kept set in arrays that a test writes down.
struct written_kept {
  std::vector<position_t> positions;
  std::vector<position_t> lengths;
  index_t capacity = 0;

  explicit written_kept(const std::vector<std::vector<position_t>>& heads) {
    for (const auto& head : heads) capacity = std::max(capacity, static_cast<index_t>(head.size()));
    for (const auto& head : heads) {
      lengths.push_back(static_cast<position_t>(head.size()));
      positions.insert(positions.end(), head.begin(), head.end());
      positions.resize(static_cast<std::size_t>(capacity) * lengths.size(), -1);
    }
  }
  [[nodiscard]] restkv::const_kept_tokens set() const {
    const auto heads = static_cast<index_t>(lengths.size());
    return {{positions.data(), {1, heads, capacity}}, {lengths.data(), {1, heads}}};
  }
};

}  // namespace

TEMPLATE_TEST_CASE("tokens come out of pages and go into pages", "", float, packed_code) {
  using T = TestType;
  random_engine random(21 + sizeof(T));
  for (int trial = 0; trial < 400; ++trial) {
    const paged_shape s(random);
    const dealt_tables from(random, s.batch, s.tables, s.page_size, s.lengths);
    CAPTURE(trial, s.batch, s.tables, s.heads_per_page, s.page_size, s.head_dim, from.pages);
    const guarded_tensor<T, 4> pool(
        random, {from.pages, s.heads_per_page, s.page_size, s.head_dim},
        {.contiguous_channels = chance(random, 60), .reversed_axes = chance(random, 30), .gaps = chance(random, 50)});
    const paged_layout<const T> source{pool.read(), from.tables};
    REQUIRE(source.check().ok());
    const auto at = [&](index_t b, index_t h, index_t n, index_t c) -> const T& {
      const index_t table = h / s.heads_per_page;
      const auto page =
          from.ids[static_cast<std::size_t>((b * s.tables + table) * from.tables.most_pages() + n / s.page_size)];
      return pool.read()(page, h % s.heads_per_page, n % s.page_size, c);
    };
    const auto length_of = [&](index_t b, index_t h) {
      return from.lengths[static_cast<std::size_t>(b * s.tables + h / s.heads_per_page)];
    };
    position_t longest = 0;
    for (const position_t length : s.lengths) longest = std::max(longest, length);

    // All tokens.
    const guarded_tensor<T, 4> whole(random, {s.batch, s.heads(), longest + 1, s.head_dim}, {.reversed_axes = true});
    const guarded_tensor<T, 4> whole_expected(whole);
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < s.heads(); ++h) {
        for (index_t n = 0; n < length_of(b, h); ++n) {
          for (index_t c = 0; c < s.head_dim; ++c) whole_expected.view()(b, h, n, c) = at(b, h, n, c);
        }
      }
    }
    REQUIRE(restkv::copy_pages(source, whole.view()).ok());
    CHECK(whole.same_bytes(whole_expected));

    // The chunks of each table are views of its tokens.
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t t = 0; t < s.tables; ++t) {
        std::vector<tensor_view<const T, 4>> memory(static_cast<std::size_t>(from.tables.most_pages()));
        chunked_tensor_view<const T> chunks;
        REQUIRE(restkv::page_chunks(source, b, t, std::span(memory), chunks).ok());
        REQUIRE(chunks.extent(2) == length_of(b, t * s.heads_per_page));
        CHECK(chunks.extent(1) == s.heads_per_page);
        CHECK(chunks.extent(3) == s.head_dim);
        if (s.head_dim == 0) continue;
        for (index_t n = 0; n < chunks.extent(2); ++n) {
          for (index_t h = 0; h < s.heads_per_page; ++h) {
            REQUIRE(&chunks.from_token(n)(0, h, 0, s.head_dim - 1) ==
                    &at(b, t * s.heads_per_page + h, n, s.head_dim - 1));
          }
        }
      }
    }

    // Kept tokens, one set per KV head or per query head; to dense rows, and to other pages of another pool.
    const index_t group = pick(random, 1, 2);
    std::vector<std::vector<position_t>> rows;
    position_t most = 0;
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < group * s.heads(); ++h) {
        std::vector<position_t> row;
        const int percent = static_cast<int>(pick(random, 0, 4)) * 25;
        for (position_t n = 0; n < length_of(b, h / group); ++n) {
          if (chance(random, percent)) row.push_back(n);
        }
        most = std::max(most, static_cast<position_t>(row.size()));
        rows.push_back(row);
      }
    }
    std::vector<position_t> positions(rows.size() * static_cast<std::size_t>(most), -1), lengths;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      std::copy(rows[r].begin(), rows[r].end(), positions.begin() + static_cast<std::ptrdiff_t>(r) * most);
      lengths.push_back(static_cast<position_t>(rows[r].size()));
    }
    const restkv::const_kept_tokens kept({positions.data(), {s.batch, group * s.heads(), most}},
                                         {lengths.data(), {s.batch, group * s.heads()}});
    const guarded_tensor<T, 4> dense(random, {s.batch, group * s.heads(), most, s.head_dim}, {.gaps = true});
    const guarded_tensor<T, 4> dense_expected(dense);
    std::vector<position_t> table_lengths(static_cast<std::size_t>(s.batch * s.tables), 0);
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < group * s.heads(); ++h) {
        for (index_t i = 0; i < kept.lengths(b, h); ++i) {
          for (index_t c = 0; c < s.head_dim; ++c) {
            dense_expected.view()(b, h, i, c) = at(b, h / group, kept.positions(b, h, i), c);
          }
        }
        auto& length = table_lengths[static_cast<std::size_t>(b * s.tables + h / (group * s.heads_per_page))];
        length = std::max(length, kept.lengths(b, h));
      }
    }
    REQUIRE(gather_tokens(kept, source, dense_layout<T>{dense.view()}, backward_for{}).ok());
    CHECK(dense.same_bytes(dense_expected));

    const index_t new_size = pick(random, 1, 5);
    const dealt_tables to(random, s.batch, s.tables, new_size, table_lengths);
    const guarded_tensor<T, 4> other(random, {to.pages, group * s.heads_per_page, new_size, s.head_dim},
                                     {.gaps = true});
    const guarded_tensor<T, 4> other_expected(other);
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < group * s.heads(); ++h) {
        const index_t table = h / (group * s.heads_per_page);
        for (index_t i = 0; i < kept.lengths(b, h); ++i) {
          const page_t page =
              to.ids[static_cast<std::size_t>((b * s.tables + table) * to.tables.most_pages() + i / new_size)];
          for (index_t c = 0; c < s.head_dim; ++c) {
            other_expected.view()(page, h % (group * s.heads_per_page), i % new_size, c) =
                at(b, h / group, kept.positions(b, h, i), c);
          }
        }
      }
    }
    REQUIRE(gather_tokens(kept, source, paged_layout<T>{other.view(), to.tables}).ok());
    CHECK(other.same_bytes(other_expected));
  }
}

TEST_CASE("a paged layout is a destination like any other") {
  random_engine random(5);
  const guarded_tensor<float, 4> key(random, {2, 3, 50, 8}, {}), value(random, {2, 3, 50, 4}, {});
  const random_kept kept(random, 2, 3, 50, 50);
  std::vector<position_t> lengths;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 3; ++h) lengths.push_back(kept.set().lengths(b, h));
  }
  const dealt_tables to(random, 2, 3, 16, lengths);
  const guarded_tensor<float, 4> key_pages(random, {to.pages, 1, 16, 8}, {}),
      value_pages(random, {to.pages, 1, 16, 4}, {});
  const paged_layout<float> new_keys{key_pages.view(), to.tables}, new_values{value_pages.view(), to.tables};
  REQUIRE(restkv::compact(kept.read(), key.read(), value.read(), new_keys, new_values).ok());
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 3; ++h) {
      for (index_t i = 0; i < kept.set().lengths(b, h); ++i) {
        const index_t position = kept.set().positions(b, h, i);
        REQUIRE(new_keys.row(b, h, i)(7) == key.read()(b, h, position, 7));
        REQUIRE(new_values.row(b, h, i)(0) == value.read()(b, h, position, 0));
      }
    }
  }
}

TEST_CASE("pages that follow each other are one chunk where their tokens do") {
  std::vector<float> memory(10 * 4 * 2 * 3);
  std::vector<page_t> ids{3, 4, 5, 7, 6, 0};
  std::vector<position_t> lengths{22};
  const restkv::page_tables tables({ids.data(), {1, 1, 6}}, {lengths.data(), {1, 1}});
  // [pages, page_size, heads, head_dim]: from one page to the next the tokens go on.
  const tensor_view<const float, 4> tokens_first(memory.data(), {10, 2, 4, 3}, {24, 3, 6, 1});
  const tensor_view<const float, 4> heads_first(memory.data(), {10, 2, 4, 3});
  std::array<tensor_view<const float, 4>, 6> views;
  chunked_tensor_view<const float> chunks;
  const paged_layout<const float> joined{tokens_first, tables}, apart{heads_first, tables};
  check_error(restkv::page_chunks(joined, 0, 0, std::span(views).first(3), chunks), errc::shape_mismatch, {3, 4});
  CHECK(chunks.missing());
  REQUIRE(restkv::page_chunks(joined, 0, 0, std::span(views).first(4), chunks).ok());
  CHECK(chunks.chunks() == 4);
  CHECK(chunks.chunk(0).extent(2) == 12);
  CHECK(chunks.chunk(3).extent(2) == 2);
  REQUIRE(restkv::page_chunks(apart, 0, 0, std::span(views), chunks).ok());
  CHECK(chunks.chunks() == 6);
  CHECK(chunks.extent(2) == 22);

  lengths[0] = 0;  // a table without tokens
  REQUIRE(restkv::page_chunks(joined, 0, 0, std::span(views), chunks).ok());
  CHECK(chunks.chunks() == 1);
  CHECK(chunks.extent(2) == 0);
  CHECK(chunks.extent(3) == 3);
  check_error(restkv::page_chunks(joined, 0, 1, std::span(views), chunks), errc::invalid_argument, {1, 0});
  check_error(restkv::page_chunks(joined, -1, 0, std::span(views), chunks), errc::invalid_argument, {-1, 0});
}

TEST_CASE("layers that share their tables are compacted together") {
  // Two layers, 12 tokens in pages of 4; page 2 is shared with somebody else.
  counted_pool counted(6, 3);
  restkv::page_pool& pool = counted.pool;
  REQUIRE(pool.share(2).ok());
  std::vector<page_t> ids{1, 2, 0};
  std::vector<position_t> lengths{12};
  const restkv::page_tables tables({ids.data(), {1, 1, 3}}, {lengths.data(), {1, 1}});
  std::vector<float> memory(2 * 6 * 4);
  const tensor_view<float, 4> first(memory.data(), {6, 1, 4, 1}), second(memory.data() + 24, {6, 1, 4, 1});
  for (index_t n = 0; n < 12; ++n) {
    first(ids[static_cast<std::size_t>(n / 4)], 0, n % 4, 0) = static_cast<float>(n);
    second(ids[static_cast<std::size_t>(n / 4)], 0, n % 4, 0) = static_cast<float>(100 + n);
  }
  const std::vector<float> before = memory;
  // The first layer would leave slots 4 and 5 as they are, the second moves them.
  const written_kept kept_first({{0, 1, 2, 3, 4, 5}}), kept_second({{0, 1, 2, 3, 6, 11}});
  const std::array<restkv::const_kept_tokens, 2> layers{kept_first.set(), kept_second.set()};
  std::vector<std::byte> plan_memory(restkv::page_moves_bytes(tables));
  restkv::page_moves moves;

  REQUIRE(restkv::plan_page_moves(pool, layers, tables, 4, 1, restkv::workspace(plan_memory), moves).ok());
  CHECK(pool.references(3) == 1);  // page 0 holds a token that the second layer keeps: a free page is taken
  REQUIRE(restkv::cancel_page_moves(pool, moves).ok());
  CHECK(pool.available() == 3);
  CHECK(ids == std::vector<page_t>{1, 2, 0});

  REQUIRE(restkv::plan_page_moves(pool, layers, tables, 4, 1, restkv::workspace(plan_memory), moves).ok());
  REQUIRE(restkv::move_tokens(moves, layers[0], tables, first).ok());
  REQUIRE(restkv::move_tokens(moves, layers[1], tables, second, backward_for{}).ok());
  REQUIRE(restkv::commit_page_moves(pool, moves, tables).ok());
  CHECK(ids == std::vector<page_t>{1, 3, restkv::no_page});
  CHECK(lengths[0] == 6);
  CHECK(std::vector<page_t>(moves.freed.begin(), moves.freed.end()) == std::vector<page_t>{0});
  CHECK(pool.references(2) == 1);
  for (index_t i = 0; i < 6; ++i) {
    const page_t page = ids[static_cast<std::size_t>(i / 4)];
    CHECK(first(page, 0, i % 4, 0) == static_cast<float>(kept_first.positions[static_cast<std::size_t>(i)]));
    CHECK(second(page, 0, i % 4, 0) == static_cast<float>(100 + kept_second.positions[static_cast<std::size_t>(i)]));
  }
  for (const index_t shared : {8, 9, 10, 11, 32, 33, 34, 35}) {
    CHECK(memory[static_cast<std::size_t>(shared)] == before[static_cast<std::size_t>(shared)]);
  }
}

TEST_CASE("whole pages are taken over without a copy, shared ones too") {
  counted_pool counted(4, 4);
  restkv::page_pool& pool = counted.pool;
  REQUIRE(pool.share(3).ok());
  std::vector<page_t> ids{2, 0, 3, 1};
  std::vector<position_t> lengths{15};
  const restkv::page_tables tables({ids.data(), {1, 1, 4}}, {lengths.data(), {1, 1}});
  std::vector<float> memory(4 * 2 * 4);
  std::iota(memory.begin(), memory.end(), 0.0f);
  const std::vector<float> before = memory;
  const tensor_view<float, 4> pages(memory.data(), {4, 2, 4, 1});
  std::vector<std::byte> plan_memory(restkv::page_moves_bytes(tables));
  restkv::page_moves moves;
  const std::vector<position_t> last_two{8, 9, 10, 11, 12, 13, 14};
  REQUIRE(restkv::compact_pages(pool, written_kept({last_two, last_two}).set(), tables, restkv::workspace(plan_memory),
                                moves, pages)
              .ok());
  CHECK(ids == std::vector<page_t>{3, 1, restkv::no_page, restkv::no_page});
  CHECK(lengths[0] == 7);
  CHECK(memory == before);
  CHECK(pool.references(3) == 2);
  CHECK(pool.available() == 2);
}

TEST_CASE("a pool counts references, and refuses what would corrupt it") {
  std::vector<std::byte> memory(restkv::page_pool::required_bytes(3));
  restkv::page_pool pool;
  CHECK(pool.pages() == 0);
  page_t page = 77;
  check_error(pool.allocate(page), errc::workspace_too_small, {0});
  check_error(pool.reset(-1, restkv::workspace(memory)), errc::invalid_argument, {-1});
  check_error(pool.reset(index_t{1} << 31, restkv::workspace(memory)), errc::invalid_argument, {index_t{1} << 31});
  check_error(pool.reset(3, restkv::workspace(memory.data(), 30)), errc::workspace_too_small, {30});
  REQUIRE(pool.reset(3, restkv::workspace(memory)).ok());
  for (page_t expected = 0; expected < 3; ++expected) {
    REQUIRE(pool.allocate(page).ok());
    CHECK(page == expected);
  }
  check_error(pool.allocate(page), errc::workspace_too_small, {3});
  CHECK(page == 2);
  REQUIRE(pool.share(1).ok());
  CHECK(pool.references(1) == 2);
  bool freed = true;
  REQUIRE(pool.release(1, freed).ok());
  CHECK(!freed);
  REQUIRE(pool.release(1, freed).ok());
  CHECK(freed);
  check_error(pool.release(1, freed), errc::invalid_argument, {1, 3}, "free");
  check_error(pool.share(1), errc::invalid_argument, {1, 3}, "free");
  check_error(pool.release(3, freed), errc::invalid_argument, {3});
  check_error(pool.share(-1), errc::invalid_argument, {-1, 3});
  CHECK(pool.references(-1) == 0);
  CHECK(pool.references(99) == 0);
  REQUIRE(pool.allocate(page).ok());
  CHECK(page == 1);  // the last one freed
  CHECK(pool.available() == 0);
}

namespace {

/// One sequence of 10 tokens in pages of 4, two heads in one table, that a test damages in one way.
struct damaged {
  counted_pool counted{5, 3};
  restkv::page_pool& pool = counted.pool;
  std::vector<page_t> ids{0, 1, 2};
  std::vector<position_t> lengths{10};
  restkv::page_tables tables{{ids.data(), {1, 1, 3}}, {lengths.data(), {1, 1}}};
  std::vector<float> key_memory, value_memory;
  tensor_view<float, 4> key, value;
  std::vector<std::byte> plan_memory = std::vector<std::byte>(restkv::page_moves_bytes(tables));
  std::vector<std::vector<position_t>> heads{{1, 5, 9}, {0, 2, 3, 4, 9}};

  damaged() : key_memory(5 * 2 * 4 * 3), value_memory(5 * 2 * 4 * 2) {
    std::iota(key_memory.begin(), key_memory.end(), 1.0f);
    std::iota(value_memory.begin(), value_memory.end(), 1000.0f);
    key = {key_memory.data(), {5, 2, 4, 3}};
    value = {value_memory.data(), {5, 2, 4, 2}};
  }

  /// Compacts; a failure must leave everything as it was.
  status compact() {
    const written_kept kept(heads);
    const auto state = [&] {
      std::vector<index_t> numbers{pool.available()};
      for (page_t page = 0; page < 5; ++page) numbers.push_back(pool.references(page));
      for (const page_t page : ids) numbers.push_back(page);
      for (const position_t length : lengths) numbers.push_back(length);
      return numbers;
    };
    const auto before = state();
    const auto keys = key_memory, values = value_memory;
    restkv::page_moves moves;
    const status outcome =
        restkv::compact_pages(pool, kept.set(), tables, restkv::workspace(plan_memory), moves, key, value);
    if (!outcome.ok()) {
      CHECK(state() == before);
      CHECK(std::memcmp(keys.data(), key_memory.data(), keys.size() * sizeof(float)) == 0);
      CHECK(std::memcmp(values.data(), value_memory.data(), values.size() * sizeof(float)) == 0);
      CHECK(moves.ids.data == nullptr);
    }
    return outcome;
  }
};

}  // namespace

TEST_CASE("compaction of pages fails with nothing changed") {
  damaged d;
  SECTION("nothing is wrong") {
    REQUIRE(d.compact().ok());
    CHECK(d.lengths[0] == 5);
    CHECK(d.key(0, 0, 2, 1) == 1 + (2 * 2 * 4 + 1) * 3 + 1);  // head 0, slot 2: position 9
    CHECK(d.pool.references(2) == 0);
  }
  SECTION("a page that is not in the pool") {
    d.ids[1] = 5;
    check_error(d.compact(), errc::invalid_argument, {1, 0, 5}, "pool");
    d.ids[1] = -1;
    check_error(d.compact(), errc::invalid_argument, {-1, 5}, "pool");
  }
  SECTION("an entry behind the length is not looked at") {
    d.lengths[0] = 8;
    d.heads = {{1, 5}, {0, 2, 3, 4}};
    d.ids[2] = 99;
    CHECK(d.compact().ok());
    CHECK(d.ids == std::vector<page_t>{0, restkv::no_page, restkv::no_page});
  }
  SECTION("a free page") {
    d.ids[2] = 4;
    check_error(d.compact(), errc::invalid_argument, {4, 1, 0}, "references");
  }
  SECTION("a page twice with one reference") {
    d.ids[2] = 1;
    check_error(d.compact(), errc::invalid_argument, {1, 2}, "references");
  }
  SECTION("too few pages for copies") {
    for (page_t page = 0; page < 3; ++page) REQUIRE(d.pool.share(page).ok());
    page_t taken = 0;
    REQUIRE(d.pool.allocate(taken).ok());
    check_error(d.compact(), errc::workspace_too_small, {2, 1}, "free");
    bool freed = false;
    REQUIRE(d.pool.release(taken, freed).ok());
    CHECK(d.compact().ok());
  }
  SECTION("lengths") {
    d.lengths[0] = 13;
    check_error(d.compact(), errc::invalid_argument, {13, 12});
    d.lengths[0] = -1;
    check_error(d.compact(), errc::invalid_argument, {-1, 12});
    d.lengths[0] = 9;  // position 9 is kept
    check_error(d.compact(), errc::invalid_argument, {9});
  }
  SECTION("positions") {
    d.heads[0] = {5, 1};
    check_error(d.compact(), errc::invalid_argument, {1, 5});
  }
  SECTION("heads") {
    d.heads.pop_back();
    check_error(d.compact(), errc::shape_mismatch, {1, 2});
    d.heads = {{0}, {1}, {2}, {3}};
    check_error(d.compact(), errc::unsupported, {4, 2});
  }
  SECTION("tensors") {
    d.value.extents[2] = 2;
    check_error(d.compact(), errc::shape_mismatch, {2, 4});
    d.value.extents = {4, 2, 4, 2};
    check_error(d.compact(), errc::shape_mismatch, {4, 5});
    d.value = d.key;
    check_error(d.compact(), errc::aliasing, {480}, "pages");
    d.value = {nullptr, {5, 2, 4, 2}};
    check_error(d.compact(), errc::missing_input, {80}, "null");
    d.value = {d.value_memory.data(), {5, 2, 4, 2}, {0, 8, 2, 1}};
    check_error(d.compact(), errc::aliasing, {}, "itself");
    d.value = {reinterpret_cast<float*>(d.ids.data()), {5, 2, 4, 0}};
    CHECK(d.compact().ok());  // no channels, no memory
  }
  SECTION("pages that a plan took are given back") {
    REQUIRE(d.pool.share(0).ok());
    d.value.extents = {4, 2, 4, 2};
    check_error(d.compact(), errc::shape_mismatch, {4, 5});
    CHECK(d.pool.available() == 2);
    d.value.extents = {5, 2, 4, 2};
    CHECK(d.compact().ok());
    CHECK(d.ids[0] == 3);
  }
  SECTION("a page size of 0") {
    d.key.extents[2] = 0;
    check_error(d.compact(), errc::invalid_argument, {0, 1}, "page size");
  }
  SECTION("a small workspace") {
    d.plan_memory.resize(100);
    check_error(d.compact(), errc::workspace_too_small, {100});
  }
}

TEST_CASE("random tables, right or wrong, are compacted or left alone") {
  random_engine random(91);
  index_t compacted = 0, refused = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    damaged d;
    for (int i = 0; i < 3; ++i) {
      const auto page = static_cast<page_t>(pick(random, 0, 4));
      if (chance(random, 50)) static_cast<void>(d.pool.share(page));
      if (chance(random, 20)) d.ids[static_cast<std::size_t>(i)] = static_cast<page_t>(pick(random, -1, 5));
    }
    if (chance(random, 20)) d.lengths[0] = static_cast<position_t>(pick(random, -1, 13));
    for (auto& head : d.heads) {
      head.clear();
      const position_t end = chance(random, 5) ? 14 : d.lengths[0];
      for (position_t n = 0; n < end; ++n) {
        if (chance(random, 50)) head.push_back(chance(random, 1) ? static_cast<position_t>(pick(random, -1, 13)) : n);
      }
    }
    // What slots must hold afterwards.
    std::vector<float> expected;
    const auto each_kept = [&](const auto& visit) {
      for (std::size_t h = 0; h < 2; ++h) {
        for (std::size_t i = 0; i < d.heads[h].size(); ++i) visit(static_cast<index_t>(h), static_cast<index_t>(i));
      }
    };
    each_kept([&](index_t h, index_t i) {
      const position_t n = d.heads[static_cast<std::size_t>(h)][static_cast<std::size_t>(i)];
      const page_t page = n < 0 || n >= 12 ? -1 : d.ids[static_cast<std::size_t>(n / 4)];
      expected.push_back(page < 0 || page > 4 ? -1.0f : d.key(page, h, n % 4, 2));
    });
    if (!d.compact().ok()) {  // checks that nothing changed
      ++refused;
      continue;
    }
    ++compacted;
    std::size_t next = 0;
    each_kept([&](index_t h, index_t i) {
      REQUIRE(d.key(d.ids[static_cast<std::size_t>(i / 4)], h, i % 4, 2) == expected[next++]);
    });
  }
  CHECK(compacted > 2000);
  CHECK(refused > 2000);
}

TEST_CASE("sequences of pages refuse what does not fit") {
  damaged d;
  const auto extend = [&](index_t sequence, index_t count) {
    return restkv::extend_sequence(d.pool, d.tables, sequence, count, d.key, d.value);
  };
  check_error(extend(1, 1), errc::invalid_argument, {1});
  check_error(extend(0, -1), errc::shape_mismatch, {-1, 10, 2});
  check_error(extend(0, 3), errc::shape_mismatch, {3, 10, 2});
  CHECK(extend(0, 0).ok());
  CHECK(extend(0, 2).ok());
  CHECK(d.lengths[0] == 12);
  check_error(restkv::fork_sequence(d.pool, d.tables, 4, 0, 0), errc::invalid_argument, {0, 12});
  check_error(restkv::fork_sequence(d.pool, d.tables, 4, 0, 1), errc::invalid_argument, {1});
  check_error(restkv::release_sequence(d.pool, d.tables, 4, -1), errc::invalid_argument, {-1});
  d.ids[1] = 3;
  check_error(restkv::release_sequence(d.pool, d.tables, 4, 0), errc::invalid_argument, {3, 0}, "references");
  CHECK(d.pool.references(0) == 1);
  d.ids[1] = 0;  // as the first: released once, it would be free before the second
  check_error(restkv::release_sequence(d.pool, d.tables, 4, 0), errc::invalid_argument, {0, 2, 1}, "references");
  CHECK(d.pool.references(0) == 1);
  d.ids[1] = 1;
  CHECK(restkv::release_sequence(d.pool, d.tables, 4, 0).ok());
  CHECK(d.pool.available() == 5);
  CHECK(d.ids == std::vector<page_t>(3, restkv::no_page));

  // A fork that cannot share all pages takes none.
  std::vector<page_t> ids{0, 1, -1, -1};
  std::vector<position_t> lengths{8, 0};
  const restkv::page_tables two({ids.data(), {2, 1, 2}}, {lengths.data(), {2, 1}});
  page_t page = 0;
  REQUIRE(d.pool.allocate(page).ok());
  ids[0] = page;
  ids[1] = page == 0 ? 1 : 0;  // free
  check_error(restkv::fork_sequence(d.pool, two, 4, 0, 1), errc::invalid_argument, {ids[1]}, "free");
  CHECK(d.pool.references(page) == 1);
  CHECK(lengths[1] == 0);
}

TEST_CASE("gathering from pages refuses what does not fit") {
  damaged d;
  const written_kept kept({{1, 5, 9}, {0, 2, 3, 4, 8}});
  std::vector<float> out(2 * 5 * 3, -1.0f);
  const dense_layout<float> dense{{out.data(), {1, 2, 5, 3}}};
  const auto gather = [&](const auto& to) {
    return gather_tokens(kept.set(), paged_layout<const float>{d.key, d.tables}, to);
  };

  d.ids[2] = 5;
  check_error(gather(dense), errc::invalid_argument, {5});
  d.ids[2] = 2;
  d.lengths[0] = 9;
  check_error(gather(dense), errc::invalid_argument, {9});
  d.lengths[0] = 10;
  std::vector<page_t> head_ids{0, 1, 2, 3, 4, -1};
  std::vector<position_t> head_lengths{10, 8};  // tokens that the first head has and the second has not
  const restkv::page_tables of_heads({head_ids.data(), {1, 2, 3}}, {head_lengths.data(), {1, 2}});
  const tensor_view<float, 4> one_head(d.key_memory.data(), {5, 1, 4, 3}, {24, 12, 3, 1});
  check_error(gather_tokens(kept.set(), paged_layout<const float>{one_head, of_heads}, dense), errc::invalid_argument,
              {1, 8});
  restkv::page_moves moves;
  check_error(restkv::compact_pages(d.pool, kept.set(), of_heads, restkv::workspace(d.plan_memory), moves, one_head),
              errc::invalid_argument, {1, 8});
  check_error(gather(dense_layout<float>{{out.data(), {1, 2, 4, 3}}}), errc::shape_mismatch, {5, 4});
  check_error(gather(dense_layout<float>{{out.data(), {1, 2, 5, 2}}}), errc::shape_mismatch, {3, 2});
  check_error(gather(dense_layout<float>{{d.key_memory.data(), {1, 2, 5, 3}}}), errc::aliasing, {});
  CHECK(out == std::vector<float>(30, -1.0f));

  // Pages of the same pool: disjoint ones will do.
  std::vector<page_t> new_ids{4, 2};
  std::vector<position_t> new_lengths{5};
  const paged_layout<float> pages{d.key, {{new_ids.data(), {1, 1, 2}}, {new_lengths.data(), {1, 1}}}};
  check_error(gather(pages), errc::aliasing, {2, 5}, "page");
  new_ids[1] = 4;
  check_error(gather(pages), errc::aliasing, {4, 5}, "twice");
  new_lengths[0] = 4;  // head 1 keeps 5
  check_error(gather(pages), errc::shape_mismatch, {5, 4});
  new_lengths[0] = 5;
  new_ids[1] = 3;
  const float wanted = d.key(0, 1, 2, 2);  // head 1, slot 1: position 2
  REQUIRE(gather(pages).ok());
  CHECK(d.key(4, 1, 1, 2) == wanted);
  CHECK(d.key(3, 1, 0, 0) == d.key(2, 1, 0, 0));  // slot 4: position 8

  // Layouts that cannot be written to.
  new_ids[0] = 9;
  check_error(pages.check(), errc::invalid_argument, {9, 5});
  new_ids[0] = 4;
  const paged_layout<float> repeated{{d.key_memory.data(), {5, 2, 4, 3}, {0, 12, 3, 1}}, pages.tables};
  check_error(repeated.check(), errc::aliasing, {5}, "itself");
  const paged_layout<float> nowhere{{nullptr, {5, 2, 4, 3}}, pages.tables};
  check_error(nowhere.check(), errc::missing_input, {120});
  std::vector<page_t> self{0, 1};
  const paged_layout<page_t> inside{{self.data(), {2, 1, 1, 1}},
                                    {{self.data(), {1, 1, 2}}, {new_lengths.data(), {1, 1}}}};
  new_lengths[0] = 2;
  check_error(inside.check(), errc::aliasing, {2});
}

TEST_CASE("a page that occurs twice is found in pools of every size") {
  const index_t pages = 100000;
  std::vector<float> memory(static_cast<std::size_t>(pages));
  const tensor_view<float, 4> pool(memory.data(), {pages, 1, 1, 1});
  random_engine random(8);
  for (int trial = 0; trial < 40; ++trial) {
    std::vector<page_t> all(static_cast<std::size_t>(pages));
    std::iota(all.begin(), all.end(), page_t{0});
    std::shuffle(all.begin(), all.end(), random);
    std::vector<page_t> ids(all.begin(), all.begin() + 300), others(all.begin() + 300, all.begin() + 600);
    std::vector<position_t> lengths{100, 100, 100};
    const auto tables_of = [&](std::vector<page_t>& numbers) {
      return restkv::page_tables({numbers.data(), {3, 1, 100}}, {lengths.data(), {3, 1}});
    };
    const paged_layout<float> layout{pool, tables_of(ids)};
    REQUIRE(layout.check().ok());
    restkv::const_page_tables second = tables_of(others);
    REQUIRE(restkv::detail::common_page(layout.tables, &second, 1, pages) == restkv::no_page);
    const auto one = static_cast<std::size_t>(pick(random, 0, 299)),
               other = static_cast<std::size_t>(pick(random, 0, 299));
    others[other] = ids[one];
    REQUIRE(restkv::detail::common_page(layout.tables, &second, 1, pages) == ids[one]);
    if (one == other) continue;
    ids[other] = ids[one];
    check_error(layout.check(), errc::aliasing, {ids[one], pages}, "twice");
  }
}
