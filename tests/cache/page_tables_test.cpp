// SPDX-License-Identifier: Apache-2.0
// Page tables and pools as engines hold them: taken as they are, or refused with both numbers.
#include "cache/cache_support.hpp"

#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_gather.hpp>
#include <restkv/interop/page_tables.hpp>
#include <restkv/interop/page_tensors.hpp>

#include <array>
#include <functional>
#include <string>

using namespace restkv_test;
using restkv::errc;
using restkv::page_order;
using restkv::page_t;

namespace {

/// What FlashInfer is given, with its memory.
struct lists_memory {
  std::vector<page_t> indptr, indices, last_page_len;

  [[nodiscard]] restkv::page_lists view() { return {view_of(indptr), view_of(indices), view_of(last_page_len)}; }

 private:
  static tensor_view<page_t, 1> view_of(std::vector<page_t>& array) {
    return {array.data(), {static_cast<index_t>(array.size())}};
  }
};

/// Tables with their memory.
struct tables_memory {
  std::vector<page_t> ids;
  std::vector<position_t> lengths;
  index_t batch, tables, most_pages;

  tables_memory(index_t sequences, index_t of_each, index_t entries)
      : ids(static_cast<std::size_t>(sequences * of_each * entries), -77),
        lengths(static_cast<std::size_t>(sequences * of_each), -77),
        batch(sequences),
        tables(of_each),
        most_pages(entries) {}
  [[nodiscard]] restkv::page_tables view() {
    return {{ids.data(), {batch, tables, most_pages}}, {lengths.data(), {batch, tables}}};
  }
  bool operator==(const tables_memory&) const = default;
};

/// Six pages of 4 tokens: rows of 9, 0 and 3 tokens.
lists_memory small_lists() { return {{0, 3, 3, 4}, {5, 0, 2, 4}, {1, 0, 3}}; }

}  // namespace

TEST_CASE("lists of pages become tables and lists again") {
  random_engine random(3);
  for (int trial = 0; trial < 300; ++trial) {
    const index_t batch = pick(random, 0, 4);
    const index_t tables = pick(random, 1, 3);
    const index_t most_pages = pick(random, 0, 5);
    const index_t page_size = pick(random, 1, 6);
    const index_t pages = most_pages * tables + pick(random, 0, 5);
    lists_memory lists{{0}, {}, {}};
    std::vector<position_t> lengths;
    for (index_t b = 0; b < batch; ++b) {
      // A sequence holds each page once; another may hold the same.
      std::vector<page_t> mine(static_cast<std::size_t>(pages));
      std::iota(mine.begin(), mine.end(), page_t{0});
      std::shuffle(mine.begin(), mine.end(), random);
      for (index_t t = 0; t < tables; ++t) {
        const index_t length = pick(random, 0, most_pages * page_size);
        index_t left = length;
        for (; left > 0; left -= page_size) {
          lists.indices.push_back(mine.back());
          mine.pop_back();
        }
        lists.indptr.push_back(static_cast<page_t>(lists.indices.size()));
        lists.last_page_len.push_back(static_cast<page_t>(length == 0 ? 0 : left + page_size));
        lengths.push_back(static_cast<position_t>(length));
      }
    }
    tables_memory made(batch, tables, most_pages);
    REQUIRE(restkv::read_page_lists(lists.view(), pages, page_size, made.view()).ok());
    REQUIRE(made.lengths == lengths);
    REQUIRE(restkv::check_engine_tables(made.view(), pages, page_size).ok());
    std::size_t next = 0;
    for (std::size_t row = 0; row < lengths.size(); ++row) {
      for (index_t i = 0; i < most_pages; ++i) {
        const bool held = i * page_size < lengths[row];
        REQUIRE(made.ids[row * static_cast<std::size_t>(most_pages) + static_cast<std::size_t>(i)] ==
                (held ? lists.indices[next] : restkv::no_page));
        next += held ? 1 : 0;
      }
    }
    lists_memory again{std::vector<page_t>(lists.indptr.size(), -77), std::vector<page_t>(lists.indices.size(), -77),
                       std::vector<page_t>(lists.last_page_len.size(), -77)};
    REQUIRE(restkv::write_page_lists(made.view(), pages, page_size, again.view()).ok());
    REQUIRE(again.indptr == lists.indptr);
    REQUIRE(again.indices == lists.indices);
    REQUIRE(again.last_page_len == lists.last_page_len);
  }
}

TEST_CASE("lists of pages that are wrong are refused, and nothing is changed") {
  struct damage {
    const char* word;
    errc code;
    std::vector<index_t> numbers;
    std::function<void(lists_memory&)> make;
  };
  const std::vector<damage> damages{
      {"pool", errc::invalid_argument, {6, 6, 1}, [](lists_memory& m) { m.indices[1] = 6; }},
      {"pool", errc::invalid_argument, {-1, 6, 3}, [](lists_memory& m) { m.indices[3] = -1; }},
      {"last page of row 0", errc::invalid_argument, {5, 4}, [](lists_memory& m) { m.last_page_len[0] = 5; }},
      {"last page of row 2", errc::invalid_argument, {0, 4}, [](lists_memory& m) { m.last_page_len[2] = 0; }},
      {"last page of row 2", errc::invalid_argument, {-3, 4}, [](lists_memory& m) { m.last_page_len[2] = -3; }},
      {"both of sequence 0", errc::aliasing, {0, 2, 5}, [](lists_memory& m) { m.indices[2] = 5; }},
      {"ascend", errc::invalid_argument, {1, 3, 2, 4}, [](lists_memory& m) { m.indptr[2] = 2; }},
      {"ascend", errc::invalid_argument, {2, 3, 9, 4}, [](lists_memory& m) { m.indptr[3] = 9; }},
      {"begin with 0", errc::invalid_argument, {1}, [](lists_memory& m) { m.indptr[0] = 1; }},
      {"indptr has 3 entries", errc::shape_mismatch, {3, 4}, [](lists_memory& m) { m.indptr.pop_back(); }},
      {"rows", errc::shape_mismatch, {4, 3}, [](lists_memory& m) {
         m.indptr.push_back(4);
         m.last_page_len.push_back(0);
       }}};
  for (const damage& wrong : damages) {
    lists_memory lists = small_lists();
    wrong.make(lists);
    tables_memory tables(3, 1, 3);
    const tables_memory before = tables;
    check_error(restkv::read_page_lists(lists.view(), 6, 4, tables.view()), wrong.code, wrong.numbers, wrong.word);
    CHECK(tables == before);
  }
  lists_memory lists = small_lists();
  tables_memory narrow(3, 1, 2);
  check_error(restkv::read_page_lists(lists.view(), 6, 4, narrow.view()), errc::shape_mismatch, {0, 3, 2});
  tables_memory tables(3, 1, 3);
  check_error(restkv::read_page_lists(lists.view(), 6, 0, tables.view()), errc::invalid_argument, {0, 1});
  check_error(restkv::read_page_lists(lists.view(), 6, 1 << 30, tables.view()), errc::invalid_argument, {3, 1 << 30});
  lists.last_page_len[1] = 1000;  // of a row without pages: not looked at, as FlashInfer does not
  REQUIRE(restkv::read_page_lists(lists.view(), 6, 4, tables.view()).ok());
  CHECK(tables.lengths == std::vector<position_t>{9, 0, 3});
  lists.indices[3] = 5;  // sequences may share a page
  CHECK(restkv::check_page_lists(lists.view(), 1, 6, 4).ok());
  // As heads of one sequence they may not.
  check_error(restkv::check_page_lists(lists.view(), 3, 6, 4), errc::aliasing, {0, 3, 5}, "both of sequence 0");
  check_error(restkv::check_page_lists(lists.view(), 2, 6, 4), errc::shape_mismatch, {3, 2});

  lists_memory small{std::vector<page_t>(4, -7), std::vector<page_t>(3, -7), std::vector<page_t>(3, -7)};
  check_error(restkv::write_page_lists(tables.view(), 6, 4, small.view()), errc::shape_mismatch, {4, 3});
  CHECK(small.indptr == std::vector<page_t>(4, -7));
  lists_memory null{std::vector<page_t>(4, -7), std::vector<page_t>(4, -7), std::vector<page_t>(3, -7)};
  restkv::page_lists without = null.view();
  without.indices.data = nullptr;
  check_error(restkv::write_page_lists(tables.view(), 6, 4, without), errc::missing_input, {4}, "indices");
  restkv::page_lists inside = null.view();
  inside.indices.data = tables.ids.data();
  check_error(restkv::write_page_lists(tables.view(), 6, 4, inside), errc::aliasing, {}, "tables.ids");
  tables.ids[0] = 6;
  check_error(restkv::write_page_lists(tables.view(), 6, 4, null.view()), errc::invalid_argument, {6});
  CHECK(null.indptr == std::vector<page_t>(4, -7));
}

TEST_CASE("a block table is a page table as it is") {
  // Three rows of an engine's buffer with room for 5 blocks, behind each row a stride of 7.
  std::vector<page_t> buffer(21, 99);
  std::vector<position_t> lengths{9, -5, 0, -5, 4, -5};
  const std::array<page_t, 3> first{4, 1, 3};
  std::copy(first.begin(), first.end(), buffer.begin());
  buffer[14] = 4;
  const tensor_view<page_t, 2> block_table(buffer.data(), {3, 5}, {7, 1});
  const tensor_view<position_t, 1> seq_lens(lengths.data(), {3}, {2});
  const restkv::page_tables tables = restkv::block_tables(block_table, seq_lens);
  REQUIRE(restkv::check_engine_tables(tables, 5, 4).ok());  // sequences 0 and 2 share page 4
  CHECK(tables.batch() == 3);
  CHECK(tables.tables() == 1);
  CHECK(tables.ids(0, 0, 2) == 3);
  CHECK(tables.ids(2, 0, 0) == 4);
  CHECK(tables.lengths(2, 0) == 4);
  tables.lengths(2, 0) = 3;
  CHECK(lengths[4] == 3);
  const restkv::const_page_tables read = tables;
  CHECK(read.ids.data == buffer.data());

  check_error(restkv::check_engine_tables(tables, 4, 4), errc::invalid_argument, {4, 0});
  buffer[2] = 4;
  check_error(restkv::check_engine_tables(tables, 5, 4), errc::aliasing, {4, 5, 0, 2}, "sequence 0");
  lengths[0] = 21;
  check_error(restkv::check_engine_tables(tables, 5, 4), errc::invalid_argument, {21, 20});

  // A page that two heads of one sequence hold.
  tables_memory heads(2, 2, 2);
  heads.ids = {0, 1, 2, 3, 4, 5, 6, 5};
  heads.lengths = {8, 8, 8, 8};
  check_error(restkv::check_engine_tables(heads.view(), 7, 4), errc::aliasing, {5, 7, 1, 0}, "of sequence 1");
  heads.lengths[3] = 4;  // the entry behind the length is not looked at
  CHECK(restkv::check_engine_tables(heads.view(), 7, 4).ok());
}

TEST_CASE("slots follow the tokens of the cache") {
  tables_memory memory(2, 1, 3);
  memory.ids = {7, 2, 5, 0, 0, 0};
  memory.lengths = {10, 2};
  std::vector<std::int64_t> slots(6, -9);
  const tensor_view<std::int64_t, 1> out(slots.data(), {6});
  REQUIRE(restkv::slot_mapping(memory.view(), 8, 4, 0, 0, 3, out).ok());
  CHECK(slots == std::vector<std::int64_t>{31, 8, 9, 10, 11, 20});
  check_error(restkv::slot_mapping(memory.view(), 8, 4, 0, 0, 5, out), errc::invalid_argument, {6, 5, 10});
  check_error(restkv::slot_mapping(memory.view(), 8, 4, 2, 0, 0, out), errc::invalid_argument, {2, 2});
  check_error(restkv::slot_mapping(memory.view(), 7, 4, 0, 0, 0, out), errc::invalid_argument, {7, 7});
  check_error(restkv::slot_mapping(memory.view(), 8, 4, 0, 0, 0, {nullptr, {2}}), errc::missing_input, {2});
  CHECK(slots[0] == 31);
}

TEST_CASE("pools of every engine's layout are compacted alike") {
  constexpr index_t pages = 9, heads = 2, size = 3, channels = 8, piece = 4;
  random_engine random(5);
  // The number of an element says which it is: key or value, page, head, token and channel.
  const auto number = [](index_t pair, index_t page, index_t h, index_t n, index_t c) {
    return static_cast<float>((((pair * pages + page) * heads + h) * size + n) * channels + c);
  };
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<float> nhd_pairs(2 * pages * size * heads * channels), hnd_pairs(nhd_pairs), split(nhd_pairs);
    std::vector<float> pieces(pages * heads * channels * size), transposed(pieces), plain(pieces);
    for (index_t pair = 0; pair < 2; ++pair) {
      for (index_t page = 0; page < pages; ++page) {
        for (index_t h = 0; h < heads; ++h) {
          for (index_t n = 0; n < size; ++n) {
            for (index_t c = 0; c < channels; ++c) {
              const float x = number(pair, page, h, n, c);
              const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
              nhd_pairs[at((((page * 2 + pair) * size + n) * heads + h) * channels + c)] = x;
              hnd_pairs[at((((page * 2 + pair) * heads + h) * size + n) * channels + c)] = x;
              split[at((((pair * pages + page) * size + n) * heads + h) * channels + c)] = x;
              if (pair == 0) {
                plain[at(((page * heads + h) * size + n) * channels + c)] = x;
                pieces[at((((page * heads + h) * (channels / piece) + c / piece) * size + n) * piece + c % piece)] = x;
              } else {
                transposed[at(((page * heads + h) * channels + c) * size + n)] = x;
              }
            }
          }
        }
      }
    }
    restkv::page_pair<float> first, second, third;
    REQUIRE(restkv::key_value_pages(tensor_view<float, 5>{nhd_pairs.data(), {pages, 2, size, heads, channels}}, 1,
                                    page_order::nhd, first)
                .ok());
    REQUIRE(restkv::key_value_pages(tensor_view<float, 5>{hnd_pairs.data(), {pages, 2, heads, size, channels}}, 1,
                                    page_order::hnd, second)
                .ok());
    REQUIRE(restkv::key_value_pages(tensor_view<float, 5>{split.data(), {2, pages, size, heads, channels}}, 0,
                                    page_order::nhd, third)
                .ok());
    const tensor_view<float, 5> key_pieces{pieces.data(), {pages, heads, channels / piece, size, piece}};
    const tensor_view<float, 4> values_last =
        restkv::transposed_pages(tensor_view<float, 4>{transposed.data(), {pages, heads, channels, size}});
    const tensor_view<float, 4> keys_alone =
        restkv::head_pages(tensor_view<float, 4>{plain.data(), {pages, heads, size, channels}}, page_order::hnd);

    // Pages 1 and 8 are of another sequence; the sequence's tokens lie in 6 others.
    std::vector<page_t> ids{4, 0, 7, 2, 6, 5};
    std::vector<position_t> lengths{17};
    std::vector<std::byte> pool_memory(restkv::page_pool::required_bytes(pages));
    restkv::page_pool pool;
    REQUIRE(pool.reset(pages, restkv::workspace(pool_memory)).ok());
    for (index_t page = 0; page < pages; ++page) {
      page_t taken = -1;
      REQUIRE(pool.allocate(taken).ok());
    }
    bool freed = false;
    REQUIRE(pool.release(3, freed).ok());
    const restkv::page_tables tables = restkv::block_tables(tensor_view<page_t, 2>{ids.data(), {1, 6}},
                                                            tensor_view<position_t, 1>{lengths.data(), {1}});
    const std::vector<page_t> old_ids = ids;
    const random_kept kept(random, 1, heads, 17, 12);
    std::vector<std::byte> memory(restkv::page_moves_bytes(tables));
    restkv::page_moves moves;
    const restkv::const_kept_tokens set = kept.read();
    REQUIRE(restkv::plan_page_moves(pool, {&set, 1}, tables, size, heads, restkv::workspace(memory), moves).ok());
    for (const auto& pair : {first, second, third}) {
      REQUIRE(restkv::move_tokens(moves, set, tables, pair.key).ok());
      REQUIRE(restkv::move_tokens(moves, set, tables, pair.value).ok());
    }
    REQUIRE(restkv::move_tokens(moves, set, tables, values_last).ok());
    REQUIRE(restkv::move_tokens(moves, set, tables, keys_alone).ok());
    for (index_t i = 0; i < channels / piece; ++i) {
      REQUIRE(restkv::move_tokens(moves, set, tables, restkv::channel_pages(key_pieces, i)).ok());
    }
    REQUIRE(restkv::commit_page_moves(pool, moves, tables).ok());
    index_t wrong = 0;
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < set.lengths(0, h); ++i) {
        const index_t position = set.positions(0, h, i);
        const page_t from = old_ids[static_cast<std::size_t>(position / size)];
        const page_t to = tables.ids(0, 0, i / size);
        const index_t n = i % size;
        for (index_t c = 0; c < channels; ++c) {
          const float key = number(0, from, h, position % size, c);
          const float value = number(1, from, h, position % size, c);
          for (const auto& pair : {first, second, third}) {
            wrong += pair.key(to, h, n, c) == key && pair.value(to, h, n, c) == value ? 0 : 1;
          }
          wrong += keys_alone(to, h, n, c) == key ? 0 : 1;
          wrong += restkv::channel_pages(key_pieces, c / piece)(to, h, n, c % piece) == key ? 0 : 1;
          wrong += values_last(to, h, n, c) == value ? 0 : 1;
        }
      }
    }
    CHECK(wrong == 0);
  }
  restkv::page_pair<float> none;
  std::vector<float> buffer(54);
  check_error(restkv::key_value_pages(tensor_view<float, 5>{buffer.data(), {3, 3, 3, 2, 1}}, 1, page_order::nhd, none),
              errc::shape_mismatch, {3, 1, 2});
  check_error(restkv::key_value_pages(tensor_view<float, 5>{buffer.data(), {1, 2, 3, 3, 3}}, 2, page_order::nhd, none),
              errc::invalid_argument, {2});
  CHECK(none.key.data == nullptr);
}
