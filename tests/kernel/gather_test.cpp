// SPDX-License-Identifier: Apache-2.0
// The kernels that move tokens, on the host group in shuffled orders, against the library's own loops, bit by bit: by
// the calls that a user makes, so that what these check lets every good input through.
#include "cache/cache_support.hpp"
#include "support/catch.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/backend/kernel_compact.hpp>
#include <restkv/cache/compact.hpp>
#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_gather.hpp>

using namespace restkv;
using namespace restkv_test;

namespace {

/// A backend that says whether work items met.
struct checked_backend {
  kernel::conflict_recorder recorder;
  host_kernel_backend backend;

  explicit checked_backend(index_t seed) : backend(static_cast<std::uint64_t>(seed), &recorder) {}
  ~checked_backend() { CHECK(recorder.conflicts().empty()); }
};

struct sizes {
  index_t batch, heads, group, tokens, channels, capacity;
};

sizes sizes_of(random_engine& random, index_t turn) {
  constexpr index_t channels[] = {1, 8, 16, 128, 3, 80, 33};
  constexpr index_t tokens[] = {1, 63, 64, 65, 200, 5};
  sizes s{pick(random, 1, 2), pick(random, 1, 3), pick(random, 1, 2), tokens[turn % 6], channels[turn % 7], 0};
  s.capacity = std::max<index_t>(1, s.tokens - pick(random, 0, 3));
  return s;
}

template <class T>
typename guarded_tensor<T, 4>::options arrangement(index_t turn) {
  return {.contiguous_channels = turn % 3 != 2,
          .row_major = turn % 3 == 1,
          .reversed_axes = turn % 4 == 3,
          .gaps = turn % 3 != 1};
}

/// A pool of pages that a batch's tables name in a random order, each page once.
template <class T>
struct random_pages {
  static constexpr index_t spare = 200;

  guarded_tensor<T, 4> pages;
  std::vector<page_t> ids;
  std::vector<position_t> lengths;
  paged_layout<T> layout;

  random_pages(random_engine& random, index_t batch, index_t tables, index_t heads_per_page, index_t page_size,
               index_t tokens, index_t channels, index_t turn)
      : pages(random, {batch * tables * pages_of(tokens, page_size) + spare, heads_per_page, page_size, channels},
              arrangement<T>(turn)),
        ids(static_cast<std::size_t>(pages.view().extent(0))),
        lengths(static_cast<std::size_t>(batch * tables), static_cast<position_t>(tokens)) {
    // Pages of the tables first, as a pool hands them out; spare ones are in no table.
    std::iota(ids.begin(), ids.end(), page_t{0});
    std::shuffle(ids.begin(), ids.end() - spare, random);
    layout = {pages.view(),
              {tensor_view<const page_t, 3>(ids.data(), {batch, tables, pages_of(tokens, page_size)}),
               tensor_view<const position_t, 2>(lengths.data(), {batch, tables})}};
  }
  random_pages(const random_pages& other) : pages(other.pages), ids(other.ids), lengths(other.lengths) {
    layout = other.layout;
    layout.pages = pages.view();
  }
};

template <class T>
void check_gather(index_t turn) {
  random_engine random(static_cast<unsigned>(turn + 1));
  const sizes s = sizes_of(random, turn);
  const index_t rows = s.heads * s.group;
  const guarded_tensor<T, 4> source(random, {s.batch, s.heads, s.tokens, s.channels}, arrangement<T>(turn));
  const random_kept kept(random, s.batch, rows, s.tokens, s.capacity);
  checked_backend run(turn);
  CAPTURE(turn, s.tokens, s.channels, s.capacity, sizeof(T));

  guarded_tensor<T, 4> dense(random, {s.batch, rows, s.capacity, s.channels}, arrangement<T>(turn / 2));
  const guarded_tensor<T, 4> expected_dense(dense);
  REQUIRE(
      gather_tokens(kept.read(), chunked_tensor_view<const T>(source.read()), dense_layout<T>{expected_dense.view()})
          .ok());
  REQUIRE(gather_tokens(run.backend, kept.set(), source.read(), dense.view()).ok());
  CHECK(dense.same_bytes(expected_dense));

  std::vector<std::int64_t> offsets(static_cast<std::size_t>(s.batch * rows + 1));
  const tensor_view<std::int64_t, 1> starts(offsets.data(), {s.batch * rows + 1});
  REQUIRE(ragged_offsets(kept.read(), starts).ok());
  const guarded_tensor<T, 2> ragged(random, {s.batch * rows * s.capacity, s.channels},
                                    {.contiguous_channels = turn % 2 == 0});
  const guarded_tensor<T, 2> expected_ragged(ragged);
  REQUIRE(gather_tokens(kept.read(), chunked_tensor_view<const T>(source.read()),
                        ragged_layout<T>{expected_ragged.view(), starts, s.batch, rows})
              .ok());
  REQUIRE(ragged_offsets(run.backend, kept.read(), starts).ok());
  REQUIRE(
      gather_tokens(run.backend, kept.set(), source.view(), ragged_rows<T, memory_space::host>{ragged.view(), starts})
          .ok());
  CHECK(ragged.same_bytes(expected_ragged));

  const index_t page_size = pick(random, 1, 17);
  const bool shared = turn % 2 == 0;
  const random_pages<T> paged(random, s.batch, shared ? 1 : rows, shared ? rows : 1, page_size, s.capacity, s.channels,
                              turn);
  const random_pages<T> expected_paged(paged);
  REQUIRE(gather_tokens(kept.read(), chunked_tensor_view<const T>(source.read()), expected_paged.layout).ok());
  REQUIRE(gather_tokens(run.backend, kept.read(), source.read(), paged.layout).ok());
  CHECK(paged.pages.same_bytes(expected_paged.pages));

  const random_pages<T> from(random, s.batch, shared ? 1 : s.heads, shared ? s.heads : 1, page_size, s.tokens,
                             s.channels, turn);
  REQUIRE(gather_tokens(kept.read(), from.layout, dense_layout<T>{expected_dense.view()}).ok());
  REQUIRE(gather_tokens(run.backend, kept.read(), from.layout, dense.view()).ok());
  CHECK(dense.same_bytes(expected_dense));
}

template <class T>
void check_in_place(index_t turn) {
  random_engine random(static_cast<unsigned>(turn + 100));
  sizes s = sizes_of(random, turn);
  if (turn % 7 == 3) s.tokens = s.capacity = 1500;  // several tiles
  const guarded_tensor<T, 4> cache(random, {s.batch, s.heads, s.tokens, s.channels}, arrangement<T>(turn));
  const guarded_tensor<T, 4> expected(cache);
  const random_kept kept(random, s.batch, s.heads, s.tokens, s.capacity);
  checked_backend run(turn);
  CAPTURE(turn, s.tokens, s.channels, s.capacity, sizeof(T));
  const tensor_view<T, 4> nothing(nullptr, {s.batch, s.heads, s.tokens, 0});
  REQUIRE(compact_in_place(kept.read(), expected.view(), nothing).ok());
  REQUIRE(compact_in_place(run.backend, kept.set(), cache.view(), nothing).ok());
  CHECK(cache.same_bytes(expected));

  const bool shared = turn % 2 == 0;
  const random_pages<T> pages(random, s.batch, shared ? 1 : s.heads, shared ? s.heads : 1, pick(random, 1, 17),
                              s.tokens, s.channels, turn);
  const random_pages<T> expected_pages(pages);
  // In pages of their own tokens need no plan: slot i goes to entry i / page_size of the table.
  const random_pages<T> own(pages);
  const random_pages<T> expected_own(pages);
  for (index_t b = 0; b < s.batch; ++b) {
    for (index_t h = 0; h < s.heads; ++h) {
      for (index_t i = 0; i < kept.read().lengths(b, h); ++i) {
        const auto from = own.layout.row(b, h, kept.read().positions(b, h, i));
        const auto to = expected_own.layout.row(b, h, i);
        for (index_t c = 0; c < s.channels; ++c) std::memcpy(&to(c), &from(c), sizeof(T));
      }
    }
  }
  const paged_layout<T> no_channels{own.layout.pages.slice(3, 0, 0), own.layout.tables};
  REQUIRE(compact_in_place(run.backend, kept.set(), own.layout, no_channels).ok());
  CHECK(own.pages.same_bytes(expected_own.pages));
  std::vector<position_t> own_lengths(own.lengths.size(), -1);
  const tensor_view<position_t, 2> of_tables(own_lengths.data(), own.layout.tables.lengths.extents);
  REQUIRE(page_lengths(run.backend, kept.set(), own.layout.pages.extent(1), of_tables).ok());

  // Some pages are shared with others, so that their tokens are copied elsewhere.
  const index_t count = pages.pages.view().extent(0);
  std::vector<std::byte> pool_memory(page_pool::required_bytes(count));
  page_pool pool;
  REQUIRE(pool.reset(count, workspace(pool_memory)).ok());
  for (index_t i = 0; i < count - random_pages<T>::spare; ++i) {
    page_t page = no_page;
    REQUIRE(pool.allocate(page).ok());
    if (chance(random, s.tokens > 1000 ? 1 : 20)) REQUIRE(pool.share(page).ok());
  }
  const const_page_tables& tables = pages.layout.tables;
  std::vector<std::byte> plan_memory(page_moves_bytes(tables));
  page_moves moves;
  const const_kept_tokens set = kept.read();
  REQUIRE(plan_page_moves(pool, {&set, 1}, tables, pages.layout.page_size(), pages.layout.pages.extent(1),
                          workspace(plan_memory), moves)
              .ok());
  REQUIRE(move_tokens(moves, kept.read(), pages.layout.tables, expected_pages.pages.view()).ok());
  std::vector<page_t> after_ids(static_cast<std::size_t>(moves.ids.size()));
  std::vector<position_t> after_lengths(static_cast<std::size_t>(moves.lengths.size()));
  const page_tables after{{after_ids.data(), moves.ids.extents}, {after_lengths.data(), moves.lengths.extents}};
  REQUIRE(
      upload_tables(run.backend, page_tables{moves.ids, moves.lengths}, count, pages.layout.page_size(), after).ok());
  REQUIRE(move_tokens(run.backend, kept.read(), pages.layout, after).ok());
  CHECK(pages.pages.same_bytes(expected_pages.pages));
  CHECK(after_lengths == own_lengths);
}

/// Slots behind each other from position 3 on.
struct behind_three {
  [[nodiscard]] constexpr index_t operator()(index_t, index_t, index_t slot) const noexcept { return slot + 3; }
};

template <class T>
void check_rotation(index_t turn) {
  random_engine random(static_cast<unsigned>(turn + 200));
  sizes s = sizes_of(random, turn);
  s.channels = std::max<index_t>(s.channels, 2);
  const index_t pairs = turn % 2 == 0 ? s.channels / 2 : std::max<index_t>(1, s.channels / 4);
  const auto pairing = turn % 3 == 0 ? rotary_pairs::interleaved : rotary_pairs::half_split;
  std::vector<double> frequencies(static_cast<std::size_t>(pairs));
  REQUIRE(rope_frequencies(rope_parameters<>{.rotary_dim = 2 * pairs}, std::span<double>(frequencies)).ok());
  const guarded_tensor<T, 4> source(random, {s.batch, s.heads, s.tokens, s.channels}, arrangement<T>(turn));
  for_each(source.view(), [&](T& x) { x = narrow<T>(normal(random)); });
  const random_kept kept(random, s.batch, s.heads * s.group, s.tokens, s.capacity);
  const guarded_tensor<T, 4> out(random, {s.batch, s.heads * s.group, s.capacity, s.channels},
                                 arrangement<T>(turn / 2));
  const guarded_tensor<T, 4> expected(out);
  checked_backend run(turn);
  CAPTURE(turn, s.tokens, s.channels, pairs);
  REQUIRE(
      gather_tokens(kept.read(), chunked_tensor_view<const T>(source.read()), dense_layout<T>{expected.view()}).ok());
  REQUIRE(rotate_keys(kept.read(), expected.view(), frequencies, pairing, behind_three{}).ok());
  std::vector<double> uploaded(frequencies.size());
  const tensor_view<double, 1> table(uploaded.data(), {pairs});
  REQUIRE(upload_frequencies(run.backend, frequencies, table).ok());
  const key_rotation<memory_space::host, behind_three> behind{table, pairing, {}};
  const tensor_view<const T, 4> no_value(nullptr, {s.batch, s.heads, s.tokens, 0});
  const tensor_view<T, 4> no_out(nullptr, {s.batch, s.heads * s.group, s.capacity, 0});
  REQUIRE(compact(run.backend, kept.set(), source.read(), no_value, out.view(), no_out, behind).ok());
  CHECK(out.same_bytes(expected));

  const key_rotation<memory_space::host> to_slots{table, pairing, {}};
  REQUIRE(rotate_keys(kept.read(), expected.view(), frequencies, pairing).ok());
  REQUIRE(rotate_keys(run.backend, kept.set(), out.view(), to_slots).ok());
  CHECK(out.same_bytes(expected));

  const random_pages<T> paged(random, s.batch, s.heads * s.group, 1, 5, s.capacity, s.channels, turn);
  const random_pages<T> expected_paged(paged);
  REQUIRE(gather_tokens(kept.read(), chunked_tensor_view<const T>(source.read()), expected_paged.layout).ok());
  REQUIRE(rotate_keys(kept.read(), expected_paged.layout, frequencies, pairing).ok());
  REQUIRE(compact(run.backend, kept.set(), source.read(), no_value, paged.layout, no_out, to_slots).ok());
  CHECK(paged.pages.same_bytes(expected_paged.pages));

  const index_t total = s.batch * s.heads * s.group * s.capacity;
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(s.batch * s.heads * s.group + 1));
  const tensor_view<std::int64_t, 1> starts(offsets.data(), {s.batch * s.heads * s.group + 1});
  REQUIRE(ragged_offsets(run.backend, kept.read(), starts).ok());
  const guarded_tensor<T, 2> ragged(random, {total, s.channels}, {});
  const guarded_tensor<T, 2> expected_ragged(ragged);
  const ragged_layout<T> expected_rows{expected_ragged.view(), starts, s.batch, s.heads * s.group};
  REQUIRE(gather_tokens(kept.read(), chunked_tensor_view<const T>(source.read()), expected_rows).ok());
  REQUIRE(rotate_keys(kept.read(), expected_rows, frequencies, pairing).ok());
  REQUIRE(compact(run.backend, kept.set(), source.read(), no_value,
                  ragged_rows<T, memory_space::host>{ragged.view(), starts}, no_out, to_slots)
              .ok());
  CHECK(ragged.same_bytes(expected_ragged));

  if (s.group > 1) return;
  const guarded_tensor<T, 4> moved(source);
  const guarded_tensor<T, 4> expected_moved(source);
  const tensor_view<T, 4> nothing(nullptr, {s.batch, s.heads, s.tokens, 0});
  REQUIRE(compact_in_place(kept.read(), expected_moved.view(), nothing).ok());
  REQUIRE(rotate_keys(kept.read(), expected_moved.view(), frequencies, pairing).ok());
  REQUIRE(compact_in_place(run.backend, kept.set(), moved.view(), nothing, to_slots).ok());
  CHECK(moved.same_bytes(expected_moved));
}

}  // namespace

TEST_CASE("Kernels gather what the library gathers, into dense, ragged and paged caches", "[kernel]") {
  for (index_t turn = 0; turn < 42; ++turn) {
    check_gather<std::uint8_t>(turn);
    check_gather<bfloat16>(turn);
    check_gather<float>(turn);
    check_gather<double>(turn);
  }
}

TEST_CASE("Kernels compact in place what the library compacts", "[kernel]") {
  for (index_t turn = 0; turn < 42; ++turn) {
    check_in_place<std::uint8_t>(turn);
    check_in_place<half>(turn);
    check_in_place<float>(turn);
  }
}

TEST_CASE("Kernels turn keys as the library does", "[kernel]") {
  for (index_t turn = 0; turn < 24; ++turn) {
    check_rotation<float>(turn);
    check_rotation<half>(turn);
    check_rotation<bfloat16>(turn);
  }
}
